"""What to do about the Hub's refusals: wait where it asks for patience, and say what helps where it does not."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)

_WAITS = (1, 2, 4, 8, 8)  # seconds, where the Hub names none
_LONGEST_WAIT = 600
_AGAIN = "Run the same command again: it goes on where it was, and what has arrived is kept."


def patiently(call: Callable[[], _Result]) -> _Result:
    """What `call` returns; where the Hub says "not now" (429 or 503), so that nothing was done, it is called again later.

    huggingface_hub waits by itself only in uploads of files, not where a repository is made or looked at, nor for a commit.
    """
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in (429, 503):
                raise
            seconds = min(_seconds_asked_for(error) or wait, _LONGEST_WAIT)
            _logger.warning(f"The Hub answers {error.response.status_code}; trying again in {seconds} s.")
            time.sleep(seconds)
    return call()


@contextlib.contextmanager
def explained_refusals(repo_id: str) -> Iterator[None]:
    """Errors of the client within the block say what to do about them.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: a refusal of the Hub, with advice.
        OSError: for a connection that broke, with advice.
    """
    try:
        yield
    except HfHubHTTPError as error:
        error.append_to_message(f"\n{_advice(error, repo_id)}")
        raise
    except RuntimeError as error:  # one file could not be moved; why is said by its cause
        reason = f"{error} {error.__cause__ or ''}".strip()
        reason = re.sub(r"\?[^\s']*", "", reason)  # addresses of storage are signed: they let others write
        raise OSError(f"{repo_id}: {reason}\n{_AGAIN}") from error
    except HTTPError as error:  # the connection broke and the client gave up; its errors are no OSErrors
        raise OSError(f"The connection to the Hub broke: {error}. {_AGAIN}") from error
    except json.JSONDecodeError as error:  # the client reads an answer before it looks whether it is one
        raise OSError(f"The Hub gave no answer that can be read: {error}. {_AGAIN}") from error


def _seconds_asked_for(error: HfHubHTTPError) -> int | None:
    headers = error.response.headers
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"\bt=(\d+)", headers.get("RateLimit", "")
    )
    return int(found[1]) + 1 if found else None


def _advice(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "The Hub does not know the token: log in with `hf auth login`, or set HF_TOKEN to a valid one."
    if isinstance(error, RevisionNotFoundError):
        return f"Check `revision`: it must be a branch, a tag or a commit of {repo_id}."
    if isinstance(error, GatedRepoError):
        return f"Ask for access on the page of {repo_id}, and log in with `hf auth login`."
    if status in (401, 404):
        return f"Check that {repo_id} exists, and that the token in use may see it (`hf auth whoami`, `hf auth login`)."
    if status == 403:
        return (
            f"The token in use may not do this in {repo_id}. Check the owner's name; log in with a token that may read, or for "
            "a push may write (`hf auth login`). What others own can be pushed to as well: open a pull request with `--pr` "
            "(create_pr=True)."
        )
    if status in (409, 412):
        return f"Somebody else has changed {repo_id} meanwhile, so nothing was committed. {_AGAIN}"
    return _AGAIN
