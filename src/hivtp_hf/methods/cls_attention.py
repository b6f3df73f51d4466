"""The class token's attention: of every view the cells to which the class token attends most.

Source: FasterVLM, arXiv 2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467, which merges the others into a few
more where we drop them. The count per view is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..pruning.evidence import EncoderFacts, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .ranking import descending_rank, keep_best, totals_of_views


class ClassAttention(PruningMethod):
    """The class token's attention in one layer."""

    name = "cls_attention"
    rule = "what the class token attends to most (FasterVLM, arXiv 2412.01818; VisionZip, arXiv 2412.04467)"
    settings = (Setting("layer", int, None, is_layer=True, meaning="encoder layer; None: the visual feature's"),)
    colour = "#009E73"
    citation = r"""
@misc{zhang2024fastervlm,
  title = {{[CLS]} Attention is All You Need for Training-Free Visual Token Pruning: Make {VLM} Inference Faster},
  author = {Zhang, Qizhe and Cheng, Aosong and Lu, Ming and Zhuo, Zhiyong and Wang, Minqi and Cao, Jiajun and Guo, Shaobo and
            She, Qi and Zhang, Shanghang},
  year = {2024},
  eprint = {2412.01818},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2412.01818},
}

@misc{yang2024visionzip,
  title = {{VisionZip}: Longer is Better but Not Necessary in Vision Language Models},
  author = {Yang, Senqiao and Chen, Yukang and Tian, Zhuotao and Wang, Chengyao and Li, Jingyao and Yu, Bei and Jia, Jiaya},
  year = {2024},
  eprint = {2412.04467},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2412.04467},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.CLASS_ATTENTION}),)

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return (encoder.layer(pruning, "layer"),)

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_cls_attention(self.importance(evidence, pruning), evidence.valid, pruning)

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return evidence.class_attention[evidence.encoder.layer(pruning, "layer")]


def select_cls_attention(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The cells with the highest scores, of views of one shape at once.

    Args:
        scores: (views, rows, columns), any float dtype, how much of its attention the class token gives to each cell, heads
            averaged; compared in float32.
        valid: bool (views, rows, columns) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "cls_attention" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells, whatever the scores;
        equal scores go to the lower raster index.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2412.01818; arXiv 2412.04467.
    """
    check_views(valid, scores=scores)
    settings = settings_of("cls_attention", pruning)
    cells = valid.flatten(1)
    total = totals_of_views(cells, settings)
    return keep_best(descending_rank(scores.flatten(1)), cells, total).view_as(valid)
