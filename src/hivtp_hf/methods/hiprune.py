"""HiPrune's selection: anchors and their neighbours by one encoder layer's attention, the rest by a deeper layer's.

Source: arXiv 2508.00553, section 3. The count per tile is ours; the released code divides one budget over an image's tiles.

Reference compatibility: with `published_borders` this returns what the authors' released selection returns for one tile, cell
for cell (tests/data/hiprune.npz).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import Evidence, VisualEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_tiles, settings_of
from .ranking import descending_rank, keep_best, totals_of_tiles


class HiPrune(PruningMethod):
    """HiPrune: by the attention that cells receive in a middle and in a deep layer."""

    name = "hiprune"
    rule = "anchors of a middle layer with their neighbours, and the best of a deep layer (arXiv 2508.00553)"
    settings = (
        Setting("alpha", float, 0.1, 0, 1, meaning="share of the budget for anchors and their neighbours"),
        Setting("object_layer", int, 8, is_layer=True, meaning="encoder layer that chooses the anchors"),
        Setting(
            "deep_layer", int, None, is_layer=True, meaning="encoder layer that ranks the rest; None: the visual feature's"
        ),
        Setting("published_borders", bool, False, meaning="neighbours wrap round a tile's border, as in the released code"),
    )
    colour = "#56B4E9"
    citation = r"""
@misc{liu2025hiprune,
  title = {{HiPrune}: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models},
  author = {Liu, Jizhihui and Du, Feiyi and Zhu, Guangdao and Lian, Niu and Li, Jun and Chen, Bin and Guan, Weili and
            Wang, Yaowei},
  year = {2025},
  eprint = {2508.00553},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2508.00553},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.RECEIVED_ATTENTION}),)

    def layers(self, pruning: VisualTokenPruningConfig, feature_layer: int) -> Sequence[int]:
        deep_layer = feature_layer if pruning.deep_layer is None else pruning.deep_layer
        return sorted({pruning.object_layer, deep_layer})

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        object_scores = evidence.scores[pruning.object_layer]
        return select_hiprune(object_scores, self.importance(evidence, pruning), evidence.valid, pruning)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        # The object layer chooses a tenth of what is kept; the deep layer ranks the rest.
        return evidence.scores[evidence.layer(pruning.deep_layer)]


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
    check_tiles(valid, object_scores=object_scores, deep_scores=deep_scores)
    settings = settings_of("hiprune", pruning)
    cells = valid.flatten(1)
    total = totals_of_tiles(cells, settings)
    # A table, as for the totals: Python's own arithmetic rounds.
    table = [_anchors_of_budget(budget, settings.alpha) for budget in range(cells.shape[1] + 1)]
    anchors = keep_best(descending_rank(object_scores.flatten(1)), cells, torch.tensor(table, device=valid.device)[total])
    neighbours = _neighbours_on_flat_index if settings.published_borders else _neighbours
    kept = (anchors | neighbours(anchors.view_as(valid)).flatten(1)) & cells
    registers = keep_best(descending_rank(deep_scores.flatten(1)), cells & ~kept, total - kept.sum(1))
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
