"""tuning.csv and tuning.png: every trial of a search, and how they went. The figure needs matplotlib."""

import csv
import itertools
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .search import Tuning
from .study import value_of

COLUMNS = ("trial", "objective", "tokens_per_layer", "seconds", "rejected_because")


def shown_setting(value: Any) -> str:
    """A setting as an option takes it: layers as 7+15, stages as 8:0.5+16:0.5."""
    if isinstance(value, (list, tuple)):
        return "+".join(":".join(map(str, part)) if isinstance(part, (list, tuple)) else str(part) for part in value)
    return "none" if value is None else str(value)


def write_trials(path: Path, tuning: Tuning) -> None:
    """Writes a line for every trial, the start first: what it came to, and the settings that differ; none if rejected."""
    names = list(tuning.trials[0].settings)

    def write(unfinished: Path) -> None:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, *names))
            for number, trial in enumerate(tuning.trials):
                measured = ("" if trial.value is None else repr(value) for value in (trial.value, trial.tokens_per_layer))
                values = [shown_setting(trial.settings[name]) if trial.settings else "" for name in names]
                writer.writerow((number, *measured, f"{trial.seconds:.3f}", trial.reason or "", *values))

    atomic_write(path, write)


def draw_tuning(path: Path, tuning: Tuning, title: str, objective: str) -> None:
    """Writes the figure: the objective against trials with the best so far, and the importance of parameters beside it.

    Args:
        path: of the file.
        tuning: that is shown.
        title: of the figure.
        objective: its meaning.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    widths = [2, 1] if tuning.importance else [1]
    axes, *others = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    measured = [(number, value_of(trial)) for number, trial in enumerate(tuning.trials) if trial.value is not None]
    numbers, values = zip(*measured, strict=True)
    axes.plot(numbers, values, "o", markersize=4, color="#0072B2", label="a trial")
    best = list(itertools.accumulate(values, max))
    axes.step(numbers, best, where="post", color="#D55E00", linewidth=1.2, label="the best so far")
    axes.axhline(tuning.start_value, color="#444444", linestyle=":", linewidth=0.8, label="where it started")
    rejected = [number for number, trial in enumerate(tuning.trials) if trial.value is None]
    if rejected:
        axes.plot(rejected, [min(values)] * len(rejected), "x", markersize=4, color="#999999", label="rejected")
    axes.set_xlabel("trial")
    axes.set_ylabel("objective")
    axes.set_title(objective, fontsize=7, wrap=True)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for panel in others:
        names = list(tuning.importance)[::-1]
        panel.barh(names, [tuning.importance[name] for name in names], color="#009E73")
        panel.set_xlabel("share of importance")
        panel.tick_params(axis="y", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")
