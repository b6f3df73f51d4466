"""Rows of questions: tables in folders, and by the library `datasets` what `save_to_disk` wrote and data sets on the Hub.

Only text is taken, and as it is written: "01" and "1" are two answers, and "none" is one.
"""

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ..checkpoints.repository_names import is_repository
from ..pruning.checked_values import shown

TABLES = ("questions.csv", "questions.jsonl")
COLUMNS = ("image", "question", "answer")
# The first that is there counts.
TYPE_COLUMNS = ("question_type", "type")
# What `save_to_disk` leaves beside the data of one split, and above those of several.
_SAVED = ("state.json", "dataset_dict.json")


class Row(NamedTuple):
    """One question about one image.

    Attributes:
        image: what is asked about, or a function that gives it, so that not all images need be in memory at once.
        image_name: rows of the same name are about the same image, which is then encoded once.
        question: as it is put to the model.
        answer: what counts as right.
        question_type: the kind of question; empty where the data tells none apart.
    """

    image: Image.Image | Callable[[], Image.Image]
    image_name: str
    question: str
    answer: str
    question_type: str = ""

    def open_image(self) -> Image.Image:
        """The image as transformers sees it, whole and in memory: turned as its metadata say, in RGB."""
        if isinstance(self.image, Image.Image):
            return _as_seen(self.image)
        with self.image() as image:
            return _as_seen(image)


def _as_seen(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


def numbered(index: int) -> str:
    """How messages call the row at an index."""
    return f"row {index + 1}"


def rows_of_source(source: str | Path, split: str | None = None, has_answers: bool = True) -> tuple[str, Iterator[Row]]:
    """The name of some data, and its rows in their order; images are opened when they are asked for.

    Columns are image (in a folder a path inside it, else an image of `datasets`), question, answer, and if wanted
    question_type or type.

    Args:
        source: a folder with `questions.csv` (in UTF-8, with a line of headings) or `questions.jsonl` (a JSON object a line),
            or written by `save_to_disk` of `datasets`; or a data set on the Hub, as `owner/name` or `owner/name@revision`.
        split: of data that has several.
        has_answers: whether rows must have an answer; where not, that column is not read.

    Raises:
        ValueError: for what is none of these, for missing columns and values that are no text, where the row is named, and
            where `datasets` is needed and not installed.
        OSError: for a data set on the Hub that cannot be downloaded.
    """
    folder = Path(source).expanduser()
    repository, _, revision = str(source).partition("@")
    if not folder.is_dir():
        if folder.exists() or not is_repository(repository):
            raise ValueError(
                f"`--data` is {source}, which is no folder; give one with a table {' or '.join(TABLES)} and images, or a data "
                "set on the Hub, as owner/name."
            )
        loaded = _datasets(source).load_dataset(repository, revision=revision or None, split=split)
        return repository.partition("/")[2], _rows_of_dataset(_one_split(loaded, source, split), None, has_answers)

    there = [folder / name for name in (*TABLES, *_SAVED) if (folder / name).is_file()]
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none of them"
        raise ValueError(
            f"`--data` is {folder}, which has {names}; it must have one of {', '.join(TABLES)} and what `save_to_disk` of the "
            "library `datasets` writes."
        )
    (path,) = there
    if split is not None and path.name != _SAVED[1]:
        raise ValueError(f"`--split` is {split!r}, but {folder} has no splits. Leave it out.")
    if path.name not in _SAVED:
        return folder.resolve().name, _rows_of_table(path, has_answers)
    dataset = _one_split(_datasets(source).load_from_disk(str(folder)), source, split)
    return folder.resolve().name, _rows_of_dataset(dataset, folder, has_answers)


def _datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is read by the library `datasets`, which cannot be imported: {error}. Install it with `pip install "
            '"hivtp-hf[data]"`.'
        ) from error
    return datasets


def _one_split(loaded: Any, source: str | Path, split: str | None) -> Any:
    """The split of that name, or the only one there is."""
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        raise ValueError(f"{source} has several splits, and `--split` is {split!r}; give one of {', '.join(loaded)}.")
    return loaded[split]


def _rows_of_table(path: Path, has_answers: bool) -> Iterator[Row]:
    for index, record in enumerate(_records(path)):
        if not isinstance(record, dict) or None in record:
            raise ValueError(
                f"{numbered(index)} of {path} is no JSON object, or has more fields than there are headings. Put text with "
                "commas in double quotes."
            )
        name, question, answer = _texts_of(index, record, COLUMNS, has_answers)
        image = functools.partial(Image.open, _image_path(path.parent, name, index))
        yield Row(image, name, question, answer, _type_of(index, record))


def _records(path: Path) -> Iterator[Any]:
    read = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, strict=True) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            for record in lines:
                read += 1
                yield record
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{numbered(read)} of {path} cannot be read: {error}. Write it in UTF-8, as CSV with text that has commas in "
            "double quotes, or as one JSON object a line."
        ) from error


def _rows_of_dataset(dataset: Any, folder: Path | None, has_answers: bool) -> Iterator[Row]:
    """The rows of a split. Images are told apart by their content, as they need have no names."""
    feature = dataset.features.get("image")
    if hasattr(feature, "decode"):
        dataset = dataset.cast_column("image", type(feature)(decode=False))  # files as they are, which tell images apart
    for index, record in enumerate(dataset):
        content = _image_file(folder, record, index)
        name = Path(record["image"].get("path") or "image").name if isinstance(record["image"], Mapping) else record["image"]
        question, answer = _texts_of(index, record, COLUMNS[1:], has_answers)
        image_name = f"{name} {hashlib.sha256(content).hexdigest()[:16]}"
        image = functools.partial(_image_at, dataset, folder, index)
        yield Row(image, image_name, question, answer, _type_of(index, record))


def _image_at(dataset: Any, folder: Path | None, index: int) -> Image.Image:
    return Image.open(io.BytesIO(_image_file(folder, dataset[index], index)))


def _image_file(folder: Path | None, record: Mapping[str, Any], index: int) -> bytes:
    """The bytes of the file that a row's image is."""
    value = _value_of(index, record, "image")
    content = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return content
    if folder is None or not isinstance(path, str):
        raise ValueError(
            f"{numbered(index)}: the image is {shown(value)}; it must be an image of `datasets` with its bytes, or in a "
            "folder a path inside it. Save the images in the data."
        )
    try:
        return _image_path(folder, path, index).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{numbered(index)}: the image {path!r} cannot be read: {error}. Save the images in the data."
        ) from error


def _image_path(folder: Path, name: str, index: int) -> Path:
    """Where the image of a row lies; a ValueError for a path that leaves the folder."""
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(
            f"{numbered(index)}: the image is {name!r}; it must be a path inside the folder, such as 'images/1.png'. Put the "
            "image there."
        )
    return folder / relative


def _type_of(index: int, record: Mapping[str, Any]) -> str:
    """The type of a row's question; empty where the data has none."""
    name = next((column for column in TYPE_COLUMNS if column in record), None)
    if name is None or record[name] is None:  # JSON rows without it, where others have it
        return ""
    question_type = _text_of(index, record, name)
    if not question_type.strip():
        raise ValueError(f"{numbered(index)}: {name!r} is empty. Give every row a type, or leave the column out.")
    return question_type.strip()


def _value_of(index: int, record: Mapping[str, Any], name: str) -> Any:
    """What a row has in a column; a ValueError where there is no such column."""
    if name not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise ValueError(
            f"{numbered(index)}: there is no column {name!r} (there are: {known}). A row needs {', '.join(map(repr, COLUMNS))}."
        )
    return record[name]


def _texts_of(index: int, record: Mapping[str, Any], columns: Sequence[str], has_answers: bool) -> list[str]:
    """The texts that a row has in some columns; an empty answer where none is needed."""
    return ["" if column == "answer" and not has_answers else _text_of(index, record, column) for column in columns]


def _text_of(index: int, record: Mapping[str, Any], name: str) -> str:
    """The text that a row has in a column; a ValueError where there is none."""
    value = _value_of(index, record, name)
    if not isinstance(value, str):
        raise ValueError(f"{numbered(index)}: {name!r} is {shown(value)}; it must be text. Write it in quotes.")
    return value
