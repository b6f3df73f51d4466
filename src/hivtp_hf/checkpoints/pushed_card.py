"""The model card that is pushed: the folder's own, which names the repository from then on, or a new one."""

import re

import yaml
from huggingface_hub import ModelCard

from ..pruning.base_checkpoint import BaseCheckpoint
from ..pruning.settings import VisualTokenPruningConfig
from .local_checkpoint import LocalCheckpoint
from .model_card import model_card, no_weights_notice
from .pushed_files import Content
from .repository_names import with_repository

_NAME = "README.md"


def with_card(checkpoint: LocalCheckpoint, repo_id: str) -> LocalCheckpoint:
    """The checkpoint with a model card for `repo_id`; its folder stays as it is.

    Raises:
        ValueError: where the folder's own card cannot be read, or describes other settings than the checkpoint has.
    """
    if _NAME in checkpoint.files:
        card_of(checkpoint.files[_NAME])  # can be read
        text = with_repository(_text_of(checkpoint.files[_NAME]), repo_id)
        _check_settings(text, VisualTokenPruningConfig.coerce(checkpoint.config.get("pruning_config")))
    else:
        name, revision = checkpoint.base or (None, None)
        text = str(model_card(checkpoint.folder, repo_id=repo_id, base_name=name, base_revision=revision, base_card=None))
    return checkpoint._replace(files={**checkpoint.files, _NAME: text.encode()})


def with_notice(checkpoint: LocalCheckpoint, base: BaseCheckpoint, repo_id: str) -> LocalCheckpoint:
    """The checkpoint with a card that says, after its title, that the weights are those of `base` and not in the repository."""
    card = card_of(checkpoint.files[_NAME])
    notice = no_weights_notice(base.name, base.revision, repo_id)
    title = re.search(r"^# .*$", card.text, flags=re.MULTILINE)
    end = title.end() if title else 0
    card.text = f"{card.text[:end]}\n\n{notice}\n{card.text[end:]}"
    return checkpoint._replace(files={**checkpoint.files, _NAME: str(card).encode()})


def card_of(content: Content) -> ModelCard:
    """A model card with its metadata.

    Raises:
        ValueError: where it is no text, or its metadata no YAML of the right kind.
    """
    text = _text_of(content)
    try:
        return ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of {_NAME} cannot be read: {error}. Mend it, or take the file away for a new card."
        ) from None


def _check_settings(text: str, pruning: VisualTokenPruningConfig) -> None:
    """A ValueError where the table of settings, as our template writes it, is out of date."""
    settings = pruning.to_dict()
    for name, value in re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, flags=re.MULTILINE):
        if name in settings and value != str(settings[name]):
            raise ValueError(
                f"{_NAME} says that `{name}` is {value}, and config.json that it is {settings[name]}. Take {_NAME} away for a "
                "new card, or correct it."
            )


def _text_of(content: Content) -> str:
    try:
        return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_NAME} is no text: {error}. Mend it, or take the file away for a new card.") from None
