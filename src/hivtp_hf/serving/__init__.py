"""Checkpoints served over HTTP, by transformers' own server."""

from .transformers_server import Server

__all__ = ["Server"]
