"""How tokens of LLaVA-OneVision lie: resampled crops, images that share a prompt, and pooled frames of videos."""

import functools
import math
from typing import Any

from ..pruning.checked_values import MOST_CELLS, positive_integer, shown
from ..pruning.layout import StitchedViews, TokenLayout, cells_per_side, stitched_crops
from ..pruning.settings import VisualTokenPruningConfig

# Stock resamples crops that have more cells than its limit by this factor, in each direction.
_RESAMPLED_ABOVE = 1.1


def most_tiles_of(vision_aspect_ratio: Any) -> int:
    """How many tiles' cells stock lets the crops of an image have: 9 for "anyres_max_9".

    Raises:
        ValueError: for another form, which stock fails on.
    """
    text = vision_aspect_ratio if isinstance(vision_aspect_ratio, str) else ""
    number = text.removeprefix("anyres_max_")
    if not number.isdecimal() or not text.startswith("anyres_max_") or int(number) < 1:
        raise ValueError(
            f"`vision_aspect_ratio` is {shown(vision_aspect_ratio)}; it must be 'anyres_max_' and a number of tiles from 1, "
            "such as 'anyres_max_9', in the configuration and in the processor."
        )
    return int(number)


@functools.lru_cache(maxsize=1024)
def llava_onevision_layout(
    height: int,
    width: int,
    alone: bool,
    pruning: VisualTokenPruningConfig,
    tile_size: int,
    patch_size: int,
    pinpoints: tuple[tuple[int, int], ...],
    vision_aspect_ratio: str,
) -> TokenLayout:
    """The layout of an image, remembered for repeated arguments.

    Args:
        height, width: of the image in pixels.
        alone: whether it is the only image of its prompt; others get no crops.
        pruning: which tokens to keep.
        tile_size, patch_size: sides of a tile and of a cell in pixels.
        pinpoints: the resolutions (height, width) that crops may form, in pixels.
        vision_aspect_ratio: above which number of cells crops are resampled.

    Raises:
        ValueError: for tiles smaller than a patch, pinpoints that do not divide into tiles, more than 2**17 cells an image, and
            crops so thin that resampling leaves none.
    """
    grid = cells_per_side(tile_size, patch_size)
    covered = grid * patch_size / tile_size
    if not alone:
        # Stock pads to a square.
        side = max(height, width)
        left, top = -((side - width) // 2), -((side - height) // 2)
        tile = StitchedViews(grid, grid, newlines="end", box=(left, top, left + side, top + side), covered=covered)
        return TokenLayout((height, width), pruning, (tile,))
    crops = stitched_crops(height, width, grid, tile_size, pinpoints, covered)
    rows, columns = len(crops.used_rows), len(crops.used_columns)
    # The order of the float operations is upstream's: it matters.
    ratio = math.sqrt(rows * columns / (most_tiles_of(vision_aspect_ratio) * grid**2))
    if ratio > _RESAMPLED_ABOVE:
        if rows < ratio or columns < ratio:
            raise ValueError(
                f"an image of {height} x {width} pixels has crops of {rows} x {columns} cells, which transformers would "
                "resample to none. Give an image that is less narrow."
            )
        crops = StitchedViews(
            int(rows // ratio), int(columns // ratio), newlines="rows", box=_used_box(crops), resampled_from=(crops,)
        )
    return TokenLayout((height, width), pruning, (StitchedViews(grid, grid, covered=covered), crops))


def _used_box(crops: StitchedViews) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of the image, of the stitched cells that stock uses."""

    def place(cell: int, start: float, end: float, views: int, cells: int, is_end: bool) -> float:
        size = (end - start) / views
        view = (cell - is_end) // cells
        return start + size * (view + (cell - view * cells) / cells * crops.covered)

    left, top, right, bottom = crops.box or (0.0, 0.0, 0.0, 0.0)
    across, down = (left, right, crops.across, crops.columns), (top, bottom, crops.down, crops.rows)
    return (
        place(crops.used_columns.start, *across, False),
        place(crops.used_rows.start, *down, False),
        place(crops.used_columns.stop, *across, True),
        place(crops.used_rows.stop, *down, True),
    )


@functools.lru_cache(maxsize=1024)
def llava_onevision_video_layout(
    frames: int,
    pruning: VisualTokenPruningConfig,
    grid: int,
    tile_size: int,
    patch_size: int,
    image_size: tuple[int, int] | None = None,
) -> TokenLayout:
    """The layout of a video, remembered for repeated arguments: pooled frames in their order, and one newline.

    Args:
        frames: how many.
        pruning: which tokens to keep. Its `video_scope` says whether each frame is a view, or all of them one.
        grid: cells per side of a frame before pooling.
        tile_size, patch_size: sides of a frame and of such a cell in pixels, as the tower sees them.
        image_size: (height, width) of the original frames in pixels.

    Raises:
        ValueError: for no frame, and more than 2**17 cells a video.
    """
    pooled = math.ceil(grid / 2)
    most = MOST_CELLS // grid**2
    if not 1 <= positive_integer("frames", frames, "frames") <= most:
        raise ValueError(f"a video has {frames} frames of {grid} x {grid} cells; {most} frames are allowed. Give fewer frames.")
    seen = StitchedViews(grid, grid)
    frame = StitchedViews(pooled, pooled, covered=grid * patch_size / tile_size, resampled_from=(seen,))
    if pruning.video_scope == "video":
        together = frame._replace(rows=frames * pooled, newlines="end", resampled_from=(seen,) * frames)
        return TokenLayout(None, pruning, (together,))
    return TokenLayout(image_size, pruning, (*(frame,) * (frames - 1), frame._replace(newlines="end")))
