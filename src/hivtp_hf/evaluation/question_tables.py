"""Rows from a folder: a table `questions.csv` or `questions.jsonl` beside images."""

import csv
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..checked_values import shown
from .evaluation_data import numbered
from .rows import Row

TABLES = ("questions.csv", "questions.jsonl")
COLUMNS = ("image", "question", "answer")
# The first that is there counts.
TYPE_COLUMNS = ("question_type", "type")


def rows_of_table(path: Path) -> Iterator[Row]:
    """The rows of a table, in their order. Images are not opened yet.

    Args:
        path: of a CSV file with a line of headings, or of a file with a JSON object a line, in UTF-8. Columns are image
            (a path in the table's folder), question, answer, and if wanted question_type or type.

    Raises:
        ValueError: for missing columns, and for values that are no text; names the row, counted from 1 without headings.
    """
    records = _csv_records(path) if path.suffix == ".csv" else _json_records(path)
    for index, record in enumerate(records):
        text = {name: text_of(index, record, name) for name in COLUMNS}
        yield Row(
            functools.partial(Image.open, image_path(path.parent, text["image"], index)),
            text["image"],
            text["question"],
            text["answer"],
            type_of(index, record),
        )


def image_path(folder: Path, name: str, index: int) -> Path:
    """Where the image of a row lies; a ValueError for a path that leaves the folder."""
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(
            f"{numbered(index)}: the image is {name!r}; it must be a path inside the folder, such as 'images/1.png'. Put the "
            "image there."
        )
    return folder / relative


def type_of(index: int, record: Mapping[str, Any]) -> str:
    """The type of a row's question; empty where the data has no column for it."""
    name = next((column for column in TYPE_COLUMNS if column in record), None)
    if name is None:
        return ""
    question_type = text_of(index, record, name)
    if not question_type.strip():
        raise ValueError(f"{numbered(index)}: {name!r} is empty. Give every row a type, or leave the column out.")
    return question_type.strip()


def value_of(index: int, record: Mapping[str, Any], name: str) -> Any:
    """What a row has in a column; a ValueError where there is no such column."""
    if name not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise ValueError(
            f"{numbered(index)}: there is no column {name!r} (there are: {known}). A row needs {', '.join(map(repr, COLUMNS))}."
        )
    return record[name]


def text_of(index: int, record: Mapping[str, Any], name: str) -> str:
    """The text that a row has in a column; a ValueError where there is none."""
    value = value_of(index, record, name)
    if not isinstance(value, str):
        raise ValueError(f"{numbered(index)}: {name!r} is {shown(value)}; it must be text. Write it in quotes.")
    return value


def _csv_records(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark at the beginning
        reader = csv.DictReader(file, strict=True)
        index = -1
        try:
            for index, record in enumerate(reader):
                if None in record or None in record.values():
                    raise ValueError(
                        f"{numbered(index)} of {path} has not as many fields as there are headings. Put text with commas in "
                        "double quotes."
                    )
                yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read after {index + 1} rows: {error}. Write it as CSV in UTF-8.") from None


def _json_records(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8") as file:
        index = -1
        try:
            for index, line in enumerate(line for line in file if line.strip()):
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{numbered(index)} of {path} is no JSON object. Write one object a line.")
                yield record
        except json.JSONDecodeError as error:
            raise ValueError(f"{numbered(index)} of {path} is no JSON: {error}. Write one object a line.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read after {index + 1} rows: {error}. Write it in UTF-8.") from None
