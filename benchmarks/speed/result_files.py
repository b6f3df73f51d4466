"""The files of a run: each is whole or not there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .plot import can_plot, draw
from .rows import write_rows
from .summary import Report, summary


def write_results(folder: Path, stem: str, report: Report) -> list[Path]:
    """Writes the rows as CSV, the summary as Markdown and, where matplotlib is installed, a figure, all named by the stem.

    Returns:
        Their paths. Older files of these names are replaced.
    """
    writers: dict[str, Callable[[Path], object]] = {
        ".csv": lambda path: write_rows(path, report.rows, report.environment),
        ".md": lambda path: path.write_text(summary(report), encoding="utf-8"),
    }
    if can_plot():
        writers[".png"] = lambda path: draw(path, report.rows, report.environment)
    for suffix, write in writers.items():
        _write_whole(folder / (stem + suffix), write)
    return [folder / (stem + suffix) for suffix in writers]


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, and puts it there once it is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing_") as folder:
        unfinished = Path(folder, path.name)
        write(unfinished)
        os.replace(unfinished, path)
