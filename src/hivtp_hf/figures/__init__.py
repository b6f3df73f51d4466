"""Pictures of what pruning keeps. Needs Pillow (`pip install "hivtp-hf[images]"`); nothing else of the package does."""

from .comparison import draw_comparison
from .image_choice import choice_of_image
from .kept_cells import draw_kept_cells, draw_kept_frames
from .score_maps import plot_kept_cells

__all__ = ["choice_of_image", "draw_comparison", "draw_kept_cells", "draw_kept_frames", "plot_kept_cells"]
