"""Images that requests to `hivtp serve` name: what is fetched from where, and how much."""

import asyncio
import base64
import io
import socket
import struct
import zlib

import pytest
from PIL import Image

from hivtp_hf.serving.media import Media, MediaLimits
from image_host import image_host
from served import png_of
from tiny_models import photo

pytestmark = pytest.mark.once

PNG = png_of(photo(60, 100))
HERE = ("127.0.0.1",)
NOT_PUBLIC = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("255.255.255.255", "::1", "::", "fe80::1", "fe80::1%1", "fd00::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1"),
    *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "nonsense"),
]


@pytest.fixture(scope="module")
def host():
    with image_host() as host:
        host.files["/photo.png"] = host.files["/large"] = PNG
        yield host


@pytest.fixture
def resolver(monkeypatch):
    """Answers for names of hosts: of each its addresses in turn; and how often each was asked."""
    addresses: dict[str, list[list[str]]] = {}
    asked: list[str] = []
    real = asyncio.BaseEventLoop.getaddrinfo

    async def getaddrinfo(loop, name, port, **options):
        asked.append(name)
        if name not in addresses:
            return await real(loop, name, port, **options)
        found = addresses[name].pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return addresses, asked


def fetched(media, *sources):
    return asyncio.run(media.fetch(sources))


def refusal(media, *sources):
    with pytest.raises(ValueError, match=r".") as error:
        fetched(media, *sources)
    assert len(str(error.value)) < 400
    return str(error.value)


def data_uri(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def png_of_size(width, height):
    """The beginning of a PNG file, which says how large it is."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, b"IDAT")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_data_uris_need_no_permission():
    assert fetched(Media(), data_uri(PNG), "data:,%00a", "DATA:image/png;base64,") == [PNG, b"\0a", b""]


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,abc", "base64"),
        ("/etc/passwd", "no image"),
        ("ftp://127.0.0.1/photo.png", "no image"),
        ("iVBORw0KGgo", "no image"),
        ("", "no image"),
        (None, "NoneType"),
        ({"url": "x"}, "dict"),
        ("http://[::1/", "InvalidURL"),
        ("http:///photo.png", "no http"),
    ],
)
def test_what_names_no_image(source, named):
    assert named in refusal(Media(domains=["*"], local_path="/"), source)


def test_files_are_opened_where_allowed(tmp_path):
    inside, outside = tmp_path / "images", tmp_path / "secret.png"
    inside.mkdir()
    outside.write_bytes(PNG)
    (inside / "a photo.png").write_bytes(PNG)
    (inside / "link.png").symlink_to(outside)
    assert "--allowed-local-media-path" in refusal(Media(), outside.as_uri())
    media = Media(local_path=inside)
    assert fetched(media, (inside / "a photo.png").as_uri()) == [PNG]
    elsewhere = [
        outside.as_uri(),
        f"{inside.as_uri()}/../secret.png",
        f"{inside.as_uri()}/%2e%2e/secret.png",
        f"{inside.as_uri()}/link.png",
        f"{inside.as_uri()}/missing.png",
        inside.as_uri(),
        f"file://elsewhere{inside}/a%20photo.png",
        f"{inside.as_uri()}/a%00",
    ]
    for source in elsewhere:
        # The same for what is there and what is not.
        assert "is no file in the folder" in refusal(media, source), source


def test_hosts_are_asked_where_allowed(host):
    url = host.url("/photo.png")
    assert "--allowed-media-domains" in refusal(Media(), url)
    assert "not among" in refusal(Media(domains=["images.example.com", "10.0.0.0/8"]), url)
    for names in (HERE, ["127.0.0.0/8"]):
        assert fetched(Media(domains=names), url, url) == [PNG, PNG]


def test_a_private_address_must_be_named_itself(host):
    url = host.url("/photo.png", "localhost")
    assert "not public" in refusal(Media(domains=["localhost"]), url)
    assert fetched(Media(domains=["LocalHost", *HERE]), url) == [PNG]
    assert host.asked[-1] == ("/photo.png", f"localhost:{host.port}")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(resolver, address):
    """Whatever the name, and where every name is allowed."""
    addresses, _ = resolver
    addresses["images.example.com"] = [[address]]
    assert "not public" in refusal(Media(domains=["*", "images.example.com"]), "http://images.example.com/photo.png")


def test_other_spellings_of_an_address(host):
    for spelling in ("2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]"):
        assert refusal(Media(domains=["*"]), f"http://{spelling}:{host.port}/photo.png"), spelling
        assert refusal(Media(domains=["images.example.com"]), f"http://{spelling}:{host.port}/photo.png"), spelling


def test_public_addresses_are_allowed(resolver):
    addresses, _ = resolver
    for address in ("93.184.215.14", "2606:2800:21f::1"):
        addresses["images.example.com"] = [["10.0.0.1", address]]
        found = asyncio.run(Media(domains=["images.example.com"])._hosts.addresses("images.example.com", 80))
        assert found == [address]


def test_a_name_is_asked_for_once(host, resolver):
    """So that the address which was checked is the one that is connected to, whatever the name stands for a moment later."""
    addresses, asked = resolver
    addresses["images.example.com"] = [["127.0.0.1"], ["10.255.255.1"]]
    media = Media(domains=["images.example.com", *HERE])
    assert fetched(media, host.url("/photo.png", "images.example.com")) == [PNG]
    assert asked.count("images.example.com") == 1
    assert host.asked[-1][1] == f"images.example.com:{host.port}"


def test_the_next_address_is_tried(host, resolver):
    addresses, _ = resolver
    addresses["images.example.com"] = [["127.0.0.2", "127.0.0.1"]]
    media = Media(domains=["images.example.com", "127.0.0.0/8"])
    assert fetched(media, host.url("/photo.png", "images.example.com")) == [PNG]


def test_redirects_are_checked(host):
    media = Media(domains=HERE)
    host.target = "/photo.png"
    assert fetched(media, host.url("/redirect")) == [PNG]
    for target in ("http://169.254.169.254/latest", host.url("/photo.png", "localhost"), f"//[::1]:{host.port}/photo.png"):
        host.target = target
        before = len(host.asked)
        assert "not among" in refusal(media, host.url("/redirect")), target
        assert len(host.asked) == before + 1
    host.target = "file:///etc/passwd"
    assert "no http" in refusal(media, host.url("/redirect"))
    host.target = "/redirect"
    assert "redirects" in refusal(media, host.url("/redirect"))


@pytest.mark.parametrize("path", ["/drip", "/hang"])
def test_slow_hosts(host, path):
    assert "within 0.5 seconds" in refusal(Media(MediaLimits(seconds=0.5), HERE), host.url(path))


def test_hosts_without_the_image(host, free_port):
    media = Media(domains=HERE)
    assert "status 404" in refusal(media, host.url("/missing"))
    assert "ConnectError" in refusal(media, f"http://127.0.0.1:{free_port}/")
    assert "Error" in refusal(media, host.url("/photo.png").replace("http", "https"))
    assert "no address" in refusal(Media(domains=["*"]), "http://name.invalid/photo.png")


def test_bytes_are_limited_together(host, tmp_path):
    (tmp_path / "photo.png").write_bytes(PNG)
    sources = [host.url("/large"), data_uri(PNG), (tmp_path / "photo.png").as_uri(), f"data:,{'a' * len(PNG)}"]
    roomy, tight = (Media(MediaLimits(megabytes=(2 * len(PNG) + slack) / 2**20), HERE, tmp_path) for slack in (0.5, -0.5))
    for source in sources:
        assert len(fetched(roomy, sources[0], source)) == 2
        assert "MiB" in refusal(tight, sources[0], source)


def test_pixels_are_limited_together():
    two = [PNG, png_of(photo(61, 100))]
    images = Media(MediaLimits(pixels=12_100)).decode(two)
    assert [image.size for image in images] == [Image.open(io.BytesIO(file)).size for file in two]
    with pytest.raises(ValueError, match=r"too many pixels.*12,099"):
        Media(MediaLimits(pixels=12_099)).decode(two)
    for size in ((8_001, 8_000), (12_000, 12_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ValueError, match="limit here is 64,000,000"):
            Media().decode([png_of_size(*size)])


def test_images_are_turned_and_coloured_as_by_transformers():
    image, exif = photo(40, 80).convert("L"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", exif=exif)
    (decoded,) = Media().decode([buffer.getvalue()])
    assert (decoded.mode, decoded.size) == ("RGB", (image.height, image.width))


def test_broken_images_and_formats_that_are_not_read():
    postscript = io.BytesIO()
    photo(20, 20).save(postscript, "eps")
    for file in (b"", b"no image", png_of_size(8, 8), PNG[: len(PNG) // 2], PNG[:60] + b"\0" + PNG[61:], postscript.getvalue()):
        with pytest.raises(ValueError, match="an image of the request"):
            Media().decode([file])
