"""Files and folders that appear whole or not at all; and JSON, read with an error that names the file."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file of the same name elsewhere in the folder, and puts it at `path` once it is done."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        unfinished = Path(folder, path.name)
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def read_json(path: Path, advice: str = "Get the file again.") -> dict[str, Any]:
    """The object that a file holds; a ValueError with the advice where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}. {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. {advice}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object, for people to read as well."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def checked_target(target: Path, *, apart_from: Iterable[Path] = (), force: bool = False) -> Path:
    """The absolute path of a folder that is to be made; arguments and errors as those of `staged_folder`."""
    target = target.absolute()
    for folder in apart_from:
        ours, theirs = target.resolve(), folder.resolve()
        if ours == theirs or theirs in ours.parents or ours in theirs.parents:
            raise ValueError(f"{target} and {folder} lie in each other; give a target outside the source.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} exists and is no folder; give another target.")
    if target.exists() and not force:
        raise ValueError(f"{target} exists already; give another target, or `--force` (force=True) to replace it.")
    return target


@contextlib.contextmanager
def staged_folder(target: Path, *, apart_from: Iterable[Path] = (), force: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` if the block ends well, and vanishes if it does not.

    Args:
        target: what the folder is to be called; made beside it, so that the last step is a renaming.
        apart_from: folders that must stay as they are: `target` may neither be one nor lie in one, nor one in `target`.
        force: whether an existing `target` is replaced. It stays until the new one stands.

    Raises:
        ValueError: for a `target` that exists, unless `force`; that is a file; or that touches `apart_from`.
    """
    target = checked_target(target, apart_from=apart_from, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        yield stage
        stage.chmod(0o777 & ~_current_umask())  # temporary folders are private
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
            target.rename(replaced / target.name)
            try:
                stage.rename(target)
            except BaseException:
                (replaced / target.name).rename(target)
                raise
            finally:
                shutil.rmtree(replaced)
        else:
            stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
