"""`convert_checkpoint`: a complete pruned checkpoint of a stock one, with its weights untouched."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from ..pruning_config import VisualTokenPruningConfig
from .checkpoint_source import CheckpointSource, open_source
from .file_copies import copy_files
from .staging import staged_folder

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
    force: bool = False,
    show_progress: bool = True,
) -> Path:
    """Makes a pruned checkpoint, which loads with and without this package; its weights are those of the source, bit for bit.

    Nothing of the source is executed, and its weights are never loaded. An unfinished target never shows.

    Args:
        source: a folder or `owner/name` on the Hub: a stock checkpoint of a supported family, or a pruned one.
        target: the folder to make.
        pruning: settings to change, as `VisualTokenPruningConfig.replace` takes them: from the source's own, or from the
            defaults for a stock one.
        revision, token, cache_dir: for a source on the Hub, as for `huggingface_hub.snapshot_download`.
        force: whether an existing target is replaced.
        show_progress: whether a bar tells how far copying is.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: for settings out of range or that do not fit the source's vision tower, a source that is no checkpoint of
            a supported family, and a target that exists or touches the source.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the source cannot be downloaded, or the target not be written.
    """
    opened = open_source(source, revision=revision, token=token, cache_dir=cache_dir)
    settings = opened.settings().replace(**(pruning or {}))
    with staged_folder(Path(target), apart_from=opened.folder, force=force) as stage:
        _write_configuration(opened, settings, stage)
        processor = opened.family.processor.from_pretrained(
            opened.folder, pruning_config=settings, trust_remote_code=False, local_files_only=True
        )
        processor.save_pretrained(stage)
        _forget_foreign_code(stage, opened.family.processor)
        for pattern in _COPIED:
            for path in opened.folder.glob(pattern):
                shutil.copyfile(path, stage / path.name)
        weights = opened.weight_files()  # last, as they may have to be downloaded
        copy_files([(opened.folder / name, stage / name) for name in weights], show_progress=show_progress)
    return Path(target).absolute()


def _write_configuration(source: CheckpointSource, settings: VisualTokenPruningConfig, folder: Path) -> None:
    """config.json and all code that travels."""
    family = source.family
    config = family.config.from_pretrained(source.folder, pruning_config=settings, local_files_only=True)
    config.architectures = [family.model.__name__]
    _check_that_it_fits(config, family)
    config.save_pretrained(folder)
    for part in (family.model, family.processor):
        custom_object_save(part, folder)


def _check_that_it_fits(config: Any, family: Any) -> None:
    """A ValueError where the settings do not fit the vision tower: asked of a model without weights."""
    with torch.device("meta"):
        family.base_model(config)


def _forget_foreign_code(folder: Path, processor_class: type) -> None:
    """Takes names of the source's own code out of what its processor saved: that code is not copied."""
    module = processor_class.__module__.rpartition(".")[2]
    ours = {"AutoProcessor": f"{module}.{processor_class.__name__}"}
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            for part in (content, *(part for part in content.values() if isinstance(part, dict))):
                if "auto_map" in part:
                    part["auto_map"] = ours
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
