"""The count rule that most methods share: a rounded share of every tile's cells."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .token_layout import TokenLayout


def rounded_share(cells: int, retention_ratio: float) -> int:
    """How many of `cells` a ratio keeps: rounded, halves up, in Python's float64; never more than there are."""
    return min(cells, math.floor(retention_ratio * cells + 0.5))


def share_of_tiles(layout: "TokenLayout", pruning: Any) -> Sequence[int]:
    """Cells kept of every tile of an image, base tile first."""
    return [rounded_share(cells, pruning.retention_ratio) for cells in layout.valid_per_tile]
