"""Pictures of what pruning keeps. Needs Pillow (`pip install "hivtp-hf[images]"`); nothing else of the package does."""

from .kept_cells import draw_kept_cells

__all__ = ["draw_kept_cells"]
