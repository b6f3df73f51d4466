"""Checkpoints served over HTTP, by transformers' own server. Never travels with them."""

from .transformers_server import Server

__all__ = ["Server"]
