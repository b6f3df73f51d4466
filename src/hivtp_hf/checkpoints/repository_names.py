"""Names of repositories on the Hub: which are some, and what stands for one that is not known yet."""

import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Stands for the owner of a checkpoint that has not been pushed yet.
PLACEHOLDER_OWNER = "your-name"

_PLACEHOLDER = re.compile(rf"(?<![\w./-]){PLACEHOLDER_OWNER}/[\w.-]*\w", re.ASCII)
_LONGEST = 96


def is_repository(name: Any) -> bool:
    """Whether `name` is `owner/name`, as the Hub could have it."""
    # Older clients take letters that the Hub does not.
    if not isinstance(name, str) or name.count("/") != 1 or not name.isascii():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def as_repository(name: str) -> str:
    """`name` itself where it is a repository's, or one that resembles it: what no such name has becomes a hyphen.

    Args:
        name: `owner/name`; without an owner it gets the placeholder.
    """
    if is_repository(name):
        return name
    owner, _, rest = name.rpartition("/")
    return f"{_as_part(owner) or PLACEHOLDER_OWNER}/{_as_part(rest) or 'checkpoint'}"


def with_repository(text: str, repo_id: str) -> str:
    """A card's text with `repo_id` in place of every repository of the placeholder's: for when the name is known.

    Args:
        text: of a model card, metadata included.
        repo_id: `owner/name` on the Hub.
    """
    return _PLACEHOLDER.sub(lambda _: repo_id, text)


def _as_part(text: str) -> str:
    hyphenated = re.sub(r"[-.]{2,}", "-", re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII))
    return hyphenated[:_LONGEST].strip("-.").removesuffix(".git")
