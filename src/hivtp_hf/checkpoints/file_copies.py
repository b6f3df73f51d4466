"""Copies of large files: sharing their blocks where the file system can, else byte by byte under a progress bar.

Never a hard link: whoever saves into one copy later would write into the other. Nothing is held in memory.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

_FICLONE = 0x40049409  # Linux: give a file the blocks of another one, shared until one of them is written
_CHUNK_BYTES = 16 * 2**20


def copy_files(files: Sequence[tuple[Path, Path]], *, show_progress: bool = True) -> None:
    """Copies every (source, target), following links to what they name.

    Args:
        files: targets must not exist.
        show_progress: whether a bar tells how far it is; only where bytes really are copied.

    Raises:
        OSError: where a source cannot be read or a target not be written; targets may then be half-made.
    """
    remaining = [(source, target) for source, target in files if not _share_blocks(source, target)]
    total = sum(source.stat().st_size for source, _ in remaining)
    if not remaining:
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc="Copying weights", disable=not show_progress) as progress:
        for source, target in remaining:
            with source.open("rb") as reading, target.open("xb") as writing:
                while chunk := reading.read(_CHUNK_BYTES):
                    writing.write(chunk)
                    progress.update(len(chunk))
            shutil.copymode(source, target)


def _share_blocks(source: Path, target: Path) -> bool:
    """Whether the file system let `target` share the blocks of `source`."""
    try:
        from fcntl import ioctl
    except ImportError:  # no such thing on Windows
        return False
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:
            shared = False
        else:
            shared = os.fstat(writing.fileno()).st_size == os.fstat(reading.fileno()).st_size
    if not shared:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
    return shared
