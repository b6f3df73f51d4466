"""Images that requests name: fetched without holding up anybody, decoded within limits."""

import asyncio
import base64
import binascii
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image
from transformers import image_utils

from .media_hosts import AllowedHosts

# transformers fetches images with it. Which library that is differs between releases of huggingface_hub.
_httpx = image_utils.httpx

# Pillow reads many more; one of them starts another program (EPS), and others hold no pixels of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # beyond, Pillow itself refuses to open an image
_REDIRECTS = 5
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class MediaLimits:
    """What all images of one request may take.

    Args:
        seconds: to fetch them.
        megabytes: their size as files, in MiB.
        pixels: their area.
    """

    seconds: float = 10
    megabytes: float = 20
    pixels: int = 64_000_000

    def __post_init__(self) -> None:
        for name in ("seconds", "megabytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"the limit of {name} is {getattr(self, name)}; it must be above 0.")
        if not 0 < self.pixels <= MOST_PIXELS:
            raise ValueError(
                f"the limit of pixels is {self.pixels}; it must be from 1 to {MOST_PIXELS}, the most that Pillow opens."
            )

    @property
    def bytes(self) -> int:
        """The same as `megabytes`."""
        return int(self.megabytes * _MEBIBYTE)


class Media:
    """Where images may come from, and how large they may be.

    Args:
        limits: for each request.
        domains: hosts that they may be fetched from, as of `AllowedHosts`. None by itself.
        local_path: the folder below which files may be named. None by itself.
    """

    def __init__(
        self, limits: MediaLimits | None = None, domains: Iterable[str] = (), local_path: str | os.PathLike[str] | None = None
    ) -> None:
        self.limits = limits or MediaLimits()
        self._hosts = AllowedHosts(domains)
        self._folder = None if local_path is None else Path(local_path).resolve()
        if self._folder is not None and not self._folder.is_dir():
            raise ValueError(f"{local_path} is no folder, so no images can be read from it (--allowed-local-media-path).")
        self._client: Any = None
        # Of its own: names of hosts are looked up in the event loop's threads, and a slow look-up holds on to one.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="media")

    async def fetch(self, sources: Iterable[Any]) -> list[bytes]:
        """The files that a request's images are, undecoded.

        Args:
            sources: `data:` URIs, addresses (`http:`, `https:`) and `file:` addresses.

        Raises:
            ValueError: for what is none of these, may not be had from there, is too large, or takes too long.
        """
        files: list[bytes] = []
        try:
            async with asyncio.timeout(self.limits.seconds):
                for source in sources:
                    room = self.limits.bytes - sum(map(len, files))
                    files.append(await self._file(source, room))
        except TimeoutError:
            raise ValueError(
                f"the images of the request could not be fetched within {self.limits.seconds:g} seconds, the limit here."
            ) from None
        return files

    async def _file(self, source: Any, room: int) -> bytes:
        if not isinstance(source, str):
            raise ValueError(f"an image is named by a text, a data: URI or an address, not by {type(source).__name__}.")
        scheme = source[:6].lower().partition(":")[0]
        if scheme == "data":
            return await self._in_thread(self._data, source, room)
        if scheme == "file":
            return await self._in_thread(self._local, source, room)
        if scheme in ("http", "https"):
            return await self._download(source, room)
        raise ValueError(
            f"{_shown(source)} names no image that this server takes. Send a data: URI (data:image/png;base64,...), "
            "an http: or https: address, or a file: address."
        )

    async def _in_thread(self, read: Callable[[str, int], bytes], source: str, room: int) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, source, room)

    def _data(self, source: str, room: int) -> bytes:
        head, comma, content = source.partition(",")
        if not comma:
            raise ValueError("a data: URI of an image needs a comma before its content: data:image/png;base64,...")
        if not head.endswith(";base64"):
            return self._within(unquote_to_bytes(content), room)
        if len(content) * 3 // 4 > room + 3:
            raise self._too_large()
        try:
            return self._within(base64.b64decode(content), room)
        except binascii.Error as error:
            raise ValueError(f"the data: URI of an image is not base64: {error}.") from None

    def _local(self, source: str, room: int) -> bytes:
        if self._folder is None:
            raise ValueError(
                "this server opens no files of its own machine. Send the image itself, as a data: URI, "
                "or have the server started with --allowed-local-media-path."
            )
        # Links are followed first. One answer for what is outside and for what is not there: it tells nothing of other folders.
        try:
            parts = urlsplit(source)
            path = Path(url2pathname(parts.path)).resolve()
            named = parts.netloc in ("", "localhost") and path.is_relative_to(self._folder) and path.is_file()
        except (OSError, ValueError):
            named = False
        if not named:
            raise ValueError(
                f"{_shown(source)} is no file in the folder that this server reads images from (--allowed-local-media-path)."
            )
        with path.open("rb") as file:
            return self._within(file.read(room + 1), room)

    async def _download(self, source: str, room: int) -> bytes:
        try:
            url = _httpx.URL(source)
            for _ in range(_REDIRECTS + 1):
                content, target = await self._request(url, room)
                if target is None:
                    return content
                url = url.join(target)
        except (_httpx.HTTPError, _httpx.InvalidURL) as error:
            raise ValueError(f"the image at {_shown(source)} could not be fetched: {type(error).__name__}.") from None
        raise ValueError(f"the image at {_shown(source)} could not be fetched: more than {_REDIRECTS} redirects.")

    async def _request(self, url: Any, room: int) -> tuple[bytes, str | None]:
        """What an address answers: a file, or where it redirects to."""
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{_shown(str(url))} is no http: or https: address, so no image is fetched from there.")
        host = url.raw_host.decode("ascii")
        addresses = await self._hosts.addresses(host, url.port or (443 if url.scheme == "https" else 80))
        for address in addresses[:-1]:
            try:
                return await self._request_at(address, url, room)
            except _httpx.ConnectError:
                continue
        return await self._request_at(addresses[-1], url, room)

    async def _request_at(self, address: str, url: Any, room: int) -> tuple[bytes, str | None]:
        # The address that was checked is connected to; the name remains for the server and for its certificate.
        request = self._own_client().build_request(
            "GET",
            url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "Accept": "image/*"},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        response = await self._own_client().send(request, stream=True)
        try:
            if response.has_redirect_location:
                return b"", response.headers["location"]
            if response.status_code != 200:
                raise ValueError(f"the image at {_shown(str(url))} could not be fetched: status {response.status_code}.")
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > room:
                    raise self._too_large()
            return bytes(content), None
        finally:
            await response.aclose()

    def _own_client(self) -> Any:
        if self._client is None:
            # Past any proxy of the environment, which would connect elsewhere. No connection is kept: one that was made to an
            # address for one name, and checked its certificate, must not serve another name.
            self._client = _httpx.AsyncClient(
                trust_env=False, timeout=self.limits.seconds, limits=_httpx.Limits(max_keepalive_connections=0)
            )
        return self._client

    def _within(self, content: bytes, room: int) -> bytes:
        if len(content) > room:
            raise self._too_large()
        return content

    def _too_large(self) -> ValueError:
        return ValueError(
            f"the images of the request have more than {self.limits.megabytes:g} MiB, the limit here. Send smaller ones."
        )

    def decode(self, files: Iterable[bytes]) -> list[Image.Image]:
        """The images that files hold, as transformers loads them. This takes a while: not for the event loop.

        Raises:
            ValueError: for what is no image that can be read, and for more pixels than the limit.
        """
        room, images = self.limits.pixels, []
        for file in files:
            image = _opened(file, self.limits.pixels)
            room -= image.width * image.height
            if room < 0:
                raise _too_many_pixels(f"with {image.width} x {image.height}", self.limits.pixels)
            try:
                images.append(image_utils.load_image(image))
            except Exception as error:  # whatever a decoder makes of broken content
                raise ValueError(f"an image of the request is broken and cannot be decoded: {error}") from None
        return images


def _opened(file: bytes, pixels: int) -> Image.Image:
    """An image whose size is known, and nothing else yet."""
    try:
        return Image.open(io.BytesIO(file), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(f"beyond {MOST_PIXELS:,}", pixels) from None
    except Exception:  # whatever a format's reader makes of broken content
        raise ValueError(
            f"an image of the request ({len(file):,} bytes) is none that can be read. Send one of {', '.join(FORMATS)}."
        ) from None


def _too_many_pixels(what: str, limit: int) -> ValueError:
    return ValueError(f"the images of the request have too many pixels (one {what}); the limit here is {limit:,}.")


def _shown(source: str) -> str:
    return source if len(source) <= 100 else f"{source[:100]}[...]"
