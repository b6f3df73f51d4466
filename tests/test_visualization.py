"""`draw_kept_cells`: every cell lies where arithmetic puts it, in full colour if it is kept and grey if not."""

import numpy as np
import pytest
import torch
from PIL import Image

from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.visualization import draw_kept_cells
from hivtp_hf.visualization.kept_cells import CAPTION_HEIGHT, MARGIN, PANEL_SIDE
from tiny_models import photo

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
INNER = 3  # pixels between a cell's edge and what the tests look at, room for its border


def small_layout(height: int, width: int) -> TokenLayout:
    """8 x 8 cells a tile."""
    pruning = VisualTokenPruningConfig()
    return TokenLayout.from_image_size(height, width, pruning, tile_size=56, patch_size=7, pinpoints=PINPOINTS)


def panels(picture: Image.Image, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the base tile's and of the crops' panel, for panels as wide as their captions or wider."""
    pixels = np.asarray(picture)[CAPTION_HEIGHT : CAPTION_HEIGHT + height]
    return pixels[:, MARGIN : MARGIN + width], pixels[:, 2 * MARGIN + width : 2 * MARGIN + 2 * width]


def assert_drawn(panel: np.ndarray, original: np.ndarray, box: tuple[int, int, int, int], kept: bool) -> None:
    left, top, right, bottom = box
    inside = np.s_[top + INNER : bottom - INNER, left + INNER : right - INNER]
    if kept:
        assert np.array_equal(panel[inside], original[inside]), box
    else:
        assert (panel[inside] == panel[inside][..., :1]).all(), box
        assert not np.array_equal(panel[inside], original[inside]), box


# An image whose longer side is a panel's is not resized. All three have 2 x 2 crops of 8 x 8 cells, each 45 pixels wide; the
# oblong ones fill 10 2/3 of 16 rows or columns, of which stock keeps the 10 whole ones, from 1/3 of a cell on.
@pytest.mark.parametrize(
    ("height", "width", "rows", "columns", "first_top", "first_left"),
    [(720, 720, 16, 16, 0, 0), (480, 720, 10, 16, 15, 0), (720, 480, 16, 10, 0, 15)],
    ids=["square", "wide", "tall"],
)
def test_cells_lie_where_they_belong(height, width, rows, columns, first_top, first_left):
    image, layout = photo(height, width), small_layout(height, width)
    random = np.random.default_rng(1)
    kept_base, kept_crops = random.random((8, 8)) < 0.5, random.random((rows, columns)) < 0.3
    packed_crops = np.pad(kept_crops, ((0, 0), (0, 1)))  # newlines, not kept
    kept_indices = torch.from_numpy(np.flatnonzero(np.concatenate((kept_base.ravel(), packed_crops.ravel()))))

    picture = draw_kept_cells(image, layout, kept_indices)

    assert picture.mode == "RGB"
    assert picture.size == (3 * MARGIN + 2 * width, CAPTION_HEIGHT + height + MARGIN)
    original = np.asarray(image)
    base, crops = panels(picture, height, width)
    for row, column in np.ndindex(8, 8):
        box = (column * width // 8, row * height // 8, (column + 1) * width // 8, (row + 1) * height // 8)
        assert_drawn(base, original, box, kept_base[row, column])
    for row, column in np.ndindex(rows, columns):
        left, top = first_left + 45 * column, first_top + 45 * row
        assert_drawn(crops, original, (left, top, left + 45, top + 45), kept_crops[row, column])
    if first_top:
        assert_drawn(crops, original, (0, 0, width, first_top), kept=False)


def test_tiles_are_separated_and_newlines_invisible():
    image, layout = photo(720, 720), small_layout(720, 720)
    newlines = torch.arange(64 + 16, layout.num_stock, 17)
    picture = draw_kept_cells(image, layout, newlines)
    base, crops = panels(picture, 720, 720)
    assert (base == base[..., :1]).all()
    coloured = (crops != crops[..., :1]).any(-1)
    assert coloured[:, 360].all()
    assert coloured[360].all()
    assert not coloured[:350, :350].any()
    assert picture.tobytes() == draw_kept_cells(image, layout, newlines[:0]).tobytes()


@pytest.mark.parametrize(("height", "width"), [(30, 40), (1500, 2000), (2, 3000), (3000, 2)])
def test_panels_have_one_size_for_all_images(height, width):
    layout = small_layout(height, width)
    picture = draw_kept_cells(photo(height, width), layout, torch.arange(layout.num_stock))
    panel_height = max(1, round(PANEL_SIDE * min(1, height / width)))
    assert picture.height == CAPTION_HEIGHT + panel_height + MARGIN
    assert picture.width >= 3 * MARGIN + 2 * round(PANEL_SIDE * min(1, width / height))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_is_drawn(mode):
    image, layout = photo(72, 96).convert(mode), small_layout(72, 96)
    kept_indices = torch.arange(0, layout.num_stock, 2)
    expected = draw_kept_cells(image.convert("RGB"), layout, kept_indices)
    assert draw_kept_cells(image, layout, kept_indices).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("image", "kept_indices", "named"),
    [
        (np.zeros((60, 80, 3), np.uint8), torch.tensor([0]), ["ndarray", "PIL image", "fromarray"]),
        (Image.new("RGB", (60, 80)), torch.tensor([0]), ["80 x 60", "60 x 80", "token_layout", "exif_transpose"]),
        (Image.new("RGB", (80, 60)), [0, 1], ["list", "int64", "kept_indices[i]"]),
        (Image.new("RGB", (80, 60)), torch.tensor([0.0]), ["float32", "int64"]),
        (Image.new("RGB", (80, 60)), torch.tensor([[0, 1]]), ["(1, 2)", "(n,)"]),
        (Image.new("RGB", (80, 60)), torch.tensor([3, -1]), ["-1", "0 to", "same processor"]),
        (Image.new("RGB", (80, 60)), torch.tensor([3, 10_000]), ["10000", "0 to"]),
    ],
)
def test_errors_name_what_was_given_and_what_to_do(image, kept_indices, named):
    layout = small_layout(60, 80)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is read below)
        draw_kept_cells(image, layout, kept_indices)
    for part in named:
        assert part in str(raised.value)


def test_first_and_last_position_are_allowed():
    layout = small_layout(60, 80)
    draw_kept_cells(Image.new("RGB", (80, 60)), layout, torch.tensor([0, layout.num_stock - 1]))
    with pytest.raises(ValueError, match=f"0 to {layout.num_stock - 1}"):
        draw_kept_cells(Image.new("RGB", (80, 60)), layout, torch.tensor([layout.num_stock]))
