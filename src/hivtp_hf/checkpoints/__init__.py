"""Checkpoints: opened, converted, pushed, inspected, with their model cards. Read and written, never executed."""

from .checkpoint_source import CheckpointSource, open_source
from .convert import convert_checkpoint
from .inspection import CheckpointReport, inspect_checkpoint
from .model_card import model_card
from .push import PushedCheckpoint, push_checkpoint

__all__ = [
    "CheckpointReport",
    "CheckpointSource",
    "PushedCheckpoint",
    "convert_checkpoint",
    "inspect_checkpoint",
    "model_card",
    "open_source",
    "push_checkpoint",
]
