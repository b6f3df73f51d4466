"""ID-Selection: repeatedly the most important cell, which takes importance from those that resemble it.

Source: arXiv 2604.05601, from its formulas.
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
    saliency_of_views,
    suppression_order,
)


class IDSelection(SalientGreedyMethod):
    """ID-Selection: by importance and diversity."""

    name = "id_selection"
    rule = "the most important, which suppresses what resembles it (ID-Selection, arXiv 2604.05601)"
    settings = (
        Setting(
            "sharpness",
            float,
            20.0,
            0,
            meaning="how fast suppression falls with the distance of features",
            search=(0.5, 100),
        ),
        SALIENCY_LAYER,
    )
    colour = "#BCBD22"
    citation = r"""
@misc{huang2026idselection,
  title = {{ID-Selection}: Importance-Diversity Based Visual Token Selection for Efficient {LVLM} Inference},
  author = {Huang, Zhaohong and Liu, Wenjing and Zhang, Yuxin and Chao, Fei and Ji, Rongrong},
  year = {2026},
  eprint = {2604.05601},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2604.05601},
}
"""

    def order(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return _id_selection_order(evidence.features, saliency_of_views(evidence, pruning), evidence.valid, pruning)


def select_id_selection(
    features: Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells that ID-Selection keeps, of views of one shape at once.

    With S the cosines of features and s the saliency, scaled to span 0 to 1 in every view, it picks the cell i of highest s,
    takes exp(-`sharpness` (1 - S_ij)^2) s_i from the s_j of all others, not below 0, and begins again.

    Args:
        features: (views, rows, columns, hidden), any float dtype; as published, projected.
        saliency: (views, rows, columns), any float dtype.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "id_selection" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells; equal scores go to the
        lower raster index. Features that are zero or not finite resemble nothing.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2604.05601.
    """
    check_views(valid, saliency=saliency)
    check_features(features, valid)
    return is_picked(_id_selection_order(features, saliency, valid, settings_of("id_selection", pruning)))


def _id_selection_order(
    features: CellFeatures | Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig
) -> Tensor:
    scores = from_zero_to_one(saliency.flatten(1), valid.flatten(1))
    return order_in_views(
        features,
        valid,
        picks_of_views(valid, pruning),
        lambda similarity, cells, picks, views, band: suppression_order(
            similarity, scores[views, band], cells, picks, pruning.sharpness
        ),
    )
