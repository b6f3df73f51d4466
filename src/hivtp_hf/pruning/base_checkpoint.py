"""The base of a checkpoint without weights: another checkpoint, at one commit, which has them."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.utils import cached_file

from .checked_values import shown
from .compat import commit_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Arguments of from_pretrained that say where and how to look, not what for.
ACCESS = ("cache_dir", "proxies", "token", "local_files_only")


class BaseCheckpoint(NamedTuple):
    """The checkpoint that has the weights: at one commit on the Hub, or in a folder of this machine.

    Attributes:
        name: `owner/name` on the Hub, or the absolute path of a folder.
        revision: the commit's hash, 40 hexadecimal digits; None for a folder.
    """

    name: str
    revision: str | None

    @classmethod
    def coerce(cls, value: Any) -> "BaseCheckpoint | None":
        """`value` as a base: None, a dict with "name" and "revision", or what has such a `to_dict`.

        Raises:
            ValueError: for anything else, for a repository without the hash of a commit and for a folder with one.
        """
        if value is None:
            return None
        given = value.to_dict() if hasattr(value, "to_dict") else value
        if isinstance(given, Mapping) and set(given) == {"name", "revision"}:
            name, revision = given["name"], given["revision"]
            if isinstance(name, str) and os.path.isabs(name) and revision is None:
                return cls(name, None)
            is_commit = isinstance(revision, str) and _COMMIT.fullmatch(revision)
            if isinstance(name, str) and _REPOSITORY.fullmatch(name) and is_commit:
                return cls(name, revision)
        raise ValueError(
            f"`base_model` is {shown(given)}; it must be {{'name': 'owner/name', 'revision': <a commit's hash, 40 hexadecimal "
            "digits>}, or {'name': <absolute path of a folder>, 'revision': None}. `from_base_model` finds the commit itself."
        )

    @classmethod
    def locate(cls, name: str | os.PathLike, *, revision: str | None = None, **access: Any) -> "BaseCheckpoint":
        """The base of this name, at the commit that `revision` means now.

        Args:
            name: a folder, or a repository on the Hub.
            revision: a branch, tag or commit; None is the main branch.
            access: `cache_dir`, `proxies`, `token`, `local_files_only` as for `from_pretrained`.

        Raises:
            ValueError: for a revision of a folder, and for a repository without config.json.
            OSError: where the repository cannot be read.
        """
        if os.path.isdir(name):
            if revision is not None:
                raise ValueError(f"`revision` is {revision!r}, but {name} is a folder, which has none. Leave it out.")
            return cls(os.path.abspath(name), None)
        path = cached_file(str(name), "config.json", revision=revision, **access)
        commit = None if path is None else commit_of(path)
        if commit is None:
            raise ValueError(f"{name} has no config.json; give a checkpoint with all of its files.")
        return cls(str(name), commit)

    def folder(self, **access: Any) -> str:
        """The folder where its config.json lies, downloaded by then; `access` as for `locate`.

        Raises:
            ValueError: where there is no config.json.
            OSError: where it cannot be read.
        """
        path = cached_file(self.name, "config.json", revision=self.revision, **access)
        if path is None or not os.path.isfile(path):
            raise ValueError(f"{self} has no config.json; give a checkpoint with all of its files.")
        return os.path.dirname(path)

    @property
    def is_local(self) -> bool:
        return self.revision is None

    def to_dict(self) -> dict[str, str | None]:
        return self._asdict()

    def check_published(self) -> None:
        """A ValueError if others cannot reach it."""
        if self.is_local:
            raise ValueError(
                f"the base of this checkpoint is {self.name}, a folder of this machine, which nobody else can load. Name a "
                "base on the Hub, or make a complete checkpoint with `hivtp convert` and push that."
            )

    def __str__(self) -> str:
        return self.name if self.is_local else f"{self.name} at commit {self.revision}"
