"""Checkpoints to start from, in folders and on the Hub: found and read, never executed. Never travels with them."""

from .checkpoint_source import CheckpointSource, open_source

__all__ = ["CheckpointSource", "open_source"]
