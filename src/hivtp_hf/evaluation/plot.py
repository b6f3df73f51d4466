"""accuracy.png: accuracy against the tokens that are kept, a line a method. Needs matplotlib.

More lines than people tell apart are drawn in grey, but for the few best ones, and each method has a small panel of its own.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures.plotting import OTHER_COLOUR, method_colours
from .data import ALL
from .metrics import MetricsRow
from .variants import BASE_ONLY, BOTH, DOWNSAMPLE, POSITIONS, PUBLISHED, SMALLER, UNPRUNED, WEIGHTS

_COLOURS = {**method_colours(), UNPRUNED: "#000000", BASE_ONLY: "#999999", DOWNSAMPLE: "#D55E00"}
_STROKES = {PUBLISHED: "-", WEIGHTS: "--", POSITIONS: ":", BOTH: "-."}
_COLUMNS, _COLUMNS_OF_METHODS = 3, 5
# With more lines than these in colour, one is taken for another.
_TOLD_APART, _BEST = 8, 5
_GREY = "#CCCCCC"
# Okabe and Ito's, for lines whose methods have the same colour, or grey.
_SPARE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# A method, and what the language model was told of weights and positions.
_Line = tuple[str, str]


def draw_accuracy(path: Path, metrics: Sequence[MetricsRow], title: str) -> None:
    """Writes the figure: a large panel for all questions, and a small one for each type.

    Bands, and bars where a method has one point alone, are the intervals. Every line ends in the unpruned model, which all
    methods are at a ratio of 1. Its stroke tells what the language model was told of weights and positions. Tokens are patch
    tokens and newlines together, on a logarithmic scale.

    Of more than eight lines, the five with the best mean over their ratios are coloured, and the others are grey. A small panel
    for each method then shows its lines for all questions.

    Args:
        path: of the file.
        metrics: of a run.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(row.question_type for row in metrics if row.question_type != ALL))
    lines = list(dict.fromkeys(map(_line_of, metrics)))
    is_crowded = len(lines) > _TOLD_APART + 1  # and the unpruned model
    coloured = _best(metrics) if is_crowded else {line: _colour(line[0]) for line in lines}
    methods = [method for method in dict.fromkeys(method for method, _ in lines) if method != UNPRUNED and is_crowded]
    of_types, of_methods = math.ceil(len(types) / _COLUMNS), math.ceil(len(methods) / _COLUMNS_OF_METHODS)

    figure = Figure(figsize=(9, 5 + 2.4 * of_types + 1.9 * of_methods), layout="constrained")
    heights = [2.2, *[1] * of_types, *[0.8] * of_methods]
    grid = figure.add_gridspec(len(heights), _COLUMNS * _COLUMNS_OF_METHODS, height_ratios=heights)
    large = figure.add_subplot(grid[0, :])
    _draw_panel(large, metrics, ALL, coloured)
    if is_crowded:  # the best lines leave room below them
        large.plot([], [], color=_GREY, linewidth=1.2, label="others, see below")
        large.legend(frameon=False, fontsize=8, loc="lower right")
    else:
        large.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    large.set_xlabel("tokens of an image in the language model")
    large.set_ylabel("accuracy, 95 % interval")
    for number, question_type in enumerate(types):
        panel = figure.add_subplot(grid[_place(1, number, _COLUMNS)])
        _draw_panel(panel, metrics, question_type, coloured)
        panel.tick_params(labelsize=7)
    for number, method in enumerate(methods):
        panel = figure.add_subplot(grid[_place(1 + of_types, number, _COLUMNS_OF_METHODS)])
        own = {line: _colour(method) for line in lines if line[0] == method}
        _draw_panel(panel, metrics, ALL, own)
        panel.set_title(method, fontsize=8)
        panel.set_ylim(large.get_ylim())
        panel.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _place(first_row: int, number: int, columns: int) -> tuple[int, slice]:
    """Where one of several panels stands in a grid whose columns both kinds of panels divide."""
    width = _COLUMNS * _COLUMNS_OF_METHODS // columns
    start = number % columns * width
    return first_row + number // columns, slice(start, start + width)


def _colour(method: str) -> str:
    return _COLOURS.get(method.removeprefix(SMALLER), OTHER_COLOUR)


def _line_of(row: MetricsRow) -> _Line:
    return row.method, row.weights_and_positions


def _best(metrics: Sequence[MetricsRow]) -> dict[_Line, str]:
    """The lines with the best mean accuracy over all questions, best first, in colours that are told apart."""
    accuracy: dict[_Line, list[float]] = {}
    for row in metrics:
        # What has one point alone is at another number of tokens than the mean of the others.
        if row.question_type == ALL and row.method not in (UNPRUNED, BASE_ONLY):
            accuracy.setdefault(_line_of(row), []).append(row.accuracy)
    best = sorted(accuracy, key=lambda line: -statistics.fmean(accuracy[line]))[:_BEST]
    colours: dict[_Line, str] = {}
    for line in best:
        own = _colour(line[0])
        # Lines of one method are told apart by their strokes.
        of_others = {colour for (method, _), colour in colours.items() if method != line[0]}
        free = [colour for colour in (own, *_SPARE_COLOURS) if colour not in of_others and not _is_grey(colour)]
        colours[line] = next((colour for (method, _), colour in colours.items() if method == line[0]), free[0])
    return colours


def _is_grey(colour: str) -> bool:
    return colour[1:3] == colour[3:5] == colour[5:7]


def _draw_panel(axes: Any, metrics: Sequence[MetricsRow], question_type: str, coloured: Mapping[_Line, str]) -> None:
    """The lines of some questions: those in colour with their intervals, before the others in grey."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in metrics if row.question_type == question_type]
    unpruned = next(row for row in rows if row.method == UNPRUNED)
    axes.axhline(unpruned.accuracy, color=_COLOURS[UNPRUNED], linestyle=":", linewidth=0.8)
    lines = dict.fromkeys(map(_line_of, rows))
    colours = {**{line: _COLOURS[UNPRUNED] for line in lines if line[0] == UNPRUNED}, **coloured}
    for line in lines:
        if line not in colours:
            points = _points(rows, line, unpruned)
            axes.plot(*_curve(points), color=_GREY, linewidth=0.8, marker="o" if len(points) == 1 else None, markersize=3)
    for line, colour in colours.items():
        if line in lines:
            _draw_line(axes, line, _points(rows, line, unpruned), colour)
    # Where nothing is kept there is no logarithm.
    axes.set_xscale("symlog" if min(map(_tokens, rows)) < 1 else "log")
    columns = axes.get_subplotspec().colspan
    axes.set_xticks(_apart(sorted(map(_tokens, rows)), len(columns) / (_COLUMNS * _COLUMNS_OF_METHODS)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(question_type, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _points(rows: Sequence[MetricsRow], line: _Line, unpruned: MetricsRow) -> list[MetricsRow]:
    """Of one line, by tokens."""
    points = [row for row in rows if _line_of(row) == line]
    # What the base tile alone leaves out is not a matter of a ratio.
    if line[0] not in (UNPRUNED, BASE_ONLY):
        points.append(unpruned)
    return sorted(points, key=_tokens)


def _curve(points: Sequence[MetricsRow]) -> tuple[list[float], list[float]]:
    return [_tokens(row) for row in points], [row.accuracy for row in points]


def _draw_line(axes: Any, line: _Line, points: Sequence[MetricsRow], colour: str) -> None:
    method, told = line
    label = method if told == PUBLISHED else f"{method}, {told}"
    tokens, accuracy = _curve(points)
    low, high = [row.ci_low for row in points], [row.ci_high for row in points]
    if len(points) == 1:
        length = [[accuracy[0] - low[0]], [high[0] - accuracy[0]]]
        axes.errorbar(tokens, accuracy, yerr=length, color=colour, marker="o", markersize=4, linewidth=1, label=label)
    else:
        style = {"color": colour, "linestyle": _STROKES[told], "linewidth": 1.2}
        # A method has its colour after a smaller image as well.
        axes.plot(tokens, accuracy, marker="s" if method.startswith(SMALLER) else "o", markersize=3, label=label, **style)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)


def _tokens(row: MetricsRow) -> float:
    return row.tokens_per_layer


def _apart(ticks: Sequence[float], share: float) -> list[float]:
    """Ticks whose labels do not run into each other on a logarithmic scale, in a panel of a share of the figure's width."""
    closest = 0.7 if share >= 1 / _COLUMNS else 0.5
    chosen: list[float] = []
    for tick in reversed(ticks):
        if not chosen or tick <= closest * chosen[-1]:
            chosen.append(tick)
    return chosen[::-1]
