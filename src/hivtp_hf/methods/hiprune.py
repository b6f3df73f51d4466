"""HiPrune's selection: anchors and their neighbours by one encoder layer's attention, the rest by a deeper layer's.

Source: arXiv 2508.00553, section 3. The count per view is ours; the released code divides one budget over an image's views.

Reference compatibility: with `published_borders` this returns what the authors' released selection returns for one view, cell
for cell (tests/data/hiprune.npz).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import EncoderFacts, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .ranking import descending_rank, keep_best, totals_of_views

# The paper's choice for CLIP ViT-L/14.
_OBJECT_LAYER = 8


class HiPrune(PruningMethod):
    """HiPrune: by the attention that cells receive in a middle and in a deep layer."""

    name = "hiprune"
    rule = "anchors of a middle layer with their neighbours, and the best of a deep layer (arXiv 2508.00553)"
    settings = (
        Setting("alpha", float, 0.1, 0, 1, meaning="share of the budget for anchors and their neighbours"),
        Setting(
            "object_layer",
            int,
            None,
            is_layer=True,
            meaning=f"encoder layer that chooses the anchors; None: the family's own, {_OBJECT_LAYER} where it has none",
        ),
        Setting(
            "deep_layer", int, None, is_layer=True, meaning="encoder layer that ranks the rest; None: the visual feature's"
        ),
        Setting(
            "published_borders",
            bool,
            False,
            meaning="neighbours wrap round a view's border, as in the released code",
            search=(),
        ),
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

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return sorted({encoder.layer(pruning, "object_layer", _OBJECT_LAYER), encoder.layer(pruning, "deep_layer")})

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        object_scores = evidence.received[evidence.encoder.layer(pruning, "object_layer", _OBJECT_LAYER)]
        return select_hiprune(object_scores, self.importance(evidence, pruning), evidence.valid, pruning)

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        # The object layer chooses a tenth of what is kept; the deep layer ranks the rest.
        return evidence.received[evidence.encoder.layer(pruning, "deep_layer")]


def select_hiprune(
    object_scores: Tensor,
    deep_scores: Tensor,
    valid: Tensor,
    pruning: VisualTokenPruningConfig | Mapping[str, Any],
) -> Tensor:
    """The cells that HiPrune keeps, of views of one shape at once.

    Of a view's budget, the share `alpha` goes to anchors (the cells with the highest object scores) and buffers (the four
    direct neighbours of every anchor), the rest to registers (the other cells with the highest deep scores).

    Args:
        object_scores: (views, rows, columns), any float dtype, the attention that each cell receives in the object layer;
            compared in float32.
        deep_scores: the same of the deep layer.
        valid: bool (views, rows, columns) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "hiprune" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells, whatever the scores;
        equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2508.00553, section 3.
    """
    check_views(valid, object_scores=object_scores, deep_scores=deep_scores)
    settings = settings_of("hiprune", pruning)
    cells = valid.flatten(1)
    total = totals_of_views(cells, settings)
    # A table, as for the totals: Python's own arithmetic rounds.
    table = [_anchors_of_budget(budget, settings.alpha) for budget in range(cells.shape[1] + 1)]
    anchors = keep_best(descending_rank(object_scores.flatten(1)), cells, torch.tensor(table, device=valid.device)[total])
    neighbours = _neighbours_on_flat_index if settings.published_borders else _neighbours
    kept = (anchors | neighbours(anchors.view_as(valid)).flatten(1)) & cells
    registers = keep_best(descending_rank(deep_scores.flatten(1)), cells & ~kept, total - kept.sum(1))
    return (kept | registers).view_as(valid)


def _anchors_of_budget(budget: int, alpha: float) -> int:
    """How many anchors share `alpha` of a view's budget with four buffers each; so few that all of these always fit."""
    return min(round(budget * alpha / 5), budget // 5)


def _neighbours(anchors: Tensor) -> Tensor:
    """The cells above, below, left and right of anchors, bool (views, rows, columns); outside the view there are none."""
    near = torch.zeros_like(anchors)
    near[:, 1:] |= anchors[:, :-1]
    near[:, :-1] |= anchors[:, 1:]
    near[:, :, 1:] |= anchors[:, :, :-1]
    near[:, :, :-1] |= anchors[:, :, 1:]
    return near


def _neighbours_on_flat_index(anchors: Tensor) -> Tensor:
    """The released code's neighbours, bool (views, rows, columns): raster indices i - 1, i + 1, i - columns and i + columns.

    Left and right of the border lies the next row's end. What falls off the view lands on its first or last cell.
    """
    flat = anchors.flatten(1)
    near = torch.zeros_like(flat)
    for step in (1, anchors.shape[2]):
        near[:, step:] |= flat[:, :-step]
        near[:, :-step] |= flat[:, step:]
        near[:, 0] |= flat[:, :step].any(1)
        near[:, -1] |= flat[:, -step:].any(1)
    return near.view_as(anchors)
