"""A baseline that looks at nothing: cells of every view at even distances in raster order.

Source: ours. What a method gains over it, it gains by looking.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..pruning.evidence import ViewEvidence
from ..pruning.settings import VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .ranking import share_as_inclusion, totals_of_views


class Uniform(PruningMethod):
    """Cells at even distances."""

    name = "uniform"
    rule = "a baseline: cells at even distances in raster order"
    colour = "#F0E442"
    knows_inclusion = True

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_uniform(evidence.valid, pruning)

    def inclusion(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return share_as_inclusion(evidence, pruning)


def select_uniform(valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """Evenly spaced cells, of views of one shape at once.

    Of n valid cells of a view, counted in raster order from 0, of which k are to stay, cell i is kept where
    floor((i + 1) * k / n) > floor(i * k / n).

    Args:
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "uniform" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells.

    Raises:
        ValueError: on a shape or dtype that does not fit, another method's config, and a token budget in place of a ratio.
    """
    check_views(valid)
    settings = settings_of("uniform", pruning)
    cells = valid.flatten(1)
    number = cells.sum(1, keepdim=True)
    total = totals_of_views(cells, settings)[:, None]
    up_to_here = cells.cumsum(1) * total
    number = number.clamp(min=1)  # nothing is kept of a view without valid cells, but it must not divide by 0
    return (cells & (up_to_here // number > (up_to_here - total) // number)).view_as(valid)
