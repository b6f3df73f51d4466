"""Settings without labels: what any method's settings do to a model's hidden states, searched by a Gaussian process."""

from .run import TunedCheckpoint, tune_checkpoint
from .search import Tuning, tune

__all__ = ["TunedCheckpoint", "Tuning", "tune", "tune_checkpoint"]
