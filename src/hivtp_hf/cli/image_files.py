"""Images that commands read, and the files they write beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_image(path: Path, undone: str) -> Any:
    """The image as transformers sees it, whole and in memory.

    Args:
        path: of the file.
        undone: what the command has not done, as in "drawn".

    Raises:
        ValueError: for a file that is no image; names it.
    """
    from PIL import Image, ImageOps  # needed for images alone

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise whatever they meet in a broken file
        raise ValueError(f"{path} cannot be read as an image: {error}. Nothing was {undone}.") from None


def check_targets(folder: Path, targets: Mapping[Path, str], images: Sequence[Path], force: bool) -> None:
    """A ValueError where a file that is to be written would take the place of another.

    Args:
        folder: that the command writes into.
        targets: the files, and what each is, as in "the figure of cat.png".
        images: that are read and must stay.
        force: whether other files may be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` is {folder}, which is no folder; give another one.")
    for target, what in targets.items():
        if target.exists() and any(target.samefile(image) for image in images):
            raise ValueError(f"{what} would replace the image {target}; give another `--output`.")
        if target.exists() and (target.is_dir() or not force):
            advice = "give another `--output`" + ("" if target.is_dir() else ", or `--force` to replace it")
            raise ValueError(f"{target} exists already; {advice}.")
