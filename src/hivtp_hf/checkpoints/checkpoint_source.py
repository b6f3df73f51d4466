"""A checkpoint to start from: a folder, or a repository on the Hub, of a family that can be pruned."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download

from .. import Family, family_of_model_type
from ..base_checkpoint import BaseCheckpoint
from ..files import read_json
from ..pruning_config import VisualTokenPruningConfig
from ..weightless_checkpoint import WEIGHT_FILES, WEIGHT_NAMES, WeightlessCheckpoint, weights_beside_base
from .hub_refusals import explained_refusals

# What a checkpoint is made of. Code is not among it: ours comes from the package, and no other is run or copied.
_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]


class CheckpointSource(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        name: as it was given.
        folder: where its files lie.
        family: the classes that it belongs to.
        config: its config.json.
        repository: where it comes from, if it lies on the Hub. Weights come when they are asked for.
        base: the checkpoint that has its weights, where it has none itself.
        access: `token` and `cache_dir`, as they were given.
    """

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]
    repository: "_Repository | None"
    base: BaseCheckpoint | None
    access: dict[str, Any]

    @property
    def is_pruned(self) -> bool:
        """Whether it is of our model type, and so loads into our classes by itself."""
        return self.config["model_type"] == self.family.config.model_type

    def settings(self) -> VisualTokenPruningConfig:
        """The pruning settings that it names, as a stock checkpoint may too, or the defaults: those it would be loaded with."""
        return VisualTokenPruningConfig.coerce(self.config.get("pruning_config"))

    def load_config(self, settings: Any) -> Any:
        """Its configuration in our class, with these pruning settings."""
        return self.family.config.from_pretrained(self.folder, pruning_config=settings, local_files_only=True)

    def base_without_weights(self, settings: Any) -> Any:
        """Its base model, without memory for weights: for asking what it can do. A ValueError for settings that do not fit."""
        with torch.device("meta"):
            return self.family.base_model(self.load_config(settings))

    def load_processor(self, settings: Any) -> Any:
        """Its processor, with these pruning settings."""
        return self.family.processor.from_pretrained(
            self.folder, pruning_config=settings, trust_remote_code=False, local_files_only=True
        )

    def load_model(self, settings: Any, **options: Any) -> Any:
        """Its model with a head and these pruning settings. Weights are downloaded by then, its base's if it has none.

        Args:
            settings: for pruning.
            **options: of from_pretrained, such as `dtype` and what `placing` returns.
        """
        self.weight_files()
        options = {"dtype": "auto", "cache_dir": self.access["cache_dir"], "local_files_only": True, **options}
        return self.family.model.from_pretrained(self.folder, pruning_config=settings, **options)

    def origin(self) -> BaseCheckpoint:
        """The checkpoint that has its weights: its base, or else itself, at the commit that was opened."""
        if self.base is not None:
            return self.base
        if self.repository is not None:
            return BaseCheckpoint(self.repository.name, self.repository.revision)
        return BaseCheckpoint(str(self.folder.absolute()), None)

    def check_weights(self) -> None:
        """A ValueError where there are no weights, asked without downloading any."""
        if self.base is not None:
            self._opened(self.base).check_weights()
        elif self.repository is None:
            self.weight_files()
        elif self.repository.file_names().isdisjoint(WEIGHT_NAMES):
            raise self._no_weights()

    def weight_files(self) -> list[Path]:
        """The files that hold its weights or those of its base, index first where there is one; downloaded by then.

        Raises:
            ValueError: where there are none, where a shard that the index names is missing, and for names that lead
                out of the folder.
            OSError, huggingface_hub.errors.HfHubHTTPError: where they cannot be downloaded.
        """
        if self.base is not None:
            return self._opened(self.base).weight_files()
        for name in WEIGHT_FILES:
            index = self.folder / f"{name}.index.json"
            shards = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else [name]
            outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
            if not outside and self.repository is not None:
                self.repository.download(shards)
            missing = outside or [shard for shard in shards if not (self.folder / shard).is_file()]
            if index.exists() and missing:
                raise ValueError(f"{index} names the shard {missing[0]!r}, which is no file beside it. Get all files.")
            if not missing:
                return [self.folder / part for part in ([index.name, *shards] if index.exists() else shards)]
        raise self._no_weights()

    def _opened(self, base: BaseCheckpoint) -> "CheckpointSource":
        if not self._file_names().isdisjoint(WEIGHT_NAMES):
            raise weights_beside_base(self.name, base)
        WeightlessCheckpoint(self.name, str(self.folder), base, None).check_base(self.family.config, self.access)
        return open_source(base.name, revision=base.revision, **self.access)

    def _file_names(self) -> set[str]:
        if self.repository is None:
            return {path.name for path in self.folder.iterdir()}
        try:
            return self.repository.file_names()
        except OSError:  # without a connection, what was downloaded is all that is known
            return set()

    def _no_weights(self) -> ValueError:
        return ValueError(
            f"{self.name} has no weights: one of {', '.join(WEIGHT_FILES)} or its index is needed. Get all files."
        )


class _Repository(NamedTuple):
    """A repository on the Hub at a revision."""

    name: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None

    def download(self, patterns: list[str]) -> Path:
        """The folder with the files that match."""
        with explained_refusals(self.name):
            folder = snapshot_download(
                self.name, revision=self.revision, allow_patterns=patterns, token=self.token, cache_dir=self.cache_dir
            )
        return Path(folder)

    def file_names(self) -> set[str]:
        """The names of all files."""
        with explained_refusals(self.name):
            return set(HfApi(token=self.token).list_repo_files(self.name, revision=self.revision))


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
    repository: _Repository | None = None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but {name} is a folder, which has none. Leave it out.")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{name} is no folder, and no repository on the Hub (owner/name). Check the path.")
    else:
        repository = _Repository(name, revision, token, cache_dir)
        folder = repository.download(_FILES)
        # What follows is taken of the same commit, after which the folder is called.
        repository = repository._replace(revision=folder.name)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{name} has no config.json; give a checkpoint with all of its files.")
    config = read_json(path)
    family = family_of_model_type(config.get("model_type"), name)
    base = BaseCheckpoint.coerce(config.get("base_model"))
    access = {"token": token, "cache_dir": cache_dir}
    return CheckpointSource(name, folder, family, config, repository, base, access)
