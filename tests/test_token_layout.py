"""`TokenLayout`: the table of counts, stock's own packing, indices, cells and boxes."""

import random

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.token_layout import LLAVA_NEXT_PINPOINTS

# height, width, stock tokens, then retained: published setting, r = 1/2, 2/9, 1/9, 1/18
COUNTS = [
    (672, 672, 2928, 1488, 1488, 688, 368, 208),
    (480, 640, 2340, 1188, 1188, 548, 292, 164),
    (300, 451, 1464, 744, 744, 344, 184, 104),
    (1000, 300, 2232, 1188, 1152, 551, 313, 191),
    (100, 1000, 1160, 584, 584, 265, 135, 73),
    (64, 64, 1176, 600, 600, 280, 152, 88),
]
SETTINGS = [VisualTokenPruningConfig(), *(VisualTokenPruningConfig(retention_ratio=r) for r in (1 / 2, 2 / 9, 1 / 9, 1 / 18))]


def random_sizes(number, seed):
    generator = random.Random(seed)
    return [(generator.randint(5, 6000), generator.randint(5, 6000)) for _ in range(number)]


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row[0]}x{row[1]}")
def test_table_of_counts(row):
    height, width, stock, *retained = row
    layouts = [TokenLayout.from_image_size(height, width, pruning) for pruning in SETTINGS]
    assert [layout.num_retained for layout in layouts] == retained
    assert {layout.num_stock for layout in layouts} == {stock}


def stock_packing(height, width, pinpoints, tile_size=336, grid=24):
    """What transformers itself keeps of a stitched grid in which every cell holds its own number."""
    rows, columns = get_anyres_image_grid_shape((height, width), [list(pair) for pair in pinpoints], tile_size)
    stitched = torch.arange(rows * columns * grid * grid).view(rows, columns, grid, grid).transpose(1, 2)
    stitched = stitched.reshape(1, rows * grid, columns * grid) + grid * grid
    return unpad_image(stitched, (height, width))[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (5, 6000), (27, 3), *random_sizes(60, seed=0)], ids=str)
def test_packs_as_transformers_does(size):
    pruning = VisualTokenPruningConfig()
    layout = TokenLayout.from_image_size(*size, pruning)
    cells = stock_packing(*size, LLAVA_NEXT_PINPOINTS)
    assert layout.num_stock == 576 + cells.numel() + cells.shape[0]
    assert layout.num_newlines == cells.shape[0]
    # With all cells kept, the indices run over the whole sequence and its cells are stock's, in stock's order.
    everything = torch.arange(layout.num_stock)
    tile, row, column = layout.cells(everything).unbind(1)
    assert torch.equal((tile * 576 + row * 24 + column)[576:], cells.flatten())
    assert int(layout.valid.sum()) == 576 + cells.numel()


@pytest.mark.parametrize("keep_newlines", [True, False])
@pytest.mark.parametrize("size", [(480, 640), (1, 5000), (1000, 300)], ids=str)
def test_indices_of_kept_cells(size, keep_newlines):
    pruning = VisualTokenPruningConfig(retention_ratio=0.3, keep_newlines=keep_newlines)
    layout = TokenLayout.from_image_size(*size, pruning)
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros_like(layout.valid)
    for tile, total in enumerate(layout.tile_totals):
        candidates = layout.valid[tile].flatten().nonzero().flatten()
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:total]]
        mask[tile].view(-1)[chosen] = True
    kept = layout.kept_indices(mask)
    assert kept.dtype == torch.int64
    assert kept.shape == (layout.num_retained,)
    assert bool((kept.diff() > 0).all())
    back = torch.zeros_like(mask)
    back[layout.cells(kept).unbind(1)] = True
    assert torch.equal(back, mask)
    assert layout.num_retained - len(layout.cells(kept)) == layout.num_newlines
    assert keep_newlines == bool(layout.num_newlines) or size == (1, 5000)


def test_everything_kept_is_known_without_scores():
    assert TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(retention_ratio=1)).keeps_everything
    assert TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(global_ratio=1.0)).keeps_everything
    assert not TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig()).keeps_everything
    no_newlines = VisualTokenPruningConfig(retention_ratio=1, keep_newlines=False)
    layout = TokenLayout.from_image_size(480, 640, no_newlines)
    assert not layout.keeps_everything
    assert (layout.num_newlines, layout.num_retained) == (0, 576 + 36 * 48)


@pytest.mark.parametrize("size", [(480, 640), (1000, 300), (100, 1000), (672, 672), (37, 61)], ids=str)
def test_boxes_tile_the_image(size):
    height, width = size
    layout = TokenLayout.from_image_size(height, width, VisualTokenPruningConfig())
    everything = torch.arange(layout.num_stock)
    boxes, tile = layout.pixel_boxes(everything), layout.cells(everything)[:, 0]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # The base tile shows the whole image. The crops show what un-padding leaves of it: at most a cell less on a side.
    assert float(area[tile == 0].sum()) == pytest.approx(height * width)
    assert 0.9 < float(area[tile > 0].sum()) / (height * width) <= 1 + 1e-9
    assert bool((boxes[:, :2] >= 0).all())
    assert bool((boxes[:, 2] <= width).all())
    assert bool((boxes[:, 3] <= height).all())


def test_boxes_follow_resizing_and_padding():
    # 480 x 640 becomes 504 x 672 on a 672 x 672 canvas: scale 1.05, 84 pixels above and below.
    layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig())
    first_crop_cell = layout.pixel_boxes(torch.tensor([576]))[0]
    assert first_crop_cell.tolist() == pytest.approx([0, 0, 14 / 1.05, 14 / 1.05])
    second_row = layout.pixel_boxes(torch.tensor([576 + 49]))[0]
    assert second_row.tolist() == pytest.approx([0, 14 / 1.05, 14 / 1.05, 28 / 1.05])


def test_a_repeated_size_is_remembered():
    first = TokenLayout.from_image_size(123, 456, VisualTokenPruningConfig(retention_ratio=0.25))
    assert TokenLayout.from_image_size(123, 456, VisualTokenPruningConfig(retention_ratio=0.25)) is first


def test_a_layout_does_not_take_on_its_first_callers_surroundings():
    with torch.device("meta"), torch.inference_mode():
        layout = TokenLayout.from_image_size(321, 654, VisualTokenPruningConfig())
    assert layout.valid.device.type == "cpu"
    assert not layout.valid.is_inference()
    assert layout.num_retained == sum(layout.tile_totals) + layout.num_newlines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "`height` is 0"),
        ({"width": -3}, "`width` is -3"),
        ({"height": 2.5}, "`height` is 2.5"),
        ({"height": True}, "`height` is True"),
        ({"height": "480"}, "`height` is '480'"),
        ({"patch_size": 13}, "336 pixels does not divide into patches of 13"),
        ({"pinpoints": [[336, 500]]}, r"\(336, 500\) does not divide into tiles of 336"),
        ({"pinpoints": []}, "`pinpoints` is"),
        ({"pinpoints": [[336]]}, "`pinpoints` is"),
        ({"pruning": {"retention_ratio": 2}}, "`retention_ratio` is 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    pruning = arguments.pop("pruning", VisualTokenPruningConfig())
    sizes = {"height": 480, "width": 640, **{key: arguments.pop(key) for key in ("height", "width") if key in arguments}}
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_image_size(**sizes, pruning=pruning, **arguments)
