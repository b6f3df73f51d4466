"""Repositories as the Hugging Face Hub keeps them, in memory: what `hub_server` serves over HTTP.

Hashes are git's own (blobs, trees, commits; an LFS file is the blob of its pointer) over a clock that ticks once per
commit, so that the same pushes give the same hashes in every run.
"""

import fnmatch
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property

_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
_LFS = "filter=lfs diff=lfs merge=lfs -text"
_LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot "
    "*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz "
    "*.zip *.zst *tfevents*"
)
# What the Hub puts into every new model repository.
DEFAULT_GITATTRIBUTES = "".join(f"{pattern} {_LFS}\n" for pattern in _LFS_PATTERNS.split()).encode()


def git_hash(kind: str, body: bytes) -> str:
    """The hash git gives an object: 40 hexadecimal digits."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(body)) + body).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    content: bytes = field(repr=False)
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores in place of an LFS file."""
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return lines.encode()

    @cached_property
    def oid(self) -> str:
        return git_hash("blob", self.pointer if self.lfs else self.content)


def tree_hashes(files: Mapping[str, Blob]) -> dict[str, str]:
    """The hash of every folder of a commit, by path; the root's path is empty."""
    folders: dict[str, dict[str, Blob | None]] = {"": {}}
    for path, file in files.items():
        parent, _, name = path.rpartition("/")
        folders.setdefault(parent, {})[name] = file
        while parent:
            grandparent, _, name = parent.rpartition("/")
            folders.setdefault(grandparent, {})[name] = None
            parent = grandparent
    hashes: dict[str, str] = {}
    for folder in sorted(folders, key=lambda path: (-path.count("/"), path == "")):  # the deepest first, the root last
        entries = []
        for name, blob in folders[folder].items():  # a folder in it has no blob
            oid = blob.oid if blob else hashes[f"{folder}/{name}" if folder else name]
            entry = f"{'100644' if blob else '40000'} {name}\0".encode() + bytes.fromhex(oid)
            entries.append(((name if blob else f"{name}/").encode(), entry))
        hashes[folder] = git_hash("tree", b"".join(entry for _, entry in sorted(entries)))
    return hashes


@dataclass(frozen=True)
class Commit:
    """One commit: a title, a message, an author and all files as they are from then on."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: dict[str, Blob] = field(repr=False)


@dataclass
class Discussion:
    """A discussion, or a pull request where `base` is the commit that it starts from."""

    num: int
    title: str
    description: str
    author: str
    created: datetime
    base: str | None = None
    status: str = "open"
    merge_commit: str | None = None


class ParentMoved(Exception):
    """Somebody committed since the commit that the client knows."""


class MissingPath(Exception):
    """There is nothing to delete at this path."""


@dataclass
class Repository:
    """One repository with its history, its references and its large objects."""

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict, repr=False)  # LFS, by sha256
    granted: set[str] = field(default_factory=set)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.repo_id.rpartition("/")[0]

    @property
    def now(self) -> datetime:
        return _EPOCH + timedelta(seconds=len(self.history))

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
        self, ref: str, changes: Mapping[str, Blob | None], title: str, message: str = "", author: str = "", base: str = ""
    ) -> Commit:
        """Put a commit on `ref`, which need not exist if `base` says what comes before; `None` deletes a file or folder."""
        parent = base or self.refs.get(ref)
        files = dict(self.history[parent].files) if parent else {}
        for path, blob in changes.items():
            if blob:
                files[path] = blob
                continue
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise MissingPath(path)
            for name in gone:
                del files[name]
        files = dict(sorted(files.items()))
        date, author = self.now, author or self.namespace
        person = f"{author} <{author}@users.noreply.huggingface.co> {int(date.timestamp())} +0000"
        header = [f"tree {tree_hashes(files)['']}", *([f"parent {parent}"] if parent else [])]
        header += [f"author {person}", f"committer {person}"]
        text = f"{title}\n\n{message}" if message else title
        oid = git_hash("commit", ("\n".join(header) + f"\n\n{text}\n").encode())
        commit = Commit(oid, parent, title, message, author, date, files)
        self.history[oid] = commit
        self.refs[ref] = oid
        return commit

    def open_discussion(self, title: str, description: str, author: str, base: str | None = None) -> Discussion:
        """Open a discussion, or with `base` a pull request whose reference stands at that commit."""
        opened = Discussion(len(self.discussions) + 1, title, description, author, self.now, base)
        self.discussions.append(opened)
        if base:
            self.refs[f"refs/pr/{opened.num}"] = base
        return opened

    def merge(self, request: Discussion, author: str) -> Commit:
        """Put what a pull request changes on the main branch."""
        before = self.history[request.base or ""].files
        after = self.history[self.refs[f"refs/pr/{request.num}"]].files
        changes: dict[str, Blob | None] = {path: None for path in before if path not in after}
        changes |= {path: blob for path, blob in after.items() if before.get(path) != blob}
        merged = self.commit("refs/heads/main", changes, f"{request.title} (#{request.num})", author=author)
        request.status, request.merge_commit = "merged", merged.oid
        return merged


def goes_through_lfs(path: str, size: int, gitattributes: bytes, threshold: int) -> bool:
    """Whether the Hub wants a file as an LFS object: .gitattributes says so, or it is larger than `threshold`."""
    return bool(size) and (size > threshold or tracked_by_lfs(path, gitattributes))


def tracked_by_lfs(path: str, gitattributes: bytes) -> bool:
    """Whether .gitattributes names a path; the last line that speaks of it decides."""
    tracked = False
    for line in gitattributes.decode().splitlines():
        pattern, *attributes = line.split() or [""]
        if not pattern.startswith("#") and _matches(path, pattern):
            for attribute in attributes:
                if attribute.lstrip("-!").split("=")[0] == "filter":
                    tracked = attribute == "filter=lfs"
    return tracked


def track_by_lfs(paths: list[str], gitattributes: bytes) -> bytes:
    """.gitattributes with a line for every path that it does not name yet, as the Hub adds them."""
    added = [f"{path} {_LFS}\n" for path in paths if not tracked_by_lfs(path, gitattributes)]
    return gitattributes + "".join(added).encode()


def ignored(path: str, gitignore: str) -> bool:
    """Whether .gitignore names a path or a folder above it: plain patterns, `!` and comments."""
    parts = path.split("/")
    ignoring = False
    for line in filter(None, map(str.strip, gitignore.splitlines())):
        pattern = line.lstrip("!").strip("/")
        if line.startswith("#"):
            continue
        if any(_matches("/".join(parts[: length + 1]), pattern) for length in range(len(parts))):
            ignoring = not line.startswith("!")
    return ignoring


def _matches(path: str, pattern: str) -> bool:
    subject = path if "/" in pattern else path.rpartition("/")[2]
    return fnmatch.fnmatchcase(subject, pattern.replace("**/", ""))
