"""What is wrong with a request, answered in the form of OpenAI's API."""

from typing import Any

from jinja2 import TemplateError
from transformers import image_utils

# What our checks, finding a checkpoint and applying a chat template raise on bad input. The library by which transformers
# fetches differs between its releases.
_BAD_INPUT = (ValueError, OSError, TemplateError, image_utils.httpx.HTTPError, image_utils.httpx.InvalidURL)
_LONGEST = 500


def answer_errors_of_requests(app: Any) -> None:
    """Has errors that a request's content causes answered with the status 400 and their message.

    By itself the server answers 500 without a message, which clients take for a passing fault and try again.

    Args:
        app: the server's FastAPI application, not running yet.
    """

    async def refused(request: Any, error: Exception) -> Any:
        return error_response(400, str(error))

    for kind in _BAD_INPUT:
        app.add_exception_handler(kind, refused)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Any:
    """An answer that says what is wrong.

    Args:
        status: 400 or above.
        message: one sentence or several; of a long one, beginning and end are sent.
        headers: of the answer, beyond the usual ones.
    """
    from fastapi.responses import JSONResponse  # of the extra "serving"

    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": _shortened(message), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, status_code=status, headers=headers)


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST:
        return message
    half = _LONGEST // 2
    return f"{message[:half]} [...] {message[-half:]}"
