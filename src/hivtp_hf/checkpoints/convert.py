"""`convert_checkpoint`: a pruned checkpoint of a stock one, with its weights untouched or with their address alone."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files import read_json, staged_folder, write_json
from ..pruning.base_checkpoint import BaseCheckpoint
from ..pruning.settings import VisualTokenPruningConfig
from .checkpoint_source import CheckpointSource, open_source
from .file_copies import copy_files
from .model_card import model_card
from .repository_names import PLACEHOLDER_OWNER

# Beside weights, configuration and processor, as they are.
_COPIED = ("generation_config.json", "LICENSE*")


def convert_checkpoint(
    source: str,
    target: str | Path,
    pruning: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    config_only: bool = False,
    force: bool = False,
    show_progress: bool = True,
    tuned_on: str | None = None,
) -> Path:
    """Makes a pruned checkpoint, which loads with and without this package; its weights are those of the source, bit for bit.

    With `config_only` it has none, but names the checkpoint that has them: the source at its commit, or the source's own base.
    Loading takes them from there.

    Nothing of the source is executed, and its weights are never loaded. An unfinished target never shows.

    Args:
        source: a folder or `owner/name` on the Hub: a stock checkpoint of a supported family, or a pruned one, with or without
            weights.
        target: the folder to make.
        pruning: settings to change, as `VisualTokenPruningConfig.replace` takes them: from the source's own, or from the
            defaults for a stock one.
        revision, token, cache_dir: for a source on the Hub, as for `huggingface_hub.snapshot_download`.
        config_only: whether to leave the weights where they are.
        force: whether an existing target is replaced.
        show_progress: whether a bar tells how far copying is.
        tuned_on: for the card: how the settings were found, in a paragraph.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: for settings out of range or that do not fit the source's vision tower, a source that is no checkpoint of
            a supported family, and a target that exists or touches the source.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the source cannot be downloaded, or the target not be written.
    """
    opened = open_source(source, revision=revision, token=token, cache_dir=cache_dir)
    settings = opened.settings().replace(**(pruning or {}))
    origin = opened.origin()
    with staged_folder(Path(target), apart_from=folders_of(opened), force=force) as stage:
        _write_configuration(opened, settings, stage, base=origin if config_only else None)
        opened.load_processor(settings).save_pretrained(stage)
        _forget_foreign_code(stage)
        for pattern in _COPIED:
            for path in opened.folder.glob(pattern):
                shutil.copyfile(path, stage / path.name)
        _write_card(opened, origin, stage, Path(target).name, tuned_on)
        if config_only:
            opened.check_weights()
        else:
            weights = opened.weight_files()  # last, as they may have to be downloaded
            copy_files([(path, stage / path.name) for path in weights], show_progress=show_progress)
    return Path(target).absolute()


def folders_of(source: CheckpointSource) -> list[Path]:
    """The folders that a checkpoint lies in, which none that is made from it may touch."""
    origin = source.origin()
    return [source.folder, *([Path(origin.name)] if origin.is_local else [])]


def _write_configuration(
    source: CheckpointSource, settings: VisualTokenPruningConfig, folder: Path, base: BaseCheckpoint | None
) -> None:
    """config.json and the remote code."""
    family = source.family
    config = source.base_without_weights(settings).config  # which fits the vision tower, then
    config.architectures = [family.classes.model.__name__]
    config.base_model = base
    config.save_pretrained(folder)


def _write_card(source: CheckpointSource, origin: BaseCheckpoint, folder: Path, name: str, tuned_on: str | None) -> None:
    """README.md: what the finished checkpoint in `folder` is, and what it is made from."""
    try:
        card = ModelCard.load(source.folder / "README.md")
    except Exception:  # there is none, or it is no card: cards are written by hand
        card = None
    base_name, base_revision = (None, None) if origin.is_local else origin
    if base_name is None and source.is_pruned and card is not None:
        base_name = card.data.get("base_model")  # the weights are still those
    made = model_card(
        folder,
        repo_id=f"{PLACEHOLDER_OWNER}/{name}",
        base_name=base_name,
        base_revision=base_revision,
        base_card=card,
        tuned_on=tuned_on,
    )
    (folder / "README.md").write_text(str(made), encoding="utf-8")


def _forget_foreign_code(folder: Path) -> None:
    """Takes names of the source's own code out of what its processor saved: that code is not copied."""
    ours = read_json(folder / "processor_config.json")["auto_map"]
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content = read_json(path)
            for part in (content, *(part for part in content.values() if isinstance(part, dict))):
                if "auto_map" in part:
                    part["auto_map"] = ours
            write_json(path, content)
