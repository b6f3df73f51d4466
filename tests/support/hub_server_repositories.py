"""Repositories as the Hugging Face Hub keeps them, in memory: what `hub_server` serves over HTTP.

A file's hash is git's own, as the client compares it (an LFS file is the blob of its pointer). A commit's hash is made of what
the commit holds, so that the same pushes give the same hashes in every run.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Of what the Hub's .gitattributes names: the kinds of files that checkpoints and data sets have.
_LFS_SUFFIXES = (".bin", ".model", ".parquet", ".pt", ".safetensors")
_LARGEST_OF_GIT = 10 * 2**20  # bytes
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES).encode()


def goes_through_lfs(path: str, size: int) -> bool:
    """Whether the Hub wants a file as an LFS object."""
    return size > 0 and (size > _LARGEST_OF_GIT or path.endswith(_LFS_SUFFIXES))


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def oid_of(path: str, content: bytes) -> str:
    """git's hash of a file, or of the pointer that git stores in its place."""
    if goes_through_lfs(path, len(content)):
        content = pointer_to(content)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_to(content: bytes) -> bytes:
    lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(content)}\nsize {len(content)}\n"
    return lines.encode()


@dataclass(frozen=True)
class Commit:
    """One commit: a title, a message and all files as they are from then on."""

    oid: str
    parent: str | None
    title: str
    message: str
    files: dict[str, bytes] = field(repr=False)


@dataclass
class Repository:
    """One repository with its history, its references and its large objects."""

    repo_id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)  # LFS, by sha256
    pull_requests: list[str] = field(default_factory=list)  # whose; the first is at refs/pr/1

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[-2]

    def ref_of(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request, if there is one of that name."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, reference, hash or unambiguous start of a hash stands for."""
        if ref := self.ref_of(revision):
            return self.history[self.refs[ref]]
        if not re.fullmatch("[0-9a-f]{5,40}", revision):
            return None
        found = [commit for oid, commit in self.history.items() if oid.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def log(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, the newest first."""
        commits = []
        commit = self.find(revision)
        while commit:
            commits.append(commit)
            commit = self.history[commit.parent] if commit.parent else None
        return commits

    def commit(
        self, ref: str, changes: Mapping[str, bytes | None], title: str, message: str = "", base: str | None = None
    ) -> Commit:
        """Put a commit on `ref`, which need not exist if `base` says what comes before; `None` deletes a file."""
        parent = base or self.refs.get(ref)
        files = dict(self.history[parent].files) if parent else {}
        for path, content in changes.items():
            if content is None:
                del files[path]
                continue
            files[path] = content
            if goes_through_lfs(path, len(content)):
                self.objects[sha256_of(content)] = content
        files = dict(sorted(files.items()))
        held = [parent, title, message, {path: oid_of(path, content) for path, content in files.items()}]
        commit = Commit(hashlib.sha1(json.dumps(held).encode()).hexdigest(), parent, title, message, files)
        self.history[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit
