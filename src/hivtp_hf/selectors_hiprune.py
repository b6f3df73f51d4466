"""HiPrune's selection: anchors and their neighbours by one encoder layer's attention, the rest by a deeper layer's.

Source: arXiv 2508.00553, section 3. The count per tile is ours; the released code divides one budget over an image's tiles.

Reference compatibility: with `published_borders` this returns what the authors' released selection returns for one tile, cell
for cell (tests/data/hiprune.npz).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank, keep_best_of_groups
from .retained_share import rounded_share


def select_hiprune(
    object_scores: Tensor,
    deep_scores: Tensor,
    valid: Tensor,
    pruning: VisualTokenPruningConfig | Mapping[str, Any],
) -> Tensor:
    """The cells that HiPrune keeps, of all tiles of all images of a batch at once.

    Of a tile's budget, the share `alpha` goes to anchors (the cells with the highest object scores) and buffers (the four
    direct neighbours of every anchor), the rest to registers (the other cells with the highest deep scores).

    Args:
        object_scores: (tiles, grid, grid), any float dtype, the attention that each cell receives in the object layer;
            compared in float32.
        deep_scores: the same of the deep layer.
        valid: bool (tiles, grid, grid) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "hiprune" with a retention ratio, or its settings as a dict.

    Returns:
        bool (tiles, grid, grid). Each tile keeps `rounded_share(valid cells, retention_ratio)` cells, whatever the scores;
        equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2508.00553, section 3.
    """
    _check_tiles("object_scores", object_scores, valid)
    _check_tiles("deep_scores", deep_scores, valid)
    pruning = VisualTokenPruningConfig.coerce(pruning)
    ratio = _checked_ratio(pruning)
    cells = valid.flatten(1)
    # In Python's float64, as the layout counts; a product on the device may have another floor.
    share = [rounded_share(n, ratio) for n in range(cells.shape[1] + 1)]
    num_valid = cells.sum(1)
    total = torch.tensor(share, device=valid.device)[num_valid]
    num_anchors = torch.tensor([_anchors_of_budget(n, pruning.alpha) for n in share], device=valid.device)[num_valid]

    # One group, number 0, of the cells that may be chosen; the others are in none.
    anchors = keep_best_of_groups(descending_rank(object_scores.flatten(1)), (~cells).long(), num_anchors[:, None])
    neighbours = _neighbours_on_flat_index if pruning.published_borders else _neighbours
    kept = (anchors | neighbours(anchors.view_as(valid)).flatten(1)) & cells
    missing = total - kept.sum(1)
    registers = keep_best_of_groups(descending_rank(deep_scores.flatten(1)), (~cells | kept).long(), missing[:, None])
    return (kept | registers).view_as(valid)


def _anchors_of_budget(budget: int, alpha: float) -> int:
    """How many anchors share `alpha` of a tile's budget with four buffers each; so few that all of these always fit."""
    return min(round(budget * alpha / 5), budget // 5)


def _neighbours(anchors: Tensor) -> Tensor:
    """The cells above, below, left and right of anchors, bool (tiles, grid, grid); outside the tile there are none."""
    near = torch.zeros_like(anchors)
    near[:, 1:] |= anchors[:, :-1]
    near[:, :-1] |= anchors[:, 1:]
    near[:, :, 1:] |= anchors[:, :, :-1]
    near[:, :, :-1] |= anchors[:, :, 1:]
    return near


def _neighbours_on_flat_index(anchors: Tensor) -> Tensor:
    """The released code's neighbours, bool (tiles, grid, grid): raster indices i - 1, i + 1, i - grid and i + grid.

    Left and right of the border lies the next row's end. What falls off the tile lands on its first or last cell.
    """
    grid = anchors.shape[1]
    flat = anchors.flatten(1)
    near = torch.zeros_like(flat)
    for step in (1, grid):
        near[:, step:] |= flat[:, :-step]
        near[:, :-step] |= flat[:, step:]
        near[:, 0] |= flat[:, :step].any(1)
        near[:, -1] |= flat[:, -step:].any(1)
    return near.view_as(anchors)


def _check_tiles(name: str, scores: Tensor, valid: Tensor) -> None:
    if scores.ndim != 3 or scores.shape != valid.shape or scores.shape[1] != scores.shape[2] or scores.shape[1] == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(scores.shape)} and `valid` {tuple(valid.shape)}; both must be "
            "(tiles, grid, grid), with square tiles of at least one cell."
        )
    if valid.dtype != torch.bool or not scores.dtype.is_floating_point:
        raise ValueError(f"`{name}` is {scores.dtype} and `valid` {valid.dtype}; they must be floating point and bool.")


def _checked_ratio(pruning: VisualTokenPruningConfig) -> float:
    if pruning.method != "hiprune":
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_hiprune needs 'hiprune'.")
    if pruning.retention_ratio is None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning.retention_ratio
