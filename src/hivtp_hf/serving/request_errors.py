"""What is wrong with a request, answered in the form of OpenAI's API."""

from typing import Any

from jinja2 import TemplateError
from transformers import image_utils

# What our checks, decoding or fetching an image, finding a checkpoint and applying a chat template raise on bad input. Pillow
# calls some broken PNG files a SyntaxError, and the library by which transformers fetches images differs between its releases.
_BAD_INPUT = (ValueError, OSError, SyntaxError, TemplateError, image_utils.httpx.HTTPError, image_utils.httpx.InvalidURL)
_LONGEST = 500


def answer_errors_of_requests(app: Any) -> None:
    """Has errors that a request's content causes answered with the status 400 and their message.

    By itself the server answers 500 without a message, which clients take for a passing fault and try again.

    Args:
        app: the server's FastAPI application, not running yet.
    """
    from fastapi.responses import JSONResponse  # of the extra "serving"

    async def refused(request: Any, error: Exception) -> Any:
        content = {"message": _shortened(str(error)), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, status_code=400)

    for kind in _BAD_INPUT:
        app.add_exception_handler(kind, refused)


def _shortened(message: str) -> str:
    # transformers quotes an image that it cannot decode in full.
    if len(message) <= _LONGEST:
        return message
    half = _LONGEST // 2
    return f"{message[:half]} [...] {message[-half:]}"
