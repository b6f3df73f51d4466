"""The determinantal selection: greedily the cells whose features span most volume, CDPruner's half that asks no question.

Source: arXiv 2506.10967, from its formulas. With the question, CDPruner weighs similarities by CLIP's own text encoder, which
vision-language checkpoints do not carry.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..pruning.evidence import CellFeatures, Evidence, ViewEvidence
from ..pruning.settings import VisualTokenPruningConfig
from .base import check_views, settings_of
from .greedy import GreedyMethod, check_features, determinant_order, is_picked, order_in_views, picks_of_views


class DPP(GreedyMethod):
    """Determinantal: by the volume that features span."""

    name = "dpp"
    rule = "what spans most volume, without the question (CDPruner, arXiv 2506.10967)"
    colour = "#9467BD"
    citation = r"""
@misc{zhang2025cdpruner,
  title = {Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in {MLLMs}},
  author = {Zhang, Qizhe and Liu, Mengzhen and Li, Lichen and Lu, Ming and Zhang, Yuan and Pan, Junwen and She, Qi and
            Zhang, Shanghang},
  year = {2025},
  eprint = {2506.10967},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2506.10967},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.FEATURES}),)

    def order(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return _dpp_order(evidence.features, evidence.valid, pruning)


def select_dpp(features: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells that a greedy determinantal selection keeps, of views of one shape at once.

    It picks the cell whose feature, at length 1, has most left beyond the span of those picked, and begins again. Where at most
    1e-4 of any squared length is left, which happens at the features' rank, what is missing is filled up by the other cells at
    even distances in raster order.

    Args:
        features: (views, rows, columns, hidden), any float dtype; as published, projected.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "dpp" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells; equal volumes go to
        the lower raster index. Features that are zero or not finite span nothing.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2506.10967.
    """
    check_views(valid)
    check_features(features, valid)
    return is_picked(_dpp_order(features, valid, settings_of("dpp", pruning)))


def _dpp_order(features: CellFeatures | Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    width = features.shape[-1] if isinstance(features, Tensor) else features.width
    return order_in_views(
        features,
        valid,
        picks_of_views(valid, pruning),
        lambda similarity, cells, picks, views, band: determinant_order(similarity, cells, picks, width),
    )
