"""A pruned checkpoint in a folder, found to be whole before anything of it is pushed. Nothing of it is executed."""

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers.dynamic_module_utils import get_relative_imports

from ..families import family_of_model_type
from ..files import read_json
from ..pruning.base_checkpoint import BaseCheckpoint
from ..pruning.settings import VisualTokenPruningConfig
from .checkpoint_source import open_source
from .pushed_files import Content, files_of_folder

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json", "adapter_model.bin")
# What `trust_remote_code` needs to be told, by the file that says it.
_NEEDED_CLASSES = {
    "config.json": ("AutoConfig", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
_CODE_NAMING_FILES = (*_NEEDED_CLASSES, "preprocessor_config.json", "tokenizer_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_AGAIN = "Make the checkpoint again with `hivtp convert`, or save model and processor into one folder with `save_pretrained`."


class LocalCheckpoint(NamedTuple):
    """A whole pruned checkpoint.

    Attributes:
        folder: where it lies.
        files: what is to be pushed, by path.
        config: its config.json.
        weights: the names of the files with its weights, an index first; none where a base has them.
        base: the checkpoint on the Hub that has its weights, or None.
    """

    folder: Path
    files: dict[str, Content]
    config: dict[str, Any]
    weights: list[str]
    base: BaseCheckpoint | None


def open_local_checkpoint(folder: Path) -> LocalCheckpoint:
    """The checkpoint in `folder`, if it is one that loads from the Hub with `trust_remote_code` alone.

    Raises:
        ValueError: for what is no folder, a stock checkpoint, a base that is a folder of this machine, missing files of any
            kind, settings that differ between model and processor, and links as in `files_of_folder`.
        OSError: where it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the folder of a pruned checkpoint, as `hivtp convert` makes it.")
    files = files_of_folder(folder)
    config = _json_of(files, "config.json")
    family = family_of_model_type(config.get("model_type"), str(folder))
    if config["model_type"] != family.classes.config.model_type:
        raise ValueError(
            f"{folder} is a stock checkpoint ({config['model_type']}), which prunes nothing. Make a pruned one of it with "
            "`hivtp convert`, and push that."
        )
    base, weights = _base_or_weights(folder, files, config)
    _check_settings(files, config)
    _check_tokenizer_and_images(files)
    _check_code(files)
    return LocalCheckpoint(folder, dict(files), config, weights, base)


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights that would be loaded, or says where these are."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def _base_or_weights(
    folder: Path, files: Mapping[str, Path], config: Mapping[str, Any]
) -> tuple[BaseCheckpoint | None, list[str]]:
    base = BaseCheckpoint.coerce(config.get("base_model"))
    if base is None:
        weights = [Path(path).name for path in open_source(str(folder)).weight_files()]
        for name in weights:
            _path_of(files, name)
        return None, weights
    base.check_published()
    present = [name for name in files if is_weight_file(name)]
    if present:
        raise ValueError(
            f"{folder} has weights ({present[0]}), but its config.json says that they are those of {base}. Take one of the "
            "two away: the file, or `base_model` in config.json."
        )
    return base, []


def _check_settings(files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """A ValueError where the processor would count other tokens than the model keeps."""
    named = (config.get("pruning_config"), _json_of(files, "processor_config.json").get("pruning_config"))
    of_model, of_processor = map(VisualTokenPruningConfig.coerce, named)
    if of_model != of_processor:
        raise ValueError(
            f"config.json and processor_config.json have different pruning settings: {of_model.to_dict()} and "
            f"{of_processor.to_dict()}. Save model and processor with the same `pruning_config`."
        )


def _check_tokenizer_and_images(files: Mapping[str, Path]) -> None:
    _path_of(files, "tokenizer_config.json")
    if not any(name in files for name in _VOCABULARIES):
        raise ValueError(f"The folder has no tokenizer: one of {', '.join(_VOCABULARIES)} is needed. {_AGAIN}")
    if "preprocessor_config.json" not in files and "image_processor" not in _json_of(files, "processor_config.json"):
        raise ValueError(f"The folder has no settings for images: preprocessor_config.json is needed. {_AGAIN}")


def _check_code(files: Mapping[str, Path]) -> None:
    """A ValueError where code that the checkpoint names is not in it; it is read as text."""
    waiting = []
    for name in (name for name in _CODE_NAMING_FILES if name in files):
        content = _json_of(files, name)
        for needed in _NEEDED_CLASSES.get(name, ()):
            if needed not in _auto_map_of(content):
                raise ValueError(f"{name} does not say in `auto_map` which class {needed} is to take. {_AGAIN}")
        for reference in _named_classes(content):
            if "--" in reference:
                raise ValueError(f"{name} takes the code of {reference} from another repository. {_AGAIN}")
            waiting.append(f"{reference.rpartition('.')[0].replace('.', '/')}.py")
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            imported = get_relative_imports(_path_of(files, name))
            waiting += [f"{module.replace('.', '/')}.py" for module in imported]


def _named_classes(content: Mapping[str, Any]) -> Iterator[str]:
    """Every class that an `auto_map` names: the content's own, and those of a processor's parts."""
    for part in (content, *(part for part in content.values() if isinstance(part, dict))):
        for references in _auto_map_of(part).values():
            for reference in references if isinstance(references, list) else [references]:
                if isinstance(reference, str):  # of two tokenizers one may be None
                    yield reference


def _auto_map_of(content: Mapping[str, Any]) -> dict[str, Any]:
    named = content.get("auto_map")
    return named if isinstance(named, dict) else {}


def _json_of(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json(_path_of(files, name), _AGAIN)


def _path_of(files: Mapping[str, Path], name: str) -> Path:
    if name not in files:
        raise ValueError(f"The folder has no {name}, without which its checkpoint does not load. {_AGAIN}")
    return files[name]
