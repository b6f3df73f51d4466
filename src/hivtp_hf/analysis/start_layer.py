"""The suggestion of an `importance_start_layer`, from a curve of dispersion alone."""

import math
from collections.abc import Sequence

from ..pruning.checked_values import checked_number, shown


def suggest_start_layer(dispersion: Sequence[float], num_layers: int, feature_layer: int) -> int | None:
    """The first of `num_layers` successive layers whose most attended cells lie closest together.

    The rule: of all windows of `num_layers` successive layers that begin after the first layer and end with the feature layer
    or before it, the one with the lowest mean dispersion; of equal ones the earliest. The first layer is left out because it
    has seen nothing but single patches; layers behind the feature have no part in what the language model is given.

    The thought behind it: middle layers attend to objects, whose cells lie together; in deep layers a few scattered cells
    gather the attention; shallow ones follow texture. It is a heuristic. It looks at no question and no answer, so only an
    evaluation can say whether a checkpoint answers better with it than with the published layers 6 to 8 of 24.

    Args:
        dispersion: of every encoder layer, the mean distance of the most attended cells, in any unit.
        num_layers: length of a window, the setting `importance_num_layers`.
        feature_layer: the layer, 0-based, whose output is the visual feature; -1 where that is what enters the first layer.

    Returns:
        The 0-based layer at which the window begins; None where there is no such window.

    Raises:
        ValueError: for a curve with values that are not finite, and for numbers out of range.

    Source of the thought: HIVTP, arXiv 2509.23663, section 3.1; HiPrune, arXiv 2508.00553. The rule is ours.
    """
    num_layers = checked_number("num_layers", num_layers, int, 1)
    feature_layer = checked_number("feature_layer", feature_layer, int, -1, len(dispersion) - 1)
    wrong = [layer for layer, value in enumerate(dispersion) if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"`dispersion` is {shown(dispersion[wrong[0]])} at layer {wrong[0]}; it must be finite at every layer. Analyse "
            "images that have at least two cells."
        )
    starts = range(1, feature_layer - num_layers + 2)
    # Exact sums, so that equal windows are equal in whatever order their layers come.
    return min(starts, key=lambda start: math.fsum(dispersion[start : start + num_layers]), default=None)


def window_mean(curve: Sequence[float], start: int, num_layers: int) -> float:
    """The mean of a curve over `num_layers` layers from `start` on."""
    return math.fsum(curve[start : start + num_layers]) / num_layers
