"""The files of a folder that are pushed: those that lie in it, and nothing that a link would bring in from elsewhere."""

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

# What a file of the repository is made of: a file on disk, or bytes that differ from it.
Content = Path | bytes


def files_of_folder(folder: Path) -> dict[str, Path]:
    """All regular files below `folder`, by their path in it.

    Left out is what is hidden (a name that begins with a dot) and Python's cache. Links are never followed to another place:
    one to a file that is pushed itself gives that file's content under its own name too, one to a folder of such files
    nothing, as they are pushed already.

    Raises:
        ValueError: for a link that leads out of the folder, to what is not pushed or to nothing, and for what is neither file
            nor folder.
        OSError: where it cannot be read.
    """
    root = Path(os.path.realpath(folder))
    files = {}
    for path in _walked(root):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            _check_link(path, root)
            if path.is_dir():
                continue
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is neither a file nor a folder, and cannot be pushed. Take it out of the folder.")
        files[name] = path
    return files


def check_no_token(files: Mapping[str, Content], large: list[str], token: str) -> None:
    """A ValueError that names the file in which `token` stands, or whose name has it.

    Args:
        files: what is to be pushed.
        large: the names of those that hold weights, and no text.
        token: what must not get out.
    """
    secret = token.encode()
    for name, content in files.items():
        if token in name:
            raise ValueError("The token that is in use stands in the name of a file that would be pushed. Rename the file.")
        if name not in large and _holds(content, secret):
            raise ValueError(f"{name} holds the token that is in use, which must not be published. Take it out of the file.")


def _walked(root: Path) -> Iterator[Path]:
    """Everything in a folder that is not hidden, without folders that are no links: what these hold comes by itself."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(root, onerror=fail, followlinks=False):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in sorted([*links, *names]) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _check_link(path: Path, root: Path) -> None:
    target = Path(os.path.realpath(path))
    if target != root and root not in target.parents:
        raise ValueError(f"{path} is a link that leads out of the folder. Put the file itself there, or take the link away.")
    if not target.exists() or any(map(_is_hidden, target.relative_to(root).parts)):
        raise ValueError(f"{path} is a link to what is not pushed. Put the file itself there, or take the link away.")


def _holds(content: Content, secret: bytes) -> bool:
    if isinstance(content, bytes):
        return secret in content
    if not content.stat().st_size:  # nothing to map
        return False
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(secret) >= 0
