"""Rows from a folder that the library `datasets` has written with `save_to_disk`. It is asked for only then."""

import functools
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..checked_values import shown
from .evaluation_data import numbered
from .question_tables import COLUMNS, image_path, text_of, type_of, value_of
from .rows import Row

# What `save_to_disk` leaves beside the data of one split, and above those of several.
_SPLIT, _SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` has written this folder, be it one split or several."""
    return (folder / _SPLIT).is_file() or (folder / _SPLITS).is_file()


def rows_of_dataset(folder: Path) -> Iterator[Row]:
    """The rows of a split, in their order; its columns are those of a table, its images lie in the data or in the folder.

    Images are told apart by their content, as they need have no names.

    Raises:
        ValueError: for several splits, where `datasets` is not installed, and as for a table.
    """
    if not (folder / _SPLIT).is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if (path / _SPLIT).is_file()))
        raise ValueError(f"{folder} has several splits. Give the folder of one of them: {splits}.")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{folder} was written by the library `datasets`, which cannot be imported: {error}. Install it with `pip install "
            "datasets`, or write a table questions.csv beside images."
        ) from error
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))  # files as they are, which tell images apart
    for index in range(len(dataset)):
        record = dataset[index]
        content = _image_file(folder, record, index)
        name = Path(record["image"].get("path") or "image").name if isinstance(record["image"], Mapping) else record["image"]
        text = {column: text_of(index, record, column) for column in COLUMNS[1:]}
        yield Row(
            functools.partial(_image_at, dataset, folder, index),
            f"{name} {hashlib.sha256(content).hexdigest()[:16]}",
            text["question"],
            text["answer"],
            type_of(index, record),
        )


def _image_at(dataset: Any, folder: Path, index: int) -> Image.Image:
    return Image.open(io.BytesIO(_image_file(folder, dataset[index], index)))


def _image_file(folder: Path, record: Mapping[str, Any], index: int) -> bytes:
    """The bytes of the file that a row's image is."""
    value = value_of(index, record, "image")
    content = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return content
    if not isinstance(path, str):
        raise ValueError(
            f"{numbered(index)}: the image is {shown(value)}; it must be an image of `datasets` with its bytes, or a path "
            "inside the folder. Save the images in the data."
        )
    try:
        return image_path(folder, path, index).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{numbered(index)}: the image {path!r} cannot be read: {error}. Save the images in the data."
        ) from error
