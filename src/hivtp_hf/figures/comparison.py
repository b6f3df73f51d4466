"""`draw_comparison`: one image as several methods and ratios see it, in a table of panels."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pruning.layout import TokenLayout
from .kept_cells import checked_arguments, draw_tiles, size_of_panel

# In pixels.
PANEL_SIDE = 300
MARGIN = 8
CAPTION_HEIGHT = 22
ROW_TITLE_WIDTH = 60

_BACKGROUND = (255, 255, 255)
_CAPTION = (30, 30, 30)


def draw_comparison(
    image: Image.Image,
    rows: Sequence[str],
    columns: Mapping[str, Sequence[tuple[TokenLayout, Tensor] | None]],
) -> Image.Image:
    """Draws the kept cells of one image several times over, a column for each method and a row for each ratio.

    A panel shows the crops, or the base tile where there are none, under the number of tokens kept.

    Args:
        image: the image that the processor was given, in any mode.
        rows: titles of the rows.
        columns: by title, for every row the layout and the kept indices, as for `draw_kept_cells`; None leaves a gap.

    Returns:
        An RGB picture. The longer side of a panel measures `PANEL_SIDE` pixels.

    Raises:
        ValueError: as `draw_kept_cells`, and for columns of another length than `rows`.
    """
    wrong = [title for title, column in columns.items() if len(column) != len(rows)]
    if wrong:
        raise ValueError(f"the column {wrong[0]!r} has {len(columns[wrong[0]])} panels; it must have one for each of {rows}.")
    width, height = size_of_panel(image, PANEL_SIDE)
    step_right, step_down = max(width, 160) + MARGIN, height + CAPTION_HEIGHT + MARGIN
    size = (ROW_TITLE_WIDTH + step_right * len(columns), CAPTION_HEIGHT + step_down * len(rows))
    picture = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for number, title in enumerate(rows):
        top = CAPTION_HEIGHT + step_down * number
        draw.text((MARGIN, top + CAPTION_HEIGHT + height // 2), title, fill=_CAPTION, font=font, anchor="lm")
    for column_number, (title, column) in enumerate(columns.items()):
        left = ROW_TITLE_WIDTH + step_right * column_number
        draw.text((left, CAPTION_HEIGHT // 2), title, fill=_CAPTION, font=font, anchor="lm")
        for row_number, shown in enumerate(column):
            if shown is None:
                continue
            layout, kept_indices = shown
            kept_indices = checked_arguments(image, layout, kept_indices)
            tiles = range(1, layout.num_views) if layout.num_views > 1 else range(1)
            panel, _, _ = draw_tiles(image, layout, kept_indices, tiles, PANEL_SIDE)
            top = CAPTION_HEIGHT + step_down * row_number
            caption = f"{len(kept_indices)} of {layout.num_stock} tokens"
            draw.text((left, top + CAPTION_HEIGHT // 2), caption, fill=_CAPTION, font=font, anchor="lm")
            picture.paste(panel, (left, top + CAPTION_HEIGHT))
    return picture
