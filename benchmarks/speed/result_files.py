"""The files of a run: each is whole or not there."""

from collections.abc import Callable
from pathlib import Path

from hivtp_hf.figures.plotting import can_plot
from hivtp_hf.files import atomic_write

from .plot import draw
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
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, write in writers.items():
        atomic_write(folder / (stem + suffix), write)
    return [folder / (stem + suffix) for suffix in writers]
