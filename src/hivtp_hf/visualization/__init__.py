"""Pictures of what pruning keeps. Needs Pillow (`pip install "hivtp-hf[images]"`); nothing else of the package does."""

from .comparison import draw_comparison
from .kept_cells import draw_kept_cells

__all__ = ["draw_comparison", "draw_kept_cells"]
