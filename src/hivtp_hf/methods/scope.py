"""SCOPE's selection: repeatedly the cell that covers most of what is not covered yet, weighed by how salient it is.

Source: arXiv 2510.24214, from its formulas. The sum of attention over heads is their mean here, which ranks alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..pruning.evidence import CellFeatures, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import check_views, settings_of
from .greedy import (
    SALIENCY_LAYER,
    SalientGreedyMethod,
    check_features,
    coverage_order,
    is_picked,
    not_negative,
    order_in_views,
    picks_of_views,
    saliency_of_views,
)


class Scope(SalientGreedyMethod):
    """SCOPE: by saliency and by what is covered."""

    name = "scope"
    rule = "what covers most that is not covered yet, times its saliency (SCOPE, arXiv 2510.24214)"
    settings = (
        Setting("saliency_power", float, 1.0, 0, 4, meaning="the power to which saliency is taken; 0 leaves it out"),
        SALIENCY_LAYER,
    )
    colour = "#8C564B"
    citation = r"""
@misc{deng2025scope,
  title = {{SCOPE}: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel {LLMs}},
  author = {Deng, Jinhong and Li, Wen and Zhou, Joey Tianyi and He, Yang},
  year = {2025},
  eprint = {2510.24214},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2510.24214},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (
            frozenset({Evidence.CLASS_ATTENTION, Evidence.ENCODED}),
            frozenset({Evidence.RECEIVED_ATTENTION, Evidence.ENCODED}),
            frozenset({Evidence.RECEIVED_ATTENTION, Evidence.FEATURES}),
        )

    def order(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        features = evidence.features if evidence.encoded is None else evidence.encoded
        return _scope_order(features, saliency_of_views(evidence, pruning), evidence.valid, pruning)


def select_scope(
    features: Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells that SCOPE keeps, of views of one shape at once.

    With S the cosines of features and c = 0 at first, it picks the cell j of highest sum over u of max(0, S_uj - c_u), times
    saliency_j ^ `saliency_power`, sets c_u to the larger of c_u and S_uj, and begins again.

    Args:
        features: (views, rows, columns, hidden), any float dtype; as published, what the encoder says before the projector.
        saliency: (views, rows, columns), any float dtype, not negative.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "scope" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells; equal gains go to the
        lower raster index. Features that are zero or not finite resemble nothing.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2510.24214.
    """
    check_views(valid, saliency=saliency)
    check_features(features, valid)
    return is_picked(_scope_order(features, saliency, valid, settings_of("scope", pruning)))


def _scope_order(features: CellFeatures | Tensor, saliency: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    weights = not_negative(saliency).flatten(1).pow(pruning.saliency_power)
    return order_in_views(
        features,
        valid,
        picks_of_views(valid, pruning),
        lambda similarity, cells, picks, views, band: coverage_order(similarity, weights[views, band], cells, picks),
    )
