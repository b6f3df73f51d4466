"""Checkpoints served over HTTP, by transformers' own server. Never travels with them."""

from .servable_checkpoint import check_servable
from .transformers_server import Server

__all__ = ["Server", "check_servable"]
