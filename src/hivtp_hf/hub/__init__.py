"""Checkpoints on disk and on the Hub: made, described and published. Never travels with them."""

from .convert import convert_checkpoint

__all__ = ["convert_checkpoint"]
