"""The metadata of a model card: what the Hub filters by and shows beside the text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_LICENCE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*\+{0,2}")
_LICENCE_NAME = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)
_LICENCE_URL = re.compile(r"https?://[\w.:-]+(?:/[\w./%:@~?&=#+,;-]*)?", re.ASCII)
_LICENCE_FILE = re.compile(r"\w[\w.-]*", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def card_metadata(*, base_name: str | None, tags: Sequence[str], taken_over: dict[str, Any]) -> ModelCardData:
    """The metadata of a pruned checkpoint.

    Args:
        base_name: the repository whose weights these are, None where it is not on the Hub.
        tags: to be found by.
        taken_over: of the base's own, as `taken_from_base` returns it.
    """
    return ModelCardData(
        base_model=base_name,
        # Of the values that the Hub knows (adapter, finetune, merge, quantized) the one that it would infer by itself, and the
        # only one that claims nothing of the files: there is no adapter, no second base, and precision is the base's.
        base_model_relation=None if base_name is None else "finetune",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(tags)),
        **taken_over,
    )


def taken_from_base(
    base_card: ModelCard | ModelCardData | None, folder: Path, *, base_name: str | None, base_revision: str | None
) -> dict[str, Any]:
    """Licence and language of a base's card, as far as they are well-formed; whatever is not is left out.

    Args:
        base_card: of the base, or its metadata.
        folder: of the pruned checkpoint; a licence's file is looked for there.
        base_name, base_revision: the base's repository and commit, to which a licence's file that is not in `folder` is linked.
    """
    given = base_card.data if isinstance(base_card, ModelCard) else base_card
    language = [code for code in _listed(given, "language") if _well_formed(_LANGUAGE, code)]
    taken: dict[str, Any] = {"language": _one_or_all(language)}
    licences = [_well_formed(_LICENCE, licence) for licence in _listed(given, "license")]
    if all(licences):  # a part of several would say something else
        link = getattr(given, "license_link", None)
        file = _well_formed(_LICENCE_FILE, link)
        if file and not (folder / file).is_file():
            link = f"https://huggingface.co/{base_name}/blob/{base_revision or 'main'}/{file}" if base_name else None
        taken["license"] = _one_or_all(licences)
        if licences:
            taken["license_name"] = _well_formed(_LICENCE_NAME, getattr(given, "license_name", None))
            taken["license_link"] = _well_formed(_LICENCE_FILE, link) or _well_formed(_LICENCE_URL, link)
    return {name: value for name, value in taken.items() if value is not None}


def _listed(metadata: Any, name: str) -> list[Any]:
    """A value that may be one or a list, as a list without repetitions."""
    value = getattr(metadata, name, None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [item for number, item in enumerate(values) if item not in values[:number]]


def _one_or_all(values: list[Any]) -> Any:
    return (values or None) if len(values) != 1 else values[0]


def _well_formed(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
