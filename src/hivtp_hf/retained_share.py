"""The count rule that most methods share: a rounded share of every tile's cells."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .token_layout import TokenLayout


def rounded_share(cells: int, retention_ratio: float) -> int:
    """How many of `cells` a ratio keeps: rounded, halves up, in Python's float64; never more than there are."""
    return min(cells, math.floor(retention_ratio * cells + 0.5))


def totals_of_tiles(cells: Tensor, pruning: Any) -> Tensor:
    """How many cells of every tile are kept, int64 (tiles,), for valid cells bool (tiles, cells), on their device.

    From a table that Python's own float64 arithmetic fills: a product on the device may have another floor, may be contracted
    with the addition by a compiler, and has no float64 at all on some devices.
    """
    share = [rounded_share(number, pruning.retention_ratio) for number in range(cells.shape[1] + 1)]
    return torch.tensor(share, device=cells.device)[cells.sum(1)]


def share_of_tiles(layout: "TokenLayout", pruning: Any) -> Sequence[int]:
    """Cells kept of every tile of an image, base tile first."""
    return [rounded_share(cells, pruning.retention_ratio) for cells in layout.valid_per_tile]
