"""The method "none": everything stays, as in the stock model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pruning.evidence import ViewEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import VisualTokenPruningConfig
from .base import PruningMethod


class KeepEverything(PruningMethod):
    """No pruning at all: what the other methods are compared with."""

    name = "none"
    rule = "everything, as the stock model"
    default_retention_ratio = None
    keeps_everything = True
    knows_inclusion = True

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        return layout.valid_per_view

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return evidence.valid

    def inclusion(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return torch.ones(evidence.valid.shape, dtype=torch.float32, device=evidence.valid.device)
