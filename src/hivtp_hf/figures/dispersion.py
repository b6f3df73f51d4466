"""How far apart the most attended cells of a tile lie, in every layer of a vision encoder; and a figure of that.

*Dispersion* is the mean Euclidean distance between two of them, in cells. Cells chosen at random have, in expectation, the
dispersion of all valid cells of their tile: every pair is as likely as any other.

Source of what it is for: HIVTP, arXiv 2509.23663, section 3.1, and HiPrune, arXiv 2508.00553, which tell the middle layers of a
vision encoder, whose attention gathers on objects, from the deep ones, where it is scattered.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..methods.base import check_views
from ..methods.ranking import descending_rank, keep_best, rounded_share
from ..pruning.checked_values import checked_number
from .plotting import DPI, check_finite, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: as wide as a page's text.
_SIZE = (6.4, 4.2)


class Dispersion(NamedTuple):
    """The dispersion of encoder layers, ascending; each value the mean over all views.

    Attributes:
        layers: which encoder layers, 0-based: all whose attention compares cells of a whole view.
        received: of the cells that receive most attention from all tokens.
        class_token: of those that the class token attends to most; None where the encoder has none.
        at_random: in expectation, if cells were chosen at random.
        feature_layer: the encoder layer, 0-based, whose output is the visual feature; -1 for what enters the first.
        top_share: the share of a tile's valid cells that count as the most attended.
        num_views: how many views have two valid cells or more, and so a dispersion.
    """

    layers: list[int]
    received: list[float]
    class_token: list[float] | None
    at_random: float
    feature_layer: int
    top_share: float
    num_views: int


def dispersion_by_layer(model: Any, processor: Any, images: Iterable[Any], top_share: float = 0.2) -> Dispersion:
    """Measures dispersion in every layer of a model's vision encoder, over some images.

    Args:
        model: one of ours with a language modelling head, such as `HIVTPLlavaForConditionalGeneration`. Its pruning settings
            play no part.
        processor: of the same family; nor do its settings.
        images: as the processor takes them, looked at one by one.
        top_share: the share of each tile's valid cells that count as the most attended, above 0 and below 1.

    Raises:
        ValueError: for a share out of range, where there is no image, and where no tile has two valid cells.
    """
    top_share = checked_share(top_share)
    found, encoder = [], model.model.encoder_facts()
    layers = sorted(range(encoder.num_layers) if encoder.comparable_layers is None else encoder.comparable_layers)
    for image in images:
        # At a ratio of 1, as a token budget among the settings may be too small for an image.
        inputs = processor(images=image, text=processor.image_token, retention_ratio=1.0, return_tensors="pt").to(model.device)
        look = model.look(inputs, layers=layers)
        (layout,) = look.layouts({"method": "none"})
        scores = [kind[layer].cpu() for kind in (look.received, look.class_attention) for layer in sorted(kind)]
        for valid, *of_layers in zip(*map(layout.by_view, (layout.valid, *scores)), strict=True):
            chosen = [most_attended_cells(of_layer[None], valid[None], top_share) for of_layer in of_layers]
            found.append(torch.stack([mean_pairwise_distance(cells) for cells in (valid[None], *chosen)]))
    if not found:
        raise ValueError("`images` holds no image; give at least one.")
    distances = torch.cat(found, dim=1)
    distances = distances[:, distances[0].isfinite()]
    num_views = distances.shape[1]
    if not num_views:
        raise ValueError(
            "no tile has two cells, so there is no distance to measure. Use a checkpoint whose vision tower has smaller "
            "patches."
        )
    at_random, *means = distances.mean(1).tolist()
    of_class = means[len(layers) :] or None
    return Dispersion(layers, means[: len(layers)], of_class, at_random, look.encoder.feature_layer, top_share, num_views)


def checked_share(value: Any) -> float:
    """`value` as a share of a tile's cells, above 0 and below 1; a ValueError otherwise. At 1 all layers would look alike."""
    share = checked_number("top_share", value, float, 0, 1, above_minimum=True)
    if share == 1:
        raise ValueError("`top_share` is 1, which takes every cell, so that all layers look alike; give less, such as 0.2.")
    return share


def most_attended_cells(scores: Tensor, valid: Tensor, top_share: float) -> Tensor:
    """The share of every view's valid cells that has the highest scores, bool (views, rows, columns).

    Their number is rounded, halves up; it is 2 at least, as one cell has no distance, where a view has as many. Equal scores
    go to the lower raster index.

    Args:
        scores: floating point (views, rows, columns), compared in float32; those of cells that are not valid are ignored.
        valid: bool (views, rows, columns).
        top_share: of the valid cells, above 0 and below 1.

    Raises:
        ValueError: on shapes or dtypes that do not fit, a share out of range, and scores of valid cells that are not finite.
    """
    check_views(valid, scores=scores)
    top_share = checked_share(top_share)
    check_finite(scores, valid)
    cells = valid.flatten(1)
    # From a table that Python's own float64 arithmetic fills, as for the tokens that a ratio keeps.
    shares = [min(number, max(2, rounded_share(number, top_share))) for number in range(cells.shape[1] + 1)]
    number = torch.tensor(shares, device=cells.device)[cells.sum(1)]
    return keep_best(descending_rank(scores.flatten(1)), cells, number).view_as(valid)


def mean_pairwise_distance(chosen: Tensor) -> Tensor:
    """The mean Euclidean distance of all pairs of chosen cells, bool (views, rows, columns): float64 (views,), in cells.

    NaN for views with fewer than two chosen cells. Of all valid cells, it is the expectation for cells chosen at random.
    """
    return torch.stack([torch.pdist(view.nonzero().double()).mean() for view in chosen])


def plot_dispersion(dispersion: Dispersion, scored: Collection[int] = ()) -> "Figure":
    """Draws the curves of `dispersion_by_layer`, to be saved by `savefig` or drawn by a notebook. Needs matplotlib.

    A dashed line shows cells chosen at random, and a dotted one the layer whose output is the visual feature. The layers
    `scored`, as far as they exist, are shaded.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = dispersion.layers
    figure = Figure(figsize=_SIZE, dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    # Curves are told apart by markers and lines as well as by colours.
    axes.plot(layers, dispersion.received, "o-", color="#0072b2", label="attention received")
    if dispersion.class_token is not None:
        axes.plot(layers, dispersion.class_token, "s-", color="#d55e00", label="attention of the class token")
    axes.axhline(dispersion.at_random, color="#555555", linestyle="--", label="cells at random")
    if dispersion.feature_layer >= 0:
        axes.axvline(dispersion.feature_layer, color="#555555", linestyle=":", label="visual feature")
    for number, layer in enumerate(layer for layer in layers if layer in scored):
        label = "_nolegend_" if number else "scored by the settings"
        axes.axvspan(layer - 0.5, layer + 0.5, linewidth=0, color="#999999", alpha=0.3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("encoder layer, from 0")
    axes.set_ylabel("mean distance in cells")
    axes.set_title(f"The {dispersion.top_share:.3g} of cells with most attention; views: {dispersion.num_views}")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure
