"""The trained reference model: where it lies, and questions that show what it sees."""

from collections.abc import Iterator
from pathlib import Path

from hivtp_hf.evaluation import Row

from .held_out import held_out_rows
from .vocabulary import QUESTION_TYPES

CHECKPOINT = Path(__file__).parent / "shapes-llava-next"
# Rows that are looked through for one of each type about an image of its own.
_ROWS = 300


def a_question_of_each_type() -> Iterator[Row]:
    """The first held-out question of each type, each about another scene."""
    waiting, shown = list(QUESTION_TYPES), set()
    for row in held_out_rows(_ROWS):
        if row.question_type in waiting and row.image_name not in shown:
            waiting.remove(row.question_type)
            shown.add(row.image_name)
            yield row
