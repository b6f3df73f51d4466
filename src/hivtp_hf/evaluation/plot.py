"""accuracy.png: accuracy against the tokens that are kept, a line a method. Needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures.plotting import OTHER_COLOUR, method_colours
from .data import ALL
from .metrics import MetricsRow
from .variants import BASE_ONLY, BOTH, DOWNSAMPLE, POSITIONS, PUBLISHED, UNPRUNED, WEIGHTS

_COLOURS = {**method_colours(), UNPRUNED: "#000000", BASE_ONLY: "#999999", DOWNSAMPLE: "#D55E00"}
_STROKES = {PUBLISHED: "-", WEIGHTS: "--", POSITIONS: ":", BOTH: "-."}
_COLUMNS = 3


def draw_accuracy(path: Path, metrics: Sequence[MetricsRow], title: str) -> None:
    """Writes the figure: a large panel for all questions, and a small one for each type.

    Bands, and bars where a method has one point alone, are the intervals. Every line ends in the unpruned model, which all
    methods are at a ratio of 1. Its stroke tells what the language model was told of weights and positions. Tokens are patch
    tokens and newlines together, on a logarithmic scale.

    Args:
        path: of the file.
        metrics: of a run.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(row.question_type for row in metrics if row.question_type != ALL))
    small_rows = math.ceil(len(types) / _COLUMNS)
    figure = Figure(figsize=(9, 5 + 2.4 * small_rows), layout="constrained")
    grid = figure.add_gridspec(1 + small_rows, _COLUMNS, height_ratios=[2.2, *[1] * small_rows])
    large = figure.add_subplot(grid[0, :])
    _draw_panel(large, metrics, ALL)
    large.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    large.set_xlabel("tokens of an image in the language model")
    large.set_ylabel("accuracy, 95 % interval")
    for number, question_type in enumerate(types):
        panel = figure.add_subplot(grid[1 + number // _COLUMNS, number % _COLUMNS])
        _draw_panel(panel, metrics, question_type)
        panel.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _draw_panel(axes: Any, metrics: Sequence[MetricsRow], question_type: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in metrics if row.question_type == question_type]
    unpruned = next(row for row in rows if row.method == UNPRUNED)
    axes.axhline(unpruned.accuracy, color=_COLOURS[UNPRUNED], linestyle=":", linewidth=0.8)
    for method, told in dict.fromkeys((row.method, row.weights_and_positions) for row in rows):
        colour, label = _COLOURS.get(method, OTHER_COLOUR), method if told == PUBLISHED else f"{method}, {told}"
        points = [row for row in rows if (row.method, row.weights_and_positions) == (method, told)]
        # What the base tile alone leaves out is not a matter of a ratio.
        if method not in (UNPRUNED, BASE_ONLY):
            points.append(unpruned)
        points.sort(key=_tokens)
        tokens, accuracy = [_tokens(row) for row in points], [row.accuracy for row in points]
        low, high = [row.ci_low for row in points], [row.ci_high for row in points]
        if len(points) == 1:
            length = [[accuracy[0] - low[0]], [high[0] - accuracy[0]]]
            axes.errorbar(tokens, accuracy, yerr=length, color=colour, marker="o", markersize=4, linewidth=1, label=label)
        else:
            style = {"color": colour, "linestyle": _STROKES[told], "linewidth": 1.2}
            axes.plot(tokens, accuracy, marker="o", markersize=3, label=label, **style)
            axes.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)
    # Where nothing is kept there is no logarithm.
    axes.set_xscale("symlog" if min(map(_tokens, rows)) < 1 else "log")
    axes.set_xticks(_apart(sorted(map(_tokens, rows))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(question_type, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _tokens(row: MetricsRow) -> float:
    return row.tokens_per_layer


def _apart(ticks: Sequence[float]) -> list[float]:
    """Ticks whose labels do not run into each other on a logarithmic scale."""
    chosen: list[float] = []
    for tick in reversed(ticks):
        if not chosen or tick <= 0.7 * chosen[-1]:
            chosen.append(tick)
    return chosen[::-1]
