"""What methods that rank share: how many cells a ratio keeps, ranks, and the best of each group, for all views at once.

Nothing here leaves the device or loops over views or cells. Ties always go to the lower index.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import ViewEvidence
from ..pruning.layout import TokenLayout


def rounded_share(cells: int, retention_ratio: float) -> int:
    """How many of `cells` a ratio keeps: rounded, halves up, in Python's float64; never more than there are."""
    return min(cells, math.floor(retention_ratio * cells + 0.5))


def totals_of_views(cells: Tensor, pruning: Any) -> Tensor:
    """How many cells of every view are kept, int64 (views,), for valid cells bool (views, cells), on their device.

    From a table that Python's own float64 arithmetic fills: a product on the device may have another floor, may be contracted
    with the addition by a compiler, and has no float64 at all on some devices.
    """
    share = [rounded_share(number, pruning.retention_ratio) for number in range(cells.shape[1] + 1)]
    return torch.tensor(share, device=cells.device)[cells.sum(1)]


def share_of_views(layout: TokenLayout, pruning: Any) -> Sequence[int]:
    """Cells kept of every view of an image."""
    return [rounded_share(cells, pruning.retention_ratio) for cells in layout.valid_per_view]


def share_as_inclusion(evidence: ViewEvidence, pruning: Any) -> Tensor:
    """The chance of every cell to be kept where all are alike: the retention ratio, float32 (views, rows, columns)."""
    return torch.full(evidence.valid.shape, pruning.retention_ratio, dtype=torch.float32, device=evidence.valid.device)


def descending_rank(scores: Tensor) -> Tensor:
    """The place of every score in its row, 0 for the highest; equal scores rank by index.

    Args:
        scores: (rows, n), any float dtype; compared in float32.

    Returns:
        int64 (rows, n), a permutation of 0 .. n-1 in every row. NaN ranks before all numbers.
    """
    order = torch.sort(scores.float(), dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def keep_best_of_groups(rank: Tensor, groups: Tensor, quota: Tensor) -> Tensor:
    """A mask of the `quota[row, group]` best-ranked members of every group.

    Args:
        rank: int64 (rows, n), distinct within a row, smaller is better.
        groups: int64 (rows, n), the group of each member from 0; the number of groups itself means "in none".
        quota: int64 (rows, groups), how many to keep of each; a group that is smaller is kept whole.

    Returns:
        bool (rows, n).
    """
    members = rank.shape[1]
    order = torch.argsort(groups * members + rank, dim=1)
    group_in_order = groups.gather(1, order)
    quota = torch.nn.functional.pad(quota, (0, 1))  # those in no group have a quota of 0
    sizes = torch.zeros_like(quota).scatter_add_(1, groups, torch.ones_like(groups))
    first = sizes.cumsum(1) - sizes
    place_in_group = torch.arange(members, device=rank.device) - first.gather(1, group_in_order)
    kept_in_order = place_in_group < quota.gather(1, group_in_order)
    return torch.zeros_like(kept_in_order).scatter_(1, order, kept_in_order)


def keep_best(rank: Tensor, members: Tensor, number: Tensor) -> Tensor:
    """A mask of the best-ranked members of every row: bool (rows, n).

    Args:
        rank: int64 (rows, n), distinct within a row, smaller is better.
        members: bool (rows, n), who may be kept.
        number: int64 (rows,), how many of each row; where there are fewer members, all of them.
    """
    # One group, number 0, of the members; the others are in none.
    return keep_best_of_groups(rank, (~members).long(), number[:, None])


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which products are computed as they are written."""
    available = torch.amp.is_autocast_available(device.type)  # not everywhere, and refused there even to switch it off
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def check_packed_features(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> None:
    """Refuses features that are not those of images that lie so: a ValueError that says what was given.

    Args:
        features: of every image must be floating point (num_stock, hidden).
        layouts: of every image; at least one.
    """
    if not layouts or len(features) != len(layouts):
        raise ValueError(
            f"`features` has {len(features)} images and `layouts` {len(layouts)}; there must be one layout for every image, "
            "and at least one image."
        )
    for image, (packed, layout) in enumerate(zip(features, layouts, strict=True)):
        if packed.ndim != 2 or packed.shape[0] != layout.num_stock or not packed.dtype.is_floating_point:
            raise ValueError(
                f"`features[{image}]` is {packed.dtype} of shape {tuple(packed.shape)}; its layout needs floating point of "
                f"shape ({layout.num_stock}, hidden)."
            )
