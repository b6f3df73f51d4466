"""`plot_dispersion`: the curve of dispersion over the layers of a vision encoder, as a matplotlib figure.

Needs matplotlib.
"""

from typing import TYPE_CHECKING, Any

from ..visualization.plotting import DPI, check_matplotlib
from .dispersion_report import DispersionReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: as wide as a page's text.
_SIZE = (6.4, 4.2)
# Told apart without colours as well, by markers and lines.
_RECEIVED, _CLASS_TOKEN, _RANDOM = "#0072b2", "#d55e00", "#555555"
_SCORED, _SUGGESTED = "#999999", "#009e73"


def plot_dispersion(report: DispersionReport) -> "Figure":
    """Draws how far apart the most attended cells lie in every layer.

    A curve by what cells receive and, where there is a class token, one by what that attends to; a dashed line for cells
    chosen at random. Layers that the settings score and those that are suggested are shaded; a dotted line marks the layer
    whose output is the visual feature.

    Args:
        report: what was measured, and the settings of the checkpoint.

    Returns:
        A `matplotlib.figure.Figure`, to be saved by `savefig` or drawn by a notebook.

    Raises:
        ValueError: where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    analysis = report.analysis
    layers = list(range(report.num_layers))
    figure = Figure(figsize=_SIZE, dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    shadings: list[tuple[list[int], str, dict[str, Any]]] = [
        (report.scored_layers, "scored by the settings", {"color": _SCORED, "alpha": 0.3}),
        (report.suggested_layers, "suggested", {"edgecolor": _SUGGESTED, "facecolor": "none", "hatch": "//", "alpha": 0.6}),
    ]
    for shaded, label, look in shadings:
        for number, layer in enumerate(shaded):
            axes.axvspan(layer - 0.5, layer + 0.5, linewidth=0, label="_nolegend_" if number else label, **look)
    curves = [("attention received", "o-", _RECEIVED, analysis.received)]
    if analysis.class_token is not None:
        curves.append(("attention of the class token", "s-", _CLASS_TOKEN, analysis.class_token))
    for name, line, colour, curve in curves:
        axes.plot(layers, curve.dispersion, line, color=colour, markersize=4, label=name)
    axes.axhline(analysis.random_dispersion, color=_RANDOM, linestyle="--", label="cells at random")
    if analysis.feature_layer >= 0:
        axes.axvline(analysis.feature_layer, color=_RANDOM, linestyle=":", label="visual feature")
    axes.set_xlim(-0.5, report.num_layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("encoder layer, from 0")
    axes.set_ylabel("mean distance in cells")
    axes.set_title(title_of(report), fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def title_of(report: DispersionReport) -> str:
    """What was looked at, in a line."""
    analysis = report.analysis
    images = f"{analysis.num_images} image{'s' * (analysis.num_images > 1)}"
    tiles = f"{analysis.num_tiles} tile{'s' * (analysis.num_tiles > 1)}"
    return f"The {analysis.top_share:.3g} of cells with most attention, in {tiles} of {images}"
