"""Pruned checkpoints made of stock ones, in folders. Never travels with them."""

from .convert import convert_checkpoint

__all__ = ["convert_checkpoint"]
