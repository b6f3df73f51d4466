"""`draw_kept_cells`: the kept visual tokens of one image, as a picture."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..pruning.layout import TokenLayout

# In pixels. Panels have one size for all images: small images would lack the room for borders, large ones need no more.
PANEL_SIDE = 720
FRAME_SIDE = 320
MARGIN = 12
CAPTION_HEIGHT = 28

# Levels of grey to which black and white fade where a cell is dropped: between them, so that kept cells stand out in the
# dark and in the bright parts of a photograph alike.
_FADED_BLACK, _FADED_WHITE = 95, 150
_BACKGROUND = (255, 255, 255)
_CAPTION = (30, 30, 30)
_CELL_BORDER = (0, 0, 0)
_TILE_BORDER = (255, 204, 0)


def draw_kept_cells(image: Image.Image, layout: TokenLayout, kept_indices: Tensor) -> Image.Image:
    """Draws which cells of an image are kept: left those of the base tile, right those of the crops, if there are any.

    Kept cells show the photograph as it is, everything else fades to grey, also what the stock model does not see: the few
    pixels at the border that un-padding takes, or what a centre crop leaves out. Yellow lines separate the tiles. Newline
    tokens show no cell.

    Args:
        image: the image that the processor was given, in any mode.
        layout: the layout of its size, `processor.token_layout(image.height, image.width)`.
        kept_indices: int64 (n,) on any device, positions in the packed sequence:
            `model.model.get_image_features(...).kept_indices[i]`.

    Returns:
        An RGB picture with the panels side by side under their captions. The longer side of a panel measures `PANEL_SIDE`
        pixels, so an image of that size is drawn pixel by pixel.

    Raises:
        ValueError: for anything but a PIL image, an image of another size than the layout's, and indices that are no
            positions of the layout's packed sequence.
    """
    kept_indices = checked_arguments(image, layout, kept_indices)
    drawn = []
    for title, tiles in panels_of(layout):
        panel, kept, cells = draw_tiles(image, layout, kept_indices, tiles, PANEL_SIDE)
        drawn.append((f"{title}: {kept} of {cells} cells kept", panel))
    return _side_by_side(drawn)


def draw_kept_frames(frames: Sequence[Image.Image], layout: TokenLayout, kept_indices: Tensor) -> Image.Image:
    """Draws which cells of the frames of a video are kept, frames side by side, as `draw_kept_cells` draws an image.

    Args:
        frames: the images that the processor was given, all of one size.
        layout: theirs, each frame a view of its own, `processor.video_token_layout(len(frames), image_size=(height, width))`
            under `video_scope="frame"`; also for tokens that were chosen among all frames, as positions are the same.
        kept_indices: int64 (n,) on any device, positions in the packed sequence of the video:
            `model.get_video_features(...).kept_indices[i]`.

    Raises:
        ValueError: as `draw_kept_cells`, and for another number of frames than the layout's.
    """
    if len(frames) != layout.num_views or not frames:
        raise ValueError(
            f"`frames` has {len(frames)} images, `layout` {layout.num_views} views; there must be a view for each frame. Build "
            'it with `video_scope="frame"`.'
        )
    for frame in frames:
        kept_indices = checked_arguments(frame, layout, kept_indices)
    drawn = []
    for number, frame in enumerate(frames):
        panel, kept, cells = draw_tiles(frame, layout, kept_indices, range(number, number + 1), FRAME_SIDE)
        drawn.append((f"Frame {number + 1}: {kept} of {cells}", panel))
    return _side_by_side(drawn)


def panels_of(layout: TokenLayout) -> list[tuple[str, range]]:
    """The titles and tiles of an image's panels: the base tile, and the crops where there are any."""
    if len(layout.parts) == 1:
        return [("Whole image", range(layout.num_views))]
    crops = layout.num_tiles - 1
    return [("Base tile", range(1)), ("1 crop" if crops == 1 else f"{crops} crops", range(1, layout.num_views))]


def draw_tiles(
    image: Image.Image, layout: TokenLayout, kept_indices: Tensor, tiles: range, panel_side: int
) -> tuple[Image.Image, int, int]:
    """One panel: an image with the kept cells of some of its tiles.

    Args:
        image, layout, kept_indices: as `draw_kept_cells` takes and checks them.
        tiles: the base tile, `range(1)`, or crops.
        panel_side: longer side of the panel in pixels.

    Returns:
        The panel, and how many cells of these tiles are kept, and how many there are.
    """
    panel_size = size_of_panel(image, panel_side)
    bright = image.convert("RGB").resize(panel_size, Image.Resampling.LANCZOS)
    faded = ImageOps.colorize(bright.convert("L"), (_FADED_BLACK,) * 3, (_FADED_WHITE,) * 3)

    cells, boxes = boxes_of_tiles(layout, torch.arange(layout.num_stock), tiles, image.size, panel_size)
    kept, kept_boxes = boxes_of_tiles(layout, kept_indices, tiles, image.size, panel_size)
    panel = _draw_panel(bright, faded, kept_boxes.tolist())
    draw_tile_borders(panel, boxes, cells[:, 0], _TILE_BORDER)
    return panel, len(kept), len(cells)


def size_of_panel(image: Image.Image, panel_side: int) -> tuple[int, int]:
    """Width and height in pixels of a panel of an image whose longer side is to measure `panel_side`."""
    scale = panel_side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def checked_arguments(image: Any, layout: TokenLayout, kept_indices: Any) -> Tensor:
    """The indices on the CPU, ascending; ValueError as `draw_kept_cells`."""
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"`image` is a {type(image).__name__}; it must be a PIL image. Use `PIL.Image.open(path)`, or "
            "`PIL.Image.fromarray(array)` for an array of bytes (height, width, 3)."
        )
    if layout.image_size is None:
        raise ValueError(
            "`layout` was built without the image's size. Take `processor.token_layout(image.height, image.width)`, or give "
            "`image_size` to `TokenLayout.single_tile`."
        )
    height, width = layout.image_size
    if (image.height, image.width) != (height, width):
        raise ValueError(
            f"`image` has {image.height} x {image.width} pixels (height x width), `layout` is that of {height} x {width}. "
            "Build it with `processor.token_layout(image.height, image.width)`; for a photograph that its EXIF data rotates, "
            "take `PIL.ImageOps.exif_transpose(image)`, as transformers does."
        )
    if not isinstance(kept_indices, Tensor) or kept_indices.dtype != torch.int64 or kept_indices.ndim != 1:
        given = type(kept_indices).__name__
        if isinstance(kept_indices, Tensor):
            given = f"{kept_indices.dtype} tensor of shape {tuple(kept_indices.shape)}"
        raise ValueError(
            f"`kept_indices` is a {given}; it must be an int64 tensor of shape (n,). Pass the one of this image, "
            "`get_image_features(...).kept_indices[i]`."
        )
    kept_indices = kept_indices.cpu().unique()
    outside = kept_indices[(kept_indices < 0) | (kept_indices >= layout.num_stock)]
    if len(outside):
        raise ValueError(
            f"`kept_indices` contains {int(outside[0])}; an image of {height} x {width} pixels has the positions 0 to "
            f"{layout.num_stock - 1}. Pass the indices and the layout of the same image and the same processor."
        )
    return kept_indices


def boxes_of_tiles(
    layout: TokenLayout, indices: Tensor, tiles: range, image_size: tuple[int, int], panel_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The cells of some tiles that tokens show, and where they lie in a panel.

    Args:
        layout: of the image.
        indices: of the tokens, int64 (n,).
        tiles: the base tile, `range(1)`, or crops.
        image_size, panel_size: (width, height) in pixels.

    Returns:
        Tile, row and column, int64 (cells, 3); and left, top, right, bottom in whole pixels, int64 (cells, 4), of which the
        last two lie outside the cell.
    """
    cells = layout.cells(indices)
    inside = (cells[:, 0] >= tiles.start) & (cells[:, 0] < tiles.stop)
    scale = torch.tensor([panel_size[0] / image_size[0], panel_size[1] / image_size[1]] * 2, dtype=torch.float64)
    return cells[inside], (layout.pixel_boxes(indices)[inside] * scale).round().long()


def _draw_panel(bright: Image.Image, faded: Image.Image, boxes: list[list[int]]) -> Image.Image:
    panel = faded.copy()
    draw = ImageDraw.Draw(panel)
    for left, top, right, bottom in boxes:
        if right > left and bottom > top:
            panel.paste(bright.crop((left, top, right, bottom)), (left, top))
            # One line between two cells, not two: each cell draws its upper and left border only.
            draw.line([(left, bottom - 1), (left, top), (right - 1, top)], fill=_CELL_BORDER)
    return panel


def draw_tile_borders(panel: Image.Image, boxes: Tensor, tile_of_cell: Tensor, colour: tuple[int, int, int]) -> None:
    """Lines where one tile ends and the next begins; none around all of them."""
    if not len(boxes):  # un-padding leaves nothing of the crops of a very narrow image
        return
    draw = ImageDraw.Draw(panel)
    first_left, first_top = boxes[:, :2].amin(0).tolist()
    for tile in tile_of_cell.unique():
        corners = boxes[tile_of_cell == tile]
        left, top = corners[:, :2].amin(0).tolist()
        right, bottom = corners[:, 2:].amax(0).tolist()
        if left > first_left:
            draw.line([(left, top), (left, bottom - 1)], fill=colour, width=2)
        if top > first_top:
            draw.line([(left, top), (right - 1, top)], fill=colour, width=2)


def _side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(16)
    # A caption may be wider than the panel of a tall photograph.
    column_width = max(max(panel.width, math.ceil(font.getlength(caption))) for caption, panel in panels)
    size = (MARGIN + (column_width + MARGIN) * len(panels), CAPTION_HEIGHT + panels[0][1].height + MARGIN)
    picture = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for number, (caption, panel) in enumerate(panels):
        left = MARGIN + (column_width + MARGIN) * number
        draw.text((left, CAPTION_HEIGHT // 2), caption, fill=_CAPTION, font=font, anchor="lm")
        picture.paste(panel, (left, CAPTION_HEIGHT))
    return picture
