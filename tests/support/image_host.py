"""A host of images for a server to fetch: good ones, slow ones, redirects, and whatever else a host may answer."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ImageHost:
    """What is answered to each path, and what was asked.

    `/hang` is answered once `released` is set, `/drip` a byte at a time and never to its end, `/redirect` sends on to `target`,
    and all other paths have the content that `files` gives.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.target = "/redirect"
        self.released, self.closing = threading.Event(), threading.Event()
        self.hanging = threading.Semaphore(0)  # one more for each request that hangs
        self.asked: list[tuple[str, str]] = []  # path, header "Host"
        self.server: Any = None

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextlib.contextmanager
def image_host() -> Iterator[ImageHost]:
    """A host that runs on 127.0.0.1."""
    host = ImageHost()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.asked.append((self.path, self.headers["Host"]))
            with contextlib.suppress(ConnectionError):
                self.answer()

        def answer(self) -> None:
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", host.target)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path == "/hang":
                host.hanging.release()
                while not host.released.wait(0.1) and not host.closing.is_set():
                    pass
            if self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                while not host.closing.wait(0.05):
                    self.wfile.write(b"x")
                return
            content = host.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    host.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.closing.set()
        host.server.shutdown()
        host.server.server_close()
        thread.join()
