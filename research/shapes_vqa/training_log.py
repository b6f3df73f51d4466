"""The log of a training: one row a figure, in a CSV file that grows."""

import csv
from collections.abc import Mapping
from pathlib import Path

from hivtp_hf.files import atomic_write

_COLUMNS = ("stage", "step", "minutes", "figure", "value")


class TrainingLog:
    """Figures by stage and step.

    Attributes:
        rows: (stage, step, minutes since the training began, name of the figure, value).
    """

    def __init__(self, file: Path):
        self._file = file
        self.rows: list[tuple[str, int, float, str, float]] = []
        if file.exists():
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines):
                    at = row["stage"], int(row["step"]), float(row["minutes"])
                    self.rows.append((*at, row["figure"], float(row["value"])))

    def add(self, stage: str, step: int, minutes: float, figures: Mapping[str, float]) -> None:
        """Adds figures of a step, so many minutes after the ones before."""
        now = (self.rows[-1][2] if self.rows else 0.0) + minutes
        self.rows += [(stage, step, round(now, 2), name, float(f"{value:.5g}")) for name, value in figures.items()]
        self._write()

    def drop_after(self, stage: str, step: int) -> None:
        """Drops what came after the step that a stage goes on from."""
        self.rows = [row for row in self.rows if row[0] != stage or row[1] <= step]
        self._write()

    def _write(self) -> None:
        atomic_write(self._file, self._write_to)

    def _write_to(self, path: Path) -> None:
        with path.open("w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(_COLUMNS)
            writer.writerows(self.rows)
