"""`draw_kept_cells`: every cell lies where arithmetic puts it, in full colour if it is kept and grey if not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.figures import draw_kept_cells
from hivtp_hf.figures.kept_cells import CAPTION_HEIGHT, MARGIN
from tiny_checkpoint import tiny_config, tiny_processor
from tiny_models import SMALL, photo, pruned_processor

pytestmark = pytest.mark.once

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


# An image whose longer side is a panel's is not resized. Both have 2 x 2 crops of 8 x 8 cells, each 45 pixels wide, and fill
# 10 2/3 of 16 rows or columns, of which stock keeps the 10 whole ones, from 1/3 of a cell on.
@pytest.mark.parametrize(
    ("height", "width", "rows", "columns", "first_top", "first_left"),
    [(480, 720, 10, 16, 15, 0), (720, 480, 16, 10, 0, 15)],
    ids=["wide", "tall"],
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


def test_colours_of_a_palette_are_drawn():
    image, layout, kept_indices = photo(72, 96).convert("P"), small_layout(72, 96), torch.arange(0, 100, 2)
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
        (Image.new("RGB", (80, 60)), torch.tensor([268]), ["268", "0 to 267"]),
    ],
)
def test_errors_name_what_was_given_and_what_to_do(image, kept_indices, named):
    layout = small_layout(60, 80)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is read below)
        draw_kept_cells(image, layout, kept_indices)
    for part in named:
        assert part in str(raised.value)


def test_a_layout_without_the_image_is_no_place_to_draw():
    with pytest.raises(ValueError, match=r"without the image.s size.*token_layout"):
        draw_kept_cells(photo(60, 80), TokenLayout.single_tile(8, VisualTokenPruningConfig()), torch.tensor([0]))


TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def llava_processor(tower="clip", image_processor=None):
    """Of LLaVA-1.5, 8 x 8 cells; with the settings of an image processor of another kind if given."""
    stock = tiny_processor(tiny_config(family="llava", vision_type=TOWERS[tower], **SMALL))
    processor = pruned_processor(stock)
    for name, value in (image_processor or {}).items():
        setattr(processor.image_processor, name, value)
    return processor


def padding_processor(folder):
    """As some LLaVA checkpoints have it: images are padded to a square first."""
    square = {"height": 56, "width": 56}
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"shortest_edge": 56}}))
    processor = llava_processor()
    processor.image_processor = AutoImageProcessor.from_pretrained(folder)
    return processor


SQUARE = {"height": 56, "width": 56}
# How an image becomes a tile: name: from a folder to write to, to the processor.
TILES = {
    "centre crop": lambda folder: llava_processor("clip"),
    "whole image": lambda folder: llava_processor("siglip"),
    "whole image by clip's": lambda folder: llava_processor("clip", {"do_center_crop": False, "size": SQUARE}),
    "crop of a larger resized image": lambda folder: llava_processor("clip", {"size": {"shortest_edge": 70}}),
    "padded to a square": padding_processor,
}


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1000, 300)])
@pytest.mark.parametrize("name", TILES)
def test_boxes_lie_where_the_image_processor_takes_its_pixels(name, height, width, tmp_path):
    """A white square where a cell is said to lie makes that cell the bright one of what the model is shown."""
    processor = TILES[name](tmp_path)
    layout = processor.token_layout(height, width)
    boxes = layout.pixel_boxes(torch.arange(layout.num_stock))
    assert boxes.shape == (64, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cells = [cell for cell in (0, 7, 27, 36, 56, 63) if areas[cell] > 0.99 * areas.max()]  # not in the padding
    found, shares = [], []
    for cell in cells:
        left, top, right, bottom = boxes[cell].round().int().tolist()
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right] = 255
        black, shown = (
            processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
            for picture in (np.zeros_like(pixels), pixels)
        )
        of_cells = torch.nn.functional.avg_pool2d((shown - black).abs().sum(0)[None], 7)[0].flatten()
        found.append(int(of_cells.argmax()))
        shares.append(float(of_cells.max() / of_cells.sum()))
    assert found == cells
    assert len(cells) == (2 if name == "padded to a square" and height != width else 6)
    assert min(shares) > 0.7  # a shift by more than a seventh of a cell would not pass
