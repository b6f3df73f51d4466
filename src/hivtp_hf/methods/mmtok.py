"""MMTok's selection, its vision half: the cells that represent all cells best.

Source: arXiv 2508.18264, from its formulas. The other half asks what represents the words of the question; it is not here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import CellFeatures, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import check_views, settings_of
from .folded_matrix import FoldedMatrix
from .greedy import GreedyMethod, Picks, check_features, coverage_order, is_picked, order_in_views, picks_of_views


class MMTok(GreedyMethod):
    """MMTok's vision half: by what is represented."""

    name = "mmtok"
    rule = "what represents all cells best, without the question (MMTok, arXiv 2508.18264)"
    settings = (
        Setting(
            "similarity_temperature",
            float,
            0.2,
            0.001,
            meaning="divides similarities before the softmax over cells",
            search=(0.01, 2),
        ),
    )
    colour = "#17BECF"
    citation = r"""
@misc{dong2025mmtok,
  title = {{MMTok}: Multimodal Coverage Maximization for Efficient Inference of {VLMs}},
  author = {Dong, Sixun and Hu, Juhua and Zhang, Mian and Yin, Ming and Fu, Yanjie and Qian, Qi},
  year = {2025},
  eprint = {2508.18264},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2508.18264},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.ENCODED}), frozenset({Evidence.FEATURES}))

    def order(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        features = evidence.features if evidence.encoded is None else evidence.encoded
        return _mmtok_order(features, evidence.valid, pruning)


def select_mmtok(features: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells that MMTok's vision half keeps, of views of one shape at once.

    With Q the softmax of every row of the cosines of features over `similarity_temperature`, divided by the number of cells,
    and b = 0 at first, it picks the cell j of highest sum over rows u of max(0, Q_uj - b_u), sets b_u to the larger of b_u and
    Q_uj, and begins again.

    Args:
        features: (views, rows, columns, hidden), any float dtype; as published, what the encoder says before the projector.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "mmtok" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells; equal gains go to the
        lower raster index. Features that are zero or not finite resemble nothing.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2508.18264.
    """
    check_views(valid)
    check_features(features, valid)
    return is_picked(_mmtok_order(features, valid, settings_of("mmtok", pruning)))


def _mmtok_order(features: CellFeatures | Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    def picked(similarity: Tensor, cells: Tensor, picks: Picks, views: slice, band: slice) -> Tensor:
        return coverage_order(represented_shares(similarity, cells, pruning.similarity_temperature), None, cells, picks)

    return order_in_views(features, valid, picks_of_views(valid, pruning), picked)


def represented_shares(similarity: Any, valid: Tensor, temperature: float) -> Any:
    """How much each cell (first) represents each (second), float32 (groups, n, n): shares of 1 / n; 0 for cells not valid.

    Args:
        similarity: float32 (groups, n, n), symmetric; overwritten.
        valid: bool (groups, n).
        temperature: divides similarities before the softmax.
    """
    if isinstance(similarity, FoldedMatrix):  # of one group

        def weigh(block: Tensor, rows: slice, columns: slice) -> None:
            block.sub_(1).div_(temperature).exp_().mul_(valid[0, rows, None]).mul_(valid[0, columns])

        similarity.change(weigh)
        smallest = torch.finfo(torch.float32).tiny
        similarity.divide_columns(similarity.column_sums().clamp(min=smallest) * valid[0].sum().clamp(min=1))
        return similarity
    # The matrix is symmetric, so a softmax of its columns is the transpose of one of its rows, and lies as the loop reads it.
    # Cosines are at most 1, so that nothing overflows without the maximum.
    weights = similarity.sub_(1).div_(temperature).exp_().mul_(valid[:, :, None]).mul_(valid[:, None])
    number = valid.sum(1)[:, None, None].clamp(min=1)
    return weights.div_(weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) * number)
