"""The model and the processor of an lmms-eval run, from a stock, pruned or config-only checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import open_source
from ..families.base import Family
from ..pruning.checked_values import shown
from .model_arguments import with_arguments


class LoadedCheckpoint(NamedTuple):
    """A model that is ready to answer.

    Attributes:
        model: of our classes.
        processor: with the same settings; pads on the left.
    """

    model: Any
    processor: Any


def loaded_checkpoint(
    name: str,
    family: Family,
    model_id: str,
    pruning: Mapping[str, Any],
    *,
    revision: str | None,
    trust_remote_code: bool,
    other_names: tuple[str, ...],
    **of_model: Any,
) -> LoadedCheckpoint:
    """Loads a checkpoint.

    Args:
        name: a folder, or owner/name on the Hub.
        family: that it must belong to.
        model_id: how lmms-eval calls that family, for messages.
        pruning: settings that rule over the checkpoint's.
        revision, trust_remote_code: of `from_pretrained`. Code in a checkpoint is not run: it is of our classes.
        other_names: arguments that are no settings, for messages.
        of_model: further arguments of the model's `from_pretrained`.

    Raises:
        ValueError: for settings that are none, and for a checkpoint of another family or without a chat template.
        OSError, huggingface_hub.errors.HfHubHTTPError: where it cannot be read.
    """
    source = open_source(name, revision=revision)
    if source.family is not family:
        raise ValueError(
            f"{name} has the model type {source.config['model_type']!r}, and `--model {model_id}` takes "
            f"{family.classes.config.stock_model_type!r} and {family.classes.config.model_type!r}. Give the checkpoint to "
            f"`--model {source.family.classes.config.model_type}`."
        )
    settings = with_arguments(source.settings(), pruning, other_names)
    place: str | Path = source.folder if source.repository is None else source.repository.name
    shared = {
        "pruning_config": settings,
        "revision": "main" if source.repository is None else source.repository.revision,
        "trust_remote_code": trust_remote_code,
    }
    processor = family.classes.processor.from_pretrained(place, **shared)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = family.classes.model.from_pretrained(place, **shared, **of_model).eval()
    return LoadedCheckpoint(model, processor)


def checked_template(chat_template: Any, processor: Any) -> str | None:
    """The template that was given, read if it is a file; None for the processor's own.

    Raises:
        ValueError: where neither is there.
    """
    if chat_template is None:
        if not processor.chat_template:
            raise ValueError("the checkpoint has no chat template; give `chat_template`, a file with one.")
        return None
    if not isinstance(chat_template, str):
        raise ValueError(f"`chat_template` is {shown(chat_template)}; it must be a Jinja template or a file with one.")
    return chat_template if "{" in chat_template else Path(chat_template).read_text(encoding="utf-8")
