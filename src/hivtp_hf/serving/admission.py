"""Which requests are let in, and what happens once their clients have gone."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Any

from .answering import client_gone
from .request_errors import error_response

# End points by which a client changes what all others are served.
ADMINISTRATION = ("/load_model", "/reset")
RETRY_AFTER = 5  # seconds, which a client that is turned away is asked to wait
_BODY_SECONDS = 60  # in which a request must have arrived
_TEXT_BYTES = 2 * 2**20  # of a request, beside its images


class Admission:
    """Around the server's application: a bounded number of requests, of bounded size, that end with their clients.

    Args:
        app: the application, of ASGI.
        waiting: how many requests may wait for the one that runs. All others are turned away with the status 503.
        image_bytes: how large all images of a request may be.
        refused_paths: end points that nobody may use.
    """

    def __init__(self, app: Any, waiting: int, image_bytes: int, refused_paths: Sequence[str] = ()) -> None:
        self._app = app
        self._waiting = waiting
        self._refused = frozenset(refused_paths)
        # In base64, four characters stand for three bytes.
        self._largest = image_bytes * 4 // 3 + _TEXT_BYTES
        self._present = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if scope["path"] in self._refused:
            message = f"{scope['path']} is closed, as it changes what others are served. --trust-clients opens it."
            await error_response(403, message)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._body(receive)
        except TimeoutError:
            message = f"the request did not arrive within {_BODY_SECONDS} seconds."
            await error_response(408, message)(scope, receive, send)
            return
        except _TooLarge:
            message = f"the request has more than {self._largest:,} bytes, the limit of this server. Send smaller images."
            await error_response(400, message)(scope, receive, send)
            return
        except _Gone:
            return
        if self._present > self._waiting:
            message = f"{self._present} requests are being answered or wait already, the limit of this server. Try again later."
            await error_response(503, message, {"Retry-After": str(RETRY_AFTER)})(scope, receive, send)
            return
        self._present += 1
        try:
            await self._answer(scope, body, receive, send)
        finally:
            self._present -= 1

    async def _body(self, receive: Any) -> bytes:
        body, length, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part, more = message.get("body", b""), message.get("more_body", False)
            length += len(part)
            # What is too much is read all the same and dropped: a client that still sends does not hear the answer.
            if length > self._largest:
                body.clear()
            else:
                body += part
        if length > self._largest:
            raise _TooLarge
        return bytes(body)

    async def _answer(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        gone, told = threading.Event(), asyncio.Event()
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Any:
            if pending:
                return pending.pop()
            await told.wait()
            return {"type": "http.disconnect"}

        async def notice() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            told.set()

        client_gone.set(gone)  # for the tasks that begin here, this request's alone
        answer = asyncio.ensure_future(self._app(scope, receive_again, send))
        leaving = asyncio.ensure_future(notice())
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answer.done():  # the client has gone, or the server stops
                gone.set()
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer


class _Gone(Exception):
    """The client, before its request had arrived."""


class _TooLarge(Exception):
    """A request."""
