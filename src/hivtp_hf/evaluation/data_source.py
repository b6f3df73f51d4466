"""`load_data`: the rows that `--data` means."""

from pathlib import Path

from .evaluation_data import EvaluationData, checked_data
from .example_questions import NAME, NUMBER, example_rows
from .question_tables import TABLES, rows_of_table
from .saved_datasets import is_saved_dataset, rows_of_dataset


def load_data(folder: Path | None, number: int | None) -> EvaluationData:
    """The first rows of a folder, or of the project's own questions, looked through.

    Args:
        folder: with a table `questions.csv` or `questions.jsonl`, or written by `datasets`; None for the held-out questions
            of examples/shapes_vqa.
        number: how many rows are asked for; None for all that a folder has, or 2,000 of the project's own.

    Raises:
        ValueError: for a folder without any of these or with two, and for rows that are broken; names the row.
    """
    if number is not None and number < 1:
        raise ValueError(f"`--questions` is {number}; it must be a whole number from 1. Leave it out for all.")
    if folder is None:
        number = NUMBER if number is None else number
        return checked_data(NAME, example_rows(number), number)
    if not folder.is_dir():
        raise ValueError(f"`--data` is {folder}, which is no folder; give one with a table {' or '.join(TABLES)} and images.")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    saved = is_saved_dataset(folder)
    if len(tables) + saved != 1:
        there = ", ".join([table.name for table in tables] + ["a saved dataset"] * saved) or "none of them"
        raise ValueError(
            f"`--data` is {folder}, which has {there}; it must have one of {', '.join(TABLES)} and what `save_to_disk` of the "
            "library `datasets` writes."
        )
    rows = rows_of_dataset(folder) if saved else rows_of_table(tables[0])
    return checked_data(folder.resolve().name, rows, number)
