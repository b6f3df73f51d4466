"""HIVTP's selection: region-wise global retaining, then window-wise local retaining, then an exact count.

Source: arXiv 2509.23663, section 3. The exact count and the retention ratio are ours.

Reference compatibility: with `exact_count=False` and no ratio this returns what the authors' released selection returns,
cell for cell (tests/data/hivtp.npz). The exact set contains the published one and fills it up with the best remaining
cells, so that its size depends on the valid cells and the settings alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.evidence import Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_tiles, settings_of
from .ranking import descending_rank, keep_best, keep_best_of_groups, share_of_tiles, totals_of_tiles


class HIVTP(PruningMethod):
    """HIVTP: by the mean attention that cells receive in some middle layers."""

    name = "hivtp"
    rule = "the best of every region and of every small window, by attention in middle layers (arXiv 2509.23663)"
    settings = (
        Setting("global_ratio", float, 0.25, 0, 1, meaning="share of a region's cells kept by the global stage"),
        Setting("local_window", int, 2, 1, meaning="side in cells of windows that each keep one cell more"),
        Setting("regions", int, 2, 1, meaning="regions per side of a tile, so 2 means four quadrants"),
        Setting("importance_start_layer", int, 6, is_layer=True, meaning="first encoder layer that scores"),
        Setting("importance_num_layers", int, 3, 1, is_layer=True, meaning="how many layers are averaged"),
    )
    colour = "#0072B2"
    citation = r"""
@misc{xu2025hivtp,
  title = {{HIVTP}: A Training-Free Method to Improve {VLMs} Efficiency via Hierarchical Visual Token Pruning Using
           Middle-Layer-Based Importance Score},
  author = {Xu, Jingqi and Lu, Jingxi and Li, Chenghao and Sarkar, Sreetama and Beerel, Peter A.},
  year = {2025},
  eprint = {2509.23663},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2509.23663},
}
"""
    default_retention_ratio = None
    content_dependent_count = True

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.RECEIVED_ATTENTION}),)

    def layers(self, pruning: VisualTokenPruningConfig, feature_layer: int) -> Sequence[int]:
        first = pruning.importance_start_layer
        return range(first, first + pruning.importance_num_layers)

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        if pruning.retention_ratio is not None:
            return share_of_tiles(layout, pruning)
        return count_hivtp(layout.valid, pruning).tolist()

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_hivtp(evidence.mean_scores(), evidence.valid, pruning)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return evidence.mean_scores()


class HIVTPBudget(NamedTuple):
    """How many cells of each tile each stage keeps, all int64.

    Attributes:
        region_quota: (tiles, regions * regions), for the global stage.
        window_side: (tiles,), side of the local stage's windows in cells; 0 where there is no local stage.
        total: (tiles,), cells kept in all when counts are exact.
    """

    region_quota: Tensor
    window_side: Tensor
    total: Tensor


def hivtp_budget(valid: Tensor, pruning: VisualTokenPruningConfig) -> HIVTPBudget:
    """The counts of every tile.

    Args:
        valid: bool (tiles, grid, grid), the cells that un-padding keeps.
        pruning: its `retention_ratio`, if any, rules over `global_ratio` and `local_window`.
    """
    tiles, grid, _ = valid.shape
    cells = valid.flatten(1)
    region_of_cell = _region_of_cell(grid, pruning.regions, valid.device)
    num_regions = min(pruning.regions, grid) ** 2
    region_valid = torch.zeros(tiles, num_regions, dtype=torch.int64, device=valid.device)
    region_valid.scatter_add_(1, region_of_cell.expand(tiles, -1), cells.long())

    if pruning.retention_ratio is None:
        largest_region = math.ceil(grid / min(pruning.regions, grid)) ** 2
        share = [math.floor(pruning.global_ratio * n) for n in range(largest_region + 1)]
        region_quota = torch.tensor(share, device=valid.device)[region_valid]
        side = min(pruning.local_window, grid)
        num_windows = _count_windows(cells, [side], grid)[:, 0]
        total = torch.minimum(cells.sum(1), region_quota.sum(1) + num_windows)
        return HIVTPBudget(region_quota, torch.full_like(total, side), total)

    total = totals_of_tiles(cells, pruning)
    if grid < 2:  # no window of side 2 fits
        return HIVTPBudget(_proportional_split(total, region_valid), torch.zeros_like(total), total)
    sides = list(range(2, grid + 1))
    num_windows = _count_windows(cells, sides, grid)
    affordable = 2 * num_windows <= total[:, None]
    smallest = affordable.int().argmax(1, keepdim=True)  # the first maximum, and so the smallest side
    has_windows = affordable.gather(1, smallest)[:, 0]
    num_windows = num_windows.gather(1, smallest)[:, 0] * has_windows
    region_quota = _proportional_split(total - num_windows, region_valid)
    return HIVTPBudget(region_quota, (smallest[:, 0] + 2) * has_windows, total)


def count_hivtp(valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """Cells that each tile keeps with exact counts: int64 (tiles,), for `valid` of shape (tiles, grid, grid)."""
    return hivtp_budget(valid, pruning).total


def select_hivtp(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells that HIVTP keeps, of all tiles of all images of a batch at once.

    Args:
        scores: (tiles, grid, grid), any float dtype, the importance of each cell; compared in float32.
        valid: bool (tiles, grid, grid) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "hivtp", or its settings as a dict.

    Returns:
        bool (tiles, grid, grid). With `exact_count` each tile keeps `count_hivtp(valid, pruning)` cells, whatever the
        scores; equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes that do not fit or another method's config.

    Source: arXiv 2509.23663, section 3.
    """
    check_tiles(valid, scores=scores)
    pruning = settings_of("hivtp", pruning)
    if pruning.retention_ratio == 1:
        return valid.clone()
    tiles, grid, _ = valid.shape
    budget = hivtp_budget(valid, pruning)
    rank = descending_rank(scores.flatten(1))
    cells = valid.flatten(1)

    num_regions = budget.region_quota.shape[1]
    region_of_cell = _region_of_cell(grid, pruning.regions, valid.device)
    kept = keep_best_of_groups(rank, torch.where(cells, region_of_cell, num_regions), budget.region_quota)

    side = budget.window_side[:, None]
    smallest_side = min(pruning.local_window, grid) if pruning.retention_ratio is None else 2
    num_windows = math.ceil(grid / smallest_side) ** 2
    window_of_cell = _window_of_cell(side.clamp(min=1), grid)
    in_local_stage = cells & ~kept & (side > 0)
    one_each = torch.ones(tiles, num_windows, dtype=torch.int64, device=valid.device)
    kept = kept | keep_best_of_groups(rank, torch.where(in_local_stage, window_of_cell, num_windows), one_each)

    if pruning.exact_count:
        missing = budget.total - kept.sum(1)
        kept = kept | keep_best(rank, cells & ~kept, missing)
    return kept.view_as(valid)


def _region_of_cell(grid: int, regions: int, device: torch.device) -> Tensor:
    """Region of every cell in raster order, (grid * grid,); region edge i of n lies at floor(i * grid / n).

    More regions than cells on a side cut no finer than one cell each, so their number is bounded by the grid.
    """
    regions = min(regions, grid)
    of_line = [sum(1 for i in range(1, regions) if line >= i * grid // regions) for line in range(grid)]
    lines = torch.tensor(of_line, device=device)
    return (lines[:, None] * regions + lines).flatten()


def _window_of_cell(side: Tensor, grid: int) -> Tensor:
    """Window of every cell in raster order, (n, grid * grid), for window sides (n, 1)."""
    lines = torch.arange(grid, device=side.device)
    of_line = lines // side
    across = (grid + side - 1) // side
    return (of_line[:, :, None] * across[:, :, None] + of_line[:, None, :]).flatten(1)


def _count_windows(cells: Tensor, sides: list[int], grid: int) -> Tensor:
    """Windows with at least one valid cell, (tiles, sides), for `cells` bool (tiles, grid * grid)."""
    tiles = cells.shape[0]
    window_of_cell = _window_of_cell(torch.tensor(sides, device=cells.device)[:, None], grid)
    most = math.ceil(grid / min(sides)) ** 2
    hits = torch.zeros(tiles, len(sides), most, dtype=torch.int64, device=cells.device)
    shape = (tiles, len(sides), grid * grid)
    hits.scatter_add_(2, window_of_cell.expand(shape), cells[:, None].expand(shape).long())
    return (hits > 0).sum(2)


def _proportional_split(amount: Tensor, weights: Tensor) -> Tensor:
    """`amount` (rows,) split over `weights` (rows, n) by largest remainder, in integers; ties to the first."""
    whole = weights.sum(1, keepdim=True).clamp(min=1)
    shares = amount[:, None] * weights
    split = shares // whole
    left = amount - split.sum(1)
    order = torch.sort(shares % whole, dim=1, descending=True, stable=True).indices
    extra = torch.arange(weights.shape[1], device=weights.device) < left[:, None]
    return split.scatter_add(1, order, extra.long())
