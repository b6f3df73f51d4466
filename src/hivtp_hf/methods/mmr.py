"""Maximal marginal relevance: repeatedly the cell with the best balance of importance and of being unlike those picked.

Source: Carbonell and Goldstein, SIGIR 1998, of documents; as others compare with it, of visual tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..pruning.evidence import CellFeatures, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import check_views, settings_of
from .greedy import (
    SALIENCY_LAYER,
    SalientGreedyMethod,
    check_features,
    from_zero_to_one,
    is_picked,
    order_in_views,
    picks_of_views,
    relevance_order,
    saliency_of_views,
)


class MMR(SalientGreedyMethod):
    """Maximal marginal relevance: by importance less similarity."""

    name = "mmr"
    rule = "a balance of importance and of being unlike what is kept (maximal marginal relevance, SIGIR 1998)"
    settings = (
        Setting("relevance", float, 0.5, 0, 1, meaning="the share of importance; the rest is that of being unlike"),
        SALIENCY_LAYER,
    )
    colour = "#7F7F7F"
    citation = r"""
@inproceedings{carbonell1998mmr,
  title = {The Use of {MMR}, Diversity-Based Reranking for Reordering Documents and Producing Summaries},
  author = {Carbonell, Jaime and Goldstein, Jade},
  booktitle = {Proceedings of the 21st Annual International {ACM} {SIGIR} Conference},
  year = {1998},
  doi = {10.1145/290941.291025},
}
"""

    def order(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return _mmr_order(evidence.features, saliency_of_views(evidence, pruning), evidence.valid, pruning)


def select_mmr(
    features: Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells that maximal marginal relevance keeps, of views of one shape at once.

    With S the cosines of features and s the saliency, scaled to span 0 to 1 in every view, it repeatedly picks the cell j of
    highest `relevance` s_j - (1 - `relevance`) m_j. There m_j is the largest S_ij of a cell i picked before, and 0 at first.

    Args:
        features: (views, rows, columns, hidden), any float dtype; projected ones are meant.
        saliency: (views, rows, columns), any float dtype.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "mmr" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells; equal scores go to the
        lower raster index. Features that are zero or not finite resemble nothing.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.
    """
    check_views(valid, saliency=saliency)
    check_features(features, valid)
    return is_picked(_mmr_order(features, saliency, valid, settings_of("mmr", pruning)))


def _mmr_order(features: CellFeatures | Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    scores = from_zero_to_one(saliency.flatten(1), valid.flatten(1))
    return order_in_views(
        features,
        valid,
        picks_of_views(valid, pruning),
        lambda similarity, cells, picks, views, band: relevance_order(
            similarity, scores[views, band], cells, picks, pruning.relevance
        ),
    )
