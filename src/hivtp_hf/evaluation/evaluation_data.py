"""`EvaluationData`: rows that were looked through before any model is loaded."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm.auto import tqdm

from .answer_text import normalised
from .rows import Row

ALL = "all"


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


def checked_data(name: str, rows: Iterable[Row], number: int | None) -> EvaluationData:
    """The first rows of some data, looked through.

    Args:
        name: of the data.
        rows: of the data, which may know more of them than are asked for.
        number: how many are asked for; None for all.

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
        _check_text(index, row, typed=bool(chosen[0].question_type))
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


def numbered(index: int) -> str:
    """How messages call the row at an index."""
    return f"row {index + 1}"


def _check_text(index: int, row: Row, typed: bool) -> None:
    if not row.question.strip():
        raise ValueError(f"{numbered(index)}: the question is empty. Write one, or leave the row out.")
    if not normalised(row.answer):
        raise ValueError(
            f"{numbered(index)}: the answer is {row.answer!r}, of which nothing is left without punctuation, so that no answer "
            "at all would be right. Write one, or leave the row out."
        )
    if bool(row.question_type) != typed:
        first, this = ("a type", "none") if typed else ("no type", "one")
        raise ValueError(f"{numbered(index)}: the first row has {first} and this one {this}. Give all rows a type, or none.")
    if row.question_type == ALL:
        raise ValueError(f"{numbered(index)}: the type {ALL!r} is what results call all rows together. Use another word.")
