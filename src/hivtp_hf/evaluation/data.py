"""What is asked: rows of question, image and answer, looked through before any model is loaded."""

import hashlib
import importlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from .question_tables import Row, numbered, rows_of_source

# What results call the questions of all types together.
ALL = "all"
# Goes into config.json, so that the numbers say what they mean.
RULE = "lower case, without blanks at both ends and without blanks and . , ; : ! ? at the end; then equal as a whole"
_AT_THE_END = re.compile(r"[\s.,;:!?]+\Z")

# The questions that are asked where no data is given, in a clone of the project.
_EXAMPLES, _NUMBER_OF_EXAMPLES = "shapes-vqa", 2000
_EXAMPLES_MODULE = "examples.shapes_vqa.held_out"


def normalised(answer: str) -> str:
    """An answer as it is compared; two answers are the same where these are equal. Empty for nothing but punctuation."""
    return _AT_THE_END.sub("", answer.lower()).strip()


class ImageGroup(NamedTuple):
    """An image and the questions about it: indices of rows, ascending."""

    image_name: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationData:
    """Rows, each of them complete, of which every image can be read.

    Attributes:
        name: how the data is called in results and in the names of folders.
        rows: in their order; messages and results count them from 1.
        image_sizes: (height, width) in pixels of every image, by its name.
        sha256: of all that the rows say, pixels included.
    """

    name: str
    rows: tuple[Row, ...]
    image_sizes: dict[str, tuple[int, int]]
    sha256: str

    @property
    def question_types(self) -> list[str]:
        """The kinds of questions, in the order in which they come up; none where the data tells none apart."""
        return list(dict.fromkeys(row.question_type for row in self.rows if row.question_type))

    def parts(self, images: int) -> list[list[ImageGroup]]:
        """The images in the order in which they come up, each once with all of its rows, so many images at a time.

        Parts depend on nothing else, so that a run that goes on meets the same ones.
        """
        members: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            members.setdefault(row.image_name, []).append(index)
        groups = [ImageGroup(name, tuple(indices)) for name, indices in members.items()]
        return [groups[start : start + images] for start in range(0, len(groups), images)]

    def named(self, row: int) -> str:
        """How messages call a row: by number, image and question."""
        asked = self.rows[row]
        return f"{numbered(row)} (image {asked.image_name!r}, question {asked.question!r})"


def load_data(source: str | Path | None, number: int | None, split: str | None = None) -> EvaluationData:
    """The first rows of a folder or of a data set on the Hub, or of the project's own questions, looked through.

    Args:
        source: as for `question_tables.rows_of_source`; None for the held-out questions of examples/shapes_vqa.
        number: how many rows are asked for; None for all that the source has, or 2,000 of the project's own.
        split: of a source that has several.

    Raises:
        ValueError: for a source without questions, and for rows that are broken; names the row.
        OSError: for a data set on the Hub that cannot be downloaded.
    """
    if number is not None and number < 1:
        raise ValueError(f"`--questions` is {number}; it must be a whole number from 1. Leave it out for all.")
    if source is not None:
        return checked_data(*rows_of_source(source, split), number)
    if split is not None:
        raise ValueError(f"`--split` is {split!r}, but no `--data` was given. Leave it out, or give data that has splits.")
    number = _NUMBER_OF_EXAMPLES if number is None else number
    return checked_data(_EXAMPLES, _example_rows(number), number)


def checked_data(name: str, rows: Iterable[Row], number: int | None, has_answers: bool = True) -> EvaluationData:
    """The first rows of some data, looked through.

    Args:
        name: of the data.
        rows: of the data, which may know more of them than are asked for.
        number: how many are asked for; None for all.
        has_answers: whether every row must have one.

    Raises:
        ValueError: for fewer rows than asked for, and none at all; names the row for an empty question or answer, an image
            that cannot be read, and types that some rows have and others have not.
    """
    chosen = tuple(itertools.islice(rows, number))
    if not chosen or (number is not None and len(chosen) < number):
        asked = "at least one is needed" if number is None else f"`--questions` asks for {number}"
        raise ValueError(f"{name} has {len(chosen)} rows; {asked}. Give more rows, or a smaller number.")
    image_sizes: dict[str, tuple[int, int]] = {}
    digest = hashlib.sha256()
    for index, row in enumerate(tqdm(chosen, desc="Looking through the data", unit="row", leave=False)):
        _check_text(index, row, bool(chosen[0].question_type), has_answers)
        if row.image_name not in image_sizes:
            try:
                image = row.open_image()
            except Exception as error:  # decoders raise whatever they meet in a broken file
                raise ValueError(
                    f"{numbered(index)}: the image {row.image_name!r} cannot be read: {error}. Mend it, or leave the row out."
                ) from error
            image_sizes[row.image_name] = image.height, image.width
            digest.update(repr(image.size).encode() + image.tobytes())
        digest.update(repr((row.image_name, row.question, row.answer, row.question_type)).encode())
    return EvaluationData(name, chosen, image_sizes, digest.hexdigest())


def _check_text(index: int, row: Row, typed: bool, has_answers: bool) -> None:
    if not row.question.strip():
        raise ValueError(f"{numbered(index)}: the question is empty. Write one, or leave the row out.")
    if has_answers and not normalised(row.answer):
        raise ValueError(
            f"{numbered(index)}: the answer is {row.answer!r}, of which nothing is left without punctuation, so that no answer "
            "at all would be right. Write one, or leave the row out."
        )
    if bool(row.question_type) != typed:
        first, this = ("a type", "none") if typed else ("no type", "one")
        raise ValueError(f"{numbered(index)}: the first row has {first} and this one {this}. Give all rows a type, or none.")
    if row.question_type == ALL:
        raise ValueError(f"{numbered(index)}: the type {ALL!r} is what results call all rows together. Use another word.")


def _example_rows(number: int) -> Iterator[Row]:
    """The first so many held-out questions, drawn by the generator in the current directory.

    Raises:
        ValueError: outside a clone, and where the generator cannot be imported.
    """
    clone = Path.cwd()
    file = clone.joinpath(*_EXAMPLES_MODULE.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(
            f"no `--data` was given, and {clone} is no clone of the project, whose examples/shapes_vqa makes questions. Give "
            "`--data FOLDER` with a table questions.csv, or run this in a clone."
        )
    sys.path.insert(0, str(clone))
    try:
        module = importlib.import_module(_EXAMPLES_MODULE)
    except ImportError as error:
        raise ValueError(
            f'{file} cannot be imported: {error}. Install what the examples need with `pip install -e ".[demo]"`, or give '
            "`--data FOLDER`."
        ) from error
    finally:
        sys.path.remove(str(clone))
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise ValueError(
            f"the name {_EXAMPLES_MODULE} means {module.__file__} here, and not {file}. Give `--data FOLDER`, or uninstall the "
            "package that brings that file."
        )
    yield from module.held_out_rows(number)
