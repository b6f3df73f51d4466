"""A checkpoint to start from: a folder, or a repository on the Hub, of a family that can be pruned."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .. import Family, family_of_model_type
from ..pruning_config import VisualTokenPruningConfig

# What a checkpoint is made of. Code is not among it: ours comes from the package, and no other is run or copied.
_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class CheckpointSource(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        name: as it was given.
        folder: where its files lie.
        family: the classes that it belongs to.
        config: its config.json.
        download: brings files of it by their names, where it lies on the Hub. Weights come when they are asked for.
    """

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]
    download: Callable[[list[str]], Path] | None

    @property
    def is_pruned(self) -> bool:
        """Whether it names pruning settings already."""
        return self.config["model_type"] == self.family.config.model_type

    def settings(self) -> VisualTokenPruningConfig:
        """Its pruning settings: those that it names, or the defaults of a stock checkpoint."""
        return VisualTokenPruningConfig.coerce(self.config.get("pruning_config") if self.is_pruned else None)

    def weight_files(self) -> list[str]:
        """The names of the files that hold its weights, index first where there is one; downloaded by then.

        Raises:
            ValueError: where there are none, where a shard that the index names is missing, and for names that lead
                out of the folder.
            OSError, huggingface_hub.errors.HfHubHTTPError: where they cannot be downloaded.
        """
        for name in _WEIGHTS:
            index = self.folder / f"{name}.index.json"
            shards = sorted(set(_read_json(index).get("weight_map", {}).values())) if index.exists() else [name]
            outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
            if not outside and self.download is not None:
                self.download(shards)
            missing = outside or [shard for shard in shards if not (self.folder / shard).is_file()]
            if index.exists() and missing:
                raise ValueError(f"{index} names the shard {missing[0]!r}, which is no file beside it. Get all files.")
            if not missing:
                return [index.name, *shards] if index.exists() else shards
        raise ValueError(f"{self.name} has no weights: one of {', '.join(_WEIGHTS)} or its index is needed. Get all files.")


def open_source(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> CheckpointSource:
    """The checkpoint called `name`, downloaded without its weights where it is no folder. Nothing of it is executed.

    Args:
        name: a folder, or `owner/name` on the Hub.
        revision: a branch, tag or commit on the Hub.
        token, cache_dir: as for `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: for what is neither, for a folder without config.json, and for a family that cannot be pruned.
        OSError, huggingface_hub.errors.HfHubHTTPError: where it cannot be downloaded.
    """
    download: Callable[..., Path] | None = None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but {name} is a folder, which has none. Leave it out.")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{name} is no folder, and no repository on the Hub (owner/name). Check the path.")
    else:
        download = functools.partial(_download, name, token=token, cache_dir=cache_dir)
        folder = download(_FILES, revision=revision)
        # What follows is taken of the same commit, after which the folder is called.
        download = functools.partial(download, revision=folder.name)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{name} has no config.json; give a checkpoint with all of its files.")
    config = _read_json(path)
    return CheckpointSource(name, folder, family_of_model_type(config.get("model_type"), name), config, download)


def _download(name: str, patterns: list[str], **arguments: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **arguments))
    except HfHubHTTPError:
        raise
    except HTTPError as error:  # the connection broke and the client gave up; its errors are no OSErrors
        raise OSError(f"{name} could not be downloaded: {error}. Try again; what has arrived is kept.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}. Get the file again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Get the file again.")
    return content
