"""Accuracy of pruned checkpoints on questions about images. Needs Pillow (`pip install "hivtp-hf[images]"`)."""

from .question_tables import Row
from .run import Evaluation, evaluate_checkpoint

__all__ = ["Evaluation", "Row", "evaluate_checkpoint"]
