"""Accuracy of pruned checkpoints on questions about images. Needs Pillow (`pip install "hivtp-hf[images]"`). Never travels."""

from .evaluate import Evaluation, evaluate_checkpoint
from .rows import Row

__all__ = ["Evaluation", "Row", "evaluate_checkpoint"]
