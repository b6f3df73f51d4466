"""The class token's attention: of every tile the cells to which the class token attends most.

Source: FasterVLM, arXiv 2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467, which merges the others into a few
more where we drop them. The count per tile is ours.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank, keep_best
from .retained_share import totals_of_tiles
from .selector_arguments import check_tiles, settings_of


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
    check_tiles(valid, scores=scores)
    settings = settings_of("cls_attention", pruning)
    cells = valid.flatten(1)
    total = totals_of_tiles(cells, settings)
    return keep_best(descending_rank(scores.flatten(1)), cells, total).view_as(valid)
