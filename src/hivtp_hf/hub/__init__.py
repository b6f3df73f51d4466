"""Pruned checkpoints published on the Hub. Never travels with them."""

from .push import PushedCheckpoint, push_checkpoint

__all__ = ["PushedCheckpoint", "push_checkpoint"]
