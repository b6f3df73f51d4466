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

from ..pruning.checked_values import shown
from ..pruning.evidence import EncoderFacts, Evidence, ViewEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .ranking import descending_rank, keep_best, keep_best_of_groups, share_of_views, totals_of_views

# The paper's choice for CLIP ViT-L/14: layers 6, 7 and 8.
_MIDDLE_LAYERS = (6, 7, 8)
# Which layers are averaged, of methods that go by middle ones.
MIDDLE_LAYER_SETTINGS = (
    Setting(
        "importance_start_layer",
        int,
        None,
        is_layer=True,
        search=(),  # tuning names the layers themselves
        meaning=f"first encoder layer that scores; None: the family's own, {_MIDDLE_LAYERS[0]} where it has none",
    ),
    Setting(
        "importance_num_layers",
        int,
        None,
        1,
        is_layer=True,
        search=(),
        meaning=f"how many layers are averaged, from the first on; None: {len(_MIDDLE_LAYERS)}, or the family's own",
    ),
    Setting(
        "importance_layers",
        tuple,
        None,
        is_layer=True,
        search=(1, 8),
        meaning="encoder layers that are averaged, in place of a first one and a number",
    ),
)


class HIVTP(PruningMethod):
    """HIVTP: by the mean attention that cells receive in some middle layers."""

    name = "hivtp"
    rule = "the best of every region and of every small window, by attention in middle layers (arXiv 2509.23663)"
    settings = (
        # A retention ratio, which tuning holds, rules over the first two.
        Setting("global_ratio", float, 0.25, 0, 1, meaning="share of a region's cells kept by the global stage", search=()),
        Setting("local_window", int, 2, 1, meaning="side in cells of windows that each keep one cell more", search=()),
        Setting("regions", int, 2, 1, meaning="regions per side of a view, so 2 means four quadrants", search=(1, 4)),
        *MIDDLE_LAYER_SETTINGS,
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

    def check_settings(self, pruning: VisualTokenPruningConfig) -> None:
        check_middle_layers(pruning)

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return middle_layers(pruning, encoder)

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        if pruning.retention_ratio is not None:
            return share_of_views(layout, pruning)
        views, counts = layout.by_view(layout.valid), [0] * layout.num_views
        for shape in set(layout.view_shapes):
            members = [view for view in range(layout.num_views) if layout.view_shapes[view] == shape]
            of_shape = count_hivtp(torch.stack([views[view] for view in members]), pruning)
            for view, number in zip(members, of_shape.tolist(), strict=True):
                counts[view] = number
        return counts

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_hivtp(evidence.mean_scores(), evidence.valid, pruning)

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return evidence.mean_scores()


def check_middle_layers(pruning: VisualTokenPruningConfig) -> None:
    """Refuses layers that are given in two ways: a ValueError."""
    for name in ("importance_start_layer", "importance_num_layers"):
        if pruning.importance_layers is not None and getattr(pruning, name) is not None:
            raise ValueError(
                f"`importance_layers` is {shown(pruning.importance_layers)} and `{name}` {getattr(pruning, name)}; give "
                "the layers themselves, or the first one and their number."
            )


def middle_layers(pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
    """The encoder layers that are averaged, 0-based and ascending."""
    first, number = pruning.importance_start_layer, pruning.importance_num_layers
    if pruning.importance_layers is not None:
        return pruning.importance_layers
    own = encoder.default_layers.get("importance_layers", _MIDDLE_LAYERS)
    if first is None and number is None:
        return own
    first = own[0] if first is None else first
    return range(first, first + (len(_MIDDLE_LAYERS) if number is None else number))


class HIVTPBudget(NamedTuple):
    """How many cells of each view each stage keeps, all int64.

    Attributes:
        region_quota: (views, regions), for the global stage.
        window_side: (views,), side of the local stage's windows in cells; 0 where there is no local stage.
        total: (views,), cells kept in all when counts are exact.
    """

    region_quota: Tensor
    window_side: Tensor
    total: Tensor


def hivtp_budget(valid: Tensor, pruning: VisualTokenPruningConfig) -> HIVTPBudget:
    """The counts of every view.

    Args:
        valid: bool (views, rows, columns), the cells that the stock model uses.
        pruning: its `retention_ratio`, if any, rules over `global_ratio` and `local_window`.
    """
    views, rows, columns = valid.shape
    cells = valid.flatten(1)
    region_of_cell = _region_of_cell(rows, columns, pruning.regions, valid.device)
    num_regions = min(pruning.regions, rows) * min(pruning.regions, columns)
    region_valid = torch.zeros(views, num_regions, dtype=torch.int64, device=valid.device)
    region_valid.scatter_add_(1, region_of_cell.expand(views, -1), cells.long())

    if pruning.retention_ratio is None:
        largest_region = math.prod(math.ceil(side / min(pruning.regions, side)) for side in (rows, columns))
        share = [math.floor(pruning.global_ratio * n) for n in range(largest_region + 1)]
        region_quota = torch.tensor(share, device=valid.device)[region_valid]
        side = min(pruning.local_window, max(rows, columns))
        num_windows = _count_windows(cells, [side], rows, columns)[:, 0]
        total = torch.minimum(cells.sum(1), region_quota.sum(1) + num_windows)
        return HIVTPBudget(region_quota, torch.full_like(total, side), total)

    total = totals_of_views(cells, pruning)
    sides = list(range(2, max(rows, columns) + 1))
    if not sides:  # no window of side 2 fits
        return HIVTPBudget(_proportional_split(total, region_valid), torch.zeros_like(total), total)
    num_windows = _count_windows(cells, sides, rows, columns)
    affordable = 2 * num_windows <= total[:, None]
    smallest = affordable.int().argmax(1, keepdim=True)  # the first maximum, and so the smallest side
    has_windows = affordable.gather(1, smallest)[:, 0]
    num_windows = num_windows.gather(1, smallest)[:, 0] * has_windows
    region_quota = _proportional_split(total - num_windows, region_valid)
    return HIVTPBudget(region_quota, (smallest[:, 0] + 2) * has_windows, total)


def count_hivtp(valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """Cells that each view keeps with exact counts: int64 (views,), for `valid` of shape (views, rows, columns)."""
    return hivtp_budget(valid, pruning).total


def select_hivtp(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells that HIVTP keeps, of views of one shape at once.

    Args:
        scores: (views, rows, columns), any float dtype, the importance of each cell; compared in float32.
        valid: bool (views, rows, columns) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "hivtp", or its settings as a dict.

    Returns:
        bool (views, rows, columns). With `exact_count` each view keeps `count_hivtp(valid, pruning)` cells, whatever the
        scores; equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes that do not fit or another method's config.

    Source: arXiv 2509.23663, section 3.
    """
    check_views(valid, scores=scores)
    pruning = settings_of("hivtp", pruning)
    if pruning.retention_ratio == 1:
        return valid.clone()
    views, rows, columns = valid.shape
    budget = hivtp_budget(valid, pruning)
    rank = descending_rank(scores.flatten(1))
    cells = valid.flatten(1)

    num_regions = budget.region_quota.shape[1]
    region_of_cell = _region_of_cell(rows, columns, pruning.regions, valid.device)
    kept = keep_best_of_groups(rank, torch.where(cells, region_of_cell, num_regions), budget.region_quota)

    side = budget.window_side[:, None]
    smallest_side = min(pruning.local_window, max(rows, columns)) if pruning.retention_ratio is None else 2
    num_windows = math.ceil(rows / smallest_side) * math.ceil(columns / smallest_side)
    window_of_cell = _window_of_cell(side.clamp(min=1), rows, columns)
    in_local_stage = cells & ~kept & (side > 0)
    one_each = torch.ones(views, num_windows, dtype=torch.int64, device=valid.device)
    kept = kept | keep_best_of_groups(rank, torch.where(in_local_stage, window_of_cell, num_windows), one_each)

    if pruning.exact_count:
        missing = budget.total - kept.sum(1)
        kept = kept | keep_best(rank, cells & ~kept, missing)
    return kept.view_as(valid)


def _region_of_cell(rows: int, columns: int, regions: int, device: torch.device) -> Tensor:
    """Region of every cell in raster order, (rows * columns,); region edge i of n lies at floor(i * side / n).

    More regions than cells on a side cut no finer than one cell each, so their number is bounded by the view.
    """

    def of_line(side: int) -> Tensor:
        number = min(regions, side)
        edges = torch.tensor([i * side // number for i in range(1, number)], dtype=torch.int64, device=device)
        return torch.bucketize(torch.arange(side, device=device), edges, right=True)

    return (of_line(rows)[:, None] * min(regions, columns) + of_line(columns)).flatten()


def _window_of_cell(side: Tensor, rows: int, columns: int) -> Tensor:
    """Window of every cell in raster order, (n, rows * columns), for window sides (n, 1)."""
    row_of_windows = torch.arange(rows, device=side.device) // side
    column_of_windows = torch.arange(columns, device=side.device) // side
    across = (columns + side - 1) // side
    return (row_of_windows[:, :, None] * across[:, :, None] + column_of_windows[:, None, :]).flatten(1)


def _count_windows(cells: Tensor, sides: list[int], rows: int, columns: int) -> Tensor:
    """Windows with at least one valid cell, (views, sides), for `cells` bool (views, rows * columns)."""
    views = cells.shape[0]
    window_of_cell = _window_of_cell(torch.tensor(sides, device=cells.device)[:, None], rows, columns)
    most = math.ceil(rows / min(sides)) * math.ceil(columns / min(sides))
    hits = torch.zeros(views, len(sides), most, dtype=torch.int64, device=cells.device)
    shape = (views, len(sides), rows * columns)
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
