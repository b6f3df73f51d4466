"""The class token's attention: of every tile the cells to which the class token attends most.

Source: FasterVLM, arXiv 2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467, which merges the others into a few
more where we drop them. The count per tile is ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank, keep_best_of_groups
from .retained_share import rounded_share


def select_cls_attention(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells with the highest scores, of all tiles of all images of a batch at once.

    Args:
        scores: (tiles, grid, grid), any float dtype, how much of its attention the class token gives to each cell, heads
            averaged; compared in float32.
        valid: bool (tiles, grid, grid) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "cls_attention" with a retention ratio, or its settings as a dict.

    Returns:
        bool (tiles, grid, grid). Each tile keeps `rounded_share(valid cells, retention_ratio)` cells, whatever the scores;
        equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2412.01818; arXiv 2412.04467.
    """
    _check_tiles(scores, valid)
    pruning = VisualTokenPruningConfig.coerce(pruning)
    ratio = _checked_ratio(pruning)
    cells = valid.flatten(1)
    # In Python's float64, as the layout counts; a product on the device may have another floor.
    share = [rounded_share(n, ratio) for n in range(cells.shape[1] + 1)]
    total = torch.tensor(share, device=valid.device)[cells.sum(1)]
    rank = descending_rank(scores.flatten(1))
    # One group, number 0, of the valid cells; the others are in none.
    return keep_best_of_groups(rank, (~cells).long(), total[:, None]).view_as(valid)


def _check_tiles(scores: Tensor, valid: Tensor) -> None:
    if scores.ndim != 3 or scores.shape != valid.shape or scores.shape[1] != scores.shape[2] or scores.shape[1] == 0:
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)} and `valid` {tuple(valid.shape)}; both must be "
            "(tiles, grid, grid), with square tiles of at least one cell."
        )
    if valid.dtype != torch.bool or not scores.dtype.is_floating_point:
        raise ValueError(f"`scores` is {scores.dtype} and `valid` {valid.dtype}; they must be floating point and bool.")


def _checked_ratio(pruning: VisualTokenPruningConfig) -> float:
    if pruning.method != "cls_attention":
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_cls_attention needs 'cls_attention'.")
    if pruning.retention_ratio is None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning.retention_ratio
