"""`TokenLayout`: the table of counts, stock's own packing, indices, cells and boxes, of LLaVA-NeXT and of a single tile."""

import itertools
import math
import random

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.pruning.layout import LLAVA_NEXT_PINPOINTS
from layouts import FIRST_TOKENS

pytestmark = pytest.mark.once

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
    for of_view, valid, total in zip(layout.by_view(mask), layout.by_view(layout.valid), layout.group_totals, strict=True):
        candidates = valid.flatten().nonzero().flatten()
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:total]]
        of_view.view(-1)[chosen] = True
    kept = layout.kept_indices(mask)
    assert kept.dtype == torch.int64
    assert kept.shape == (layout.num_retained,)
    assert bool((kept.diff() > 0).all())
    back = torch.zeros_like(mask)
    back[layout.cell_numbers(kept)] = True
    assert torch.equal(back, mask)
    view, row, column = layout.cells(kept).unbind(1)
    assert torch.equal(view * 576 + row * 24 + column, layout.cell_numbers(kept))
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


@pytest.mark.parametrize("pruning", SETTINGS[:2], ids=["published", "ratio"])
def test_a_layout_does_not_take_on_its_first_callers_surroundings(pruning):
    with torch.device("meta"), torch.inference_mode():
        layout = TokenLayout.from_image_size(321, 654, pruning, pinpoints=[(336, 672), (672, 336)])
        assert int(layout.valid.sum()) == len(layout.cell_positions) == sum(layout.valid_per_view)
    for tensor in (layout.valid, layout._cell_of_token):
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()
    assert layout.num_retained == sum(layout.group_totals) + layout.num_newlines
    boxes = layout.pixel_boxes(layout.kept_indices(layout.valid.clone()))
    with torch.device("meta"):
        assert torch.equal(layout.pixel_boxes(layout.kept_indices(layout.valid)), boxes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "`height` is 0"),
        ({"width": -3}, "`width` is -3"),
        ({"height": True}, "`height` is True"),
        ({"height": 10**5000}, "`height` is a value that cannot be printed"),
        ({"patch_size": 337}, "336 pixels is smaller than a patch of 337"),
        ({"pinpoints": [[336, 500]]}, r"\(336, 500\) does not divide into tiles of 336"),
        ({"pinpoints": [[336]]}, "`pinpoints` is"),
        ({"pruning": {"retention_ratio": 2}}, "`retention_ratio` is 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    pruning = arguments.pop("pruning", VisualTokenPruningConfig())
    sizes = {"height": 480, "width": 640, **{key: arguments.pop(key) for key in ("height", "width") if key in arguments}}
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_image_size(**sizes, pruning=pruning, **arguments)


@pytest.mark.parametrize(("extra_tokens", "class_tokens", "more_cells"), [(-1, 0, -1), (0, 0, 0), (1, 1, 0)])
@pytest.mark.parametrize("grid", [24, 27])
def test_counts_of_a_single_tile(grid, extra_tokens, class_tokens, more_cells):
    for ratio in (1, 0.5, 2 / 9, 1 / 9):
        pruning = VisualTokenPruningConfig(retention_ratio=ratio)
        layout = TokenLayout.single_tile(grid, pruning, **FIRST_TOKENS[extra_tokens])
        cells = grid * grid + more_cells
        assert layout.view_shapes == ((grid, grid),)
        assert layout.valid_per_view == (cells,) == (int(layout.valid.sum()),)
        assert layout.num_stock == grid * grid + extra_tokens
        assert (layout.num_views, layout.num_newlines, layout.num_class_tokens) == (1, 0, class_tokens)
        assert layout.group_totals == (math.floor(ratio * cells + 0.5),)
        assert layout.num_retained == sum(layout.group_totals) + class_tokens
        assert layout.keeps_everything == (ratio == 1)
    assert f"{layout.num_stock} stock tokens" in repr(layout)


def test_newlines_mean_nothing_to_a_single_tile():
    without = VisualTokenPruningConfig(retention_ratio=1, keep_newlines=False)
    assert TokenLayout.single_tile(24, without, has_class_token=True).keeps_everything


@pytest.mark.parametrize("extra_tokens", [-1, 0, 1])
def test_packed_order_of_a_single_tile(extra_tokens):
    grid = 5
    layout = TokenLayout.single_tile(grid, VisualTokenPruningConfig(), **FIRST_TOKENS[extra_tokens], image_size=(50, 100))
    everything = torch.arange(layout.num_stock)
    expected = list(itertools.product([0], range(grid), range(grid)))[1 if extra_tokens == -1 else 0 :]
    assert list(map(tuple, layout.cells(everything).tolist())) == expected
    boxes = [[20 * column, 10 * row, 20 * (column + 1), 10 * (row + 1)] for _, row, column in expected]
    assert layout.pixel_boxes(everything).tolist() == boxes
    if extra_tokens == 1:  # the class token comes first and shows no cell
        assert layout.cells(torch.tensor([0])).shape == (0, 3)
        assert layout.pixel_boxes(torch.tensor([0])).shape == (0, 4)
        assert layout.cells(torch.tensor([1])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("exact_count", [True, False])
@pytest.mark.parametrize("extra_tokens", [-1, 0, 1])
def test_kept_indices_of_a_single_tile(extra_tokens, exact_count):
    pruning = VisualTokenPruningConfig(retention_ratio=0.3, exact_count=exact_count)
    layout = TokenLayout.single_tile(6, pruning, **FIRST_TOKENS[extra_tokens])
    candidates = layout.valid.flatten().nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))]
    chosen = chosen[: layout.group_totals[0]].sort().values
    mask = torch.zeros_like(layout.valid)
    mask.view(-1)[chosen] = True
    kept = layout.kept_indices(mask)
    assert kept.dtype == torch.int64
    assert kept.tolist() == [0] * (extra_tokens == 1) + (chosen + extra_tokens).tolist()
    assert len(kept) == layout.num_retained
    tile, row, column = layout.cells(kept).unbind(1)
    assert torch.equal(tile * 36 + row * 6 + column, chosen)


def test_boxes_of_a_view():
    # A square of 300 pixels in the middle of the image, in cells of 12.5 pixels.
    pruning = VisualTokenPruningConfig()
    layout = TokenLayout.single_tile(24, pruning, image_size=(300, 500), view=(100, 0, 400, 300))
    boxes = layout.pixel_boxes(torch.tensor([0, 1, 24, 575]))
    assert boxes.dtype == torch.float64
    assert boxes.tolist() == [
        [100, 0, 112.5, 12.5],
        [112.5, 0, 125, 12.5],
        [100, 12.5, 112.5, 25],
        [387.5, 287.5, 400, 300],
    ]
    # A padded square, in cells of 100 pixels: what reaches beyond the image is cut, what lies beyond it has no area.
    padded = TokenLayout.single_tile(5, pruning, image_size=(260, 500), view=(0, -120, 500, 380))
    boxes = padded.pixel_boxes(torch.tensor([0, 5, 10, 19, 20]))
    assert boxes.tolist() == [[0, 0, 100, 0], [0, 0, 100, 80], [0, 80, 100, 180], [400, 180, 500, 260], [0, 260, 100, 260]]


def test_boxes_need_the_image_size():
    layout = TokenLayout.single_tile(24, VisualTokenPruningConfig())
    assert layout.cells(torch.tensor([25])).tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match="built without `image_size`"):
        layout.pixel_boxes(torch.tensor([25]))


def test_a_repeated_single_tile_is_remembered():
    def layout(grid=24, ratio=0.3, **arguments):
        return TokenLayout.single_tile(grid, VisualTokenPruningConfig(retention_ratio=ratio), **arguments)

    assert layout() is layout()
    assert layout(has_class_token=True) is layout(has_class_token=True)
    sized = {"image_size": (480, 640)}
    assert layout(**sized) is layout(image_size=[480, 640], view=[0, 0, 640, 480])
    others = [layout(), layout(25), layout(ratio=0.4), layout(has_class_token=True), layout(**sized)]
    others.append(layout(**sized, view=(0, 0, 480, 480)))
    assert len(set(map(id, others))) == len(others)


def test_a_single_tile_does_not_take_on_its_first_callers_surroundings():
    pruning = VisualTokenPruningConfig(retention_ratio=0.37)
    with torch.device("meta"), torch.inference_mode():
        layout = TokenLayout.single_tile(23, pruning, has_class_token=True, image_size=(230, 230))
    assert layout.valid.device.type == "cpu"
    assert not layout.valid.is_inference()
    boxes = layout.pixel_boxes(layout.kept_indices(layout.valid.clone()))
    with torch.device("meta"):
        assert torch.equal(layout.pixel_boxes(layout.kept_indices(layout.valid)), boxes)


@pytest.mark.parametrize("extra_tokens", [-1, 0, 1])
def test_exact_indices_of_a_single_tile_never_wait_for_the_device(extra_tokens):
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    layout = TokenLayout.single_tile(24, VisualTokenPruningConfig(retention_ratio=0.3), **FIRST_TOKENS[extra_tokens])
    kept = layout.kept_indices(torch.ones(1, 24, 24, dtype=torch.bool, device="meta"))
    assert kept.shape == (layout.num_retained,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 0}, r"`grid` is 0 \(int\); it must be a whole number of cells from 1"),
        ({"grid": True}, "`grid` is True"),
        ({"grid": 363}, "`grid` is 363; 131769 cells are too many, 131072 are allowed"),
        ({"has_class_token": 2}, "`has_class_token` is 2.*must be True or False"),
        ({"skips_first_cell": "yes"}, "`skips_first_cell` is 'yes'"),
        ({"has_class_token": True, "skips_first_cell": True}, "are both True"),
        ({"image_size": 5}, "`image_size` is 5"),
        ({"image_size": (480, 6.5)}, "`width` is 6.5"),
        ({"view": "abcd"}, "`view` is 'abcd'"),
        ({"view": (4, 0, 2, 9)}, "`view` is"),
        ({"view": (0, 0, float("nan"), 9)}, "`view` is"),
        ({"pruning": 0.5}, "`pruning_config` is 0.5"),
    ],
)
def test_bad_single_tiles_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.single_tile(**{"grid": 24, "pruning": VisualTokenPruningConfig(), **arguments})


def test_the_largest_single_tile():
    assert TokenLayout.single_tile(362, VisualTokenPruningConfig(retention_ratio=1)).num_retained == 362**2


def test_cells_are_counted_as_they_lie():
    """`valid_per_view` follows from the geometry alone; the mask is made when it is first asked for."""
    layouts = [TokenLayout.from_image_size(*size, SETTINGS[0]) for size in random_sizes(300, seed=5)]
    layouts += [TokenLayout.single_tile(9, SETTINGS[0], **FIRST_TOKENS[extra]) for extra in (-1, 0, 1)]
    for layout in layouts:
        assert layout.valid_per_view == tuple(int(view.sum()) for view in layout.by_view(layout.valid))
