"""A figure about a run, from its rows."""

from collections.abc import Sequence
from pathlib import Path

from hivtp_hf.figures.plotting import OTHER_COLOUR, method_colours

from .environment import Environment
from .prefill import TIME_TO_FIRST_TOKEN
from .rows import Row
from .sections import SCORING, SELECTION, TOWER
from .summary import all_of, find, rows_image
from .wording import share

_COLOURS = {"limit": "#999999", **method_colours()}


def draw(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """Writes a figure of the first image size: times to the first token, and the tower with scoring and selection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_image = [row for row in rows if row.image == rows_image(rows)]
    _draw_first_token(left, of_image)
    _draw_tower(right, [row for row in of_image if row.part == "vision"])
    for axes in (left, right):
        axes.set_ylabel("seconds, median and quartiles" if axes is left else "seconds, median")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        else:
            axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle(
        f"{environment.preset}, {rows_image(rows)}, {environment.device}, {environment.dtype}, {environment.date}", fontsize=10
    )
    figure.savefig(path, dpi=120)


def _draw_first_token(axes, rows: Sequence[Row]) -> None:
    """Bars by ratio: the limit, and every method; a line for stock."""
    axes.set_title("time to first token")
    ours = all_of(rows, TIME_TO_FIRST_TOKEN, variant="ours")
    ratios = list(dict.fromkeys(row.ratio for row in ours))
    names = ["limit", *dict.fromkeys(row.method for row in ours)]
    width = 0.8 / len(names)
    for index, name in enumerate(names if ours else []):
        variant = {"variant": "limit"} if name == "limit" else {"variant": "ours", "method": name}
        found = [(place, find(rows, TIME_TO_FIRST_TOKEN, ratio=ratio, **variant)) for place, ratio in enumerate(ratios)]
        known = [(place, row) for place, row in found if row is not None]
        axes.bar(
            [place - 0.4 + (index + 0.5) * width for place, _ in known],
            [row.median for _, row in known],
            width,
            yerr=[[row.median - row.q25 for _, row in known], [row.q75 - row.median for _, row in known]],
            color=_COLOURS.get(name, OTHER_COLOUR),
            label=name,
            error_kw={"linewidth": 0.8},
        )
    stock = find(rows, TIME_TO_FIRST_TOKEN, variant="stock")
    if stock is not None:
        axes.axhline(stock.median, color="black", linestyle="--", linewidth=1, label="stock")
    axes.set_xticks(range(len(ratios)), [f"{share(ratio)} kept" for ratio in ratios])


def _draw_tower(axes, rows: Sequence[Row]) -> None:
    """Stacked bars of every variant: the tower, and what scoring and selection take of it or on top."""
    axes.set_title("vision tower, scoring, selection")
    towers = all_of(rows, TOWER)
    labels = [f"{row.variant}\n{row.method}".replace("_", "\n") for row in towers]
    parts: dict[str, list[float]] = {"tower": [], "scoring": [], "selection": []}
    for row in towers:
        where = {"variant": row.variant, "method": row.method}
        scoring, selection = (getattr(find(rows, name, **where), "median", 0.0) for name in (SCORING, SELECTION))
        # Our scoring runs inside the tower's time.
        parts["tower"].append(row.median - (scoring if row.variant == "ours" else 0.0))
        parts["scoring"].append(scoring)
        parts["selection"].append(selection)
    below = [0.0] * len(towers)
    for (name, heights), colour in zip(parts.items(), ("#0072B2", "#E69F00", "#D55E00"), strict=True):
        if towers:
            axes.bar(range(len(towers)), heights, bottom=below, label=name, color=colour)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(towers)), labels, fontsize=7)
