"""Arbitrary settings and arbitrary geometry: a ValueError that says something, or an object that holds what it promises."""

import copy
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor

from fed import check_indices
from hivtp_hf import TokenLayout, VisualTokenPruningConfig, select_hivtp
from hivtp_hf.token_layout import LARGEST_SIDE, MOST_CELLS

# The same examples in every run, and no deadline: what is slow on a busy machine is not wrong. Examples may be slow to make.
FUZZ = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# Not beyond 4300 digits, which hypothesis cannot print; such numbers are tested by name.
HUGE = st.sampled_from([2**31 - 1, 2**31, 2**63, 10**18, 10**100, 10**101, 10**400, -(10**18), -(10**400)])
INTEGERS = st.one_of(st.integers(), st.integers(-3, 12), HUGE)
FLOATS = st.one_of(st.floats(), st.floats(-0.1, 1.1), st.sampled_from([0.0, -0.0, 1.0, 5e-324, 1 + 2**-52]))
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMPY = st.builds(
    lambda kind, value: kind(value),
    st.sampled_from([np.int8, np.uint8, np.int64, np.float16, np.float32, np.float64, np.bool_, np.str_, np.array]),
    st.integers(0, 100),
)
TENSORS = st.builds(
    lambda value, dtype, device: torch.tensor(value, dtype=dtype, device=device),
    st.one_of(st.integers(0, 100), st.lists(st.integers(0, 100), max_size=3)),
    st.sampled_from([torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.bool]),
    st.sampled_from(["cpu", "meta"]),
)
PYTHON = st.one_of(
    JSON,
    NUMPY,
    TENSORS,
    st.binary(max_size=4),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.sets(st.integers(), max_size=2),
    st.tuples(JSON, JSON),
    st.sampled_from([object(), int, VisualTokenPruningConfig, range(3), ..., len, Fraction(10**400), Decimal("0.5")]),
    st.builds(VisualTokenPruningConfig),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are too small to share out, and two threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FIELDS = ["method", "retention_ratio", "exact_count", "keep_newlines", "global_ratio", "local_window", "regions"]
FIELDS += ["importance_start_layer", "importance_num_layers"]
GOOD_VALUES = {
    "method": st.just("hivtp"),
    "retention_ratio": st.none() | st.floats(0, 1, exclude_min=True) | st.fractions(Fraction(1, 1000), 1) | st.just(np.int8(1)),
    "exact_count": st.booleans(),
    "keep_newlines": st.booleans(),
    "global_ratio": st.floats(0, 1) | st.sampled_from([0, 1, np.float16(0.5)]),
    "local_window": st.integers(1, 10**100) | st.sampled_from([1, 2, 7, np.uint8(3)]),
    "regions": st.integers(1, 10**100) | st.integers(1, 9),
    "importance_start_layer": st.integers(0, 10**100) | st.integers(0, 30),
    "importance_num_layers": st.integers(1, 10**100) | st.integers(1, 30),
}
GOOD_SETTINGS = st.fixed_dictionaries({}, optional=GOOD_VALUES)
OTHER_KEYS = st.sampled_from(["self", "cls", "args", "pruning", "Method", "", "__class__", "__dict__"]) | st.text(max_size=8)
NEARLY_GOOD = st.builds(
    lambda good, key, value: {**good, key: value}, GOOD_SETTINGS, st.sampled_from(FIELDS) | OTHER_KEYS, PYTHON
)


def check_message(error):
    """An error of ours: it names a field or a cause, and can be read."""
    message = str(error)
    assert 20 < len(message) < 3000
    assert "must be" in message or "not a setting" in message or "does not divide" in message or "are allowed" in message


def check_pruning(pruning, given_settings):
    """Everything that the rest of the package takes for granted."""
    stored = pruning.to_dict()
    assert list(stored) == FIELDS
    assert [type(stored[field]) for field in FIELDS[2:]] == [bool, bool, float, int, int, int, int]
    assert stored["method"] == "hivtp"
    assert stored["retention_ratio"] is None or (
        type(stored["retention_ratio"]) is float and 0 < stored["retention_ratio"] <= 1
    )
    assert 0 <= stored["global_ratio"] <= 1
    assert all(stored[field] >= 1 for field in ("local_window", "regions", "importance_num_layers"))
    assert stored["importance_start_layer"] >= 0
    for field, value in given_settings.items():
        assert stored[field] == value or math.isclose(stored[field], value)
    layers = pruning.scored_layers
    assert layers[0] == stored["importance_start_layer"]
    assert layers[-1] - layers[0] == stored["importance_num_layers"] - 1
    for twin in (
        VisualTokenPruningConfig.from_dict(json.loads(json.dumps(stored))),
        VisualTokenPruningConfig.coerce(pruning),
        copy.deepcopy(pruning),
        pruning.replace(),
    ):
        assert twin == pruning
        assert hash(twin) == hash(pruning)
    assert eval(repr(pruning)) == pruning


@FUZZ
@given(st.one_of(NEARLY_GOOD, st.dictionaries(st.sampled_from(FIELDS) | OTHER_KEYS, PYTHON, max_size=4), PYTHON))
@example({"self": 1})
@example({"local_window": 10**400})
@example(VisualTokenPruningConfig)
def test_any_settings(given_settings):
    for read in (VisualTokenPruningConfig.from_dict, VisualTokenPruningConfig.coerce):
        try:
            pruning = read(given_settings)
        except ValueError as error:
            check_message(error)
        else:
            check_pruning(pruning, given_settings if isinstance(given_settings, dict) else {})


@FUZZ
@given(GOOD_SETTINGS)
def test_good_settings_are_taken(given_settings):
    check_pruning(VisualTokenPruningConfig.from_dict(given_settings), given_settings)


def stock_counts(layout):
    """Tokens of an image by stock's own formula, as (all, newlines)."""
    unpadded, newlines = LlavaNextProcessor._get_unpadded_features(
        None, *layout.image_size, layout.grid, layout.grid, layout.tile_rows, layout.tile_columns
    )
    return layout.grid**2 + unpadded + newlines, newlines


def check_layout(layout, height, width):
    assert layout.image_size == (height, width)
    assert 1 <= height <= LARGEST_SIDE
    assert 1 <= width <= LARGEST_SIDE
    assert layout.valid.shape == (layout.num_tiles, layout.grid, layout.grid)
    assert layout.valid.dtype == torch.bool
    assert layout.valid.numel() <= MOST_CELLS
    assert bool(layout.valid[0].all())
    num_stock, newlines = stock_counts(layout)
    assert layout.num_stock == num_stock == int(layout.valid.sum()) + newlines
    assert layout.num_newlines == (newlines if layout.pruning.keep_newlines else 0)
    valid = layout.valid.flatten(1).sum(1).tolist()
    assert all(0 <= total <= most for total, most in zip(layout.tile_totals, valid, strict=True))
    assert layout.num_retained == sum(layout.tile_totals) + layout.num_newlines <= layout.num_stock
    # Published counts may stay below the placeholders, except at a ratio of 1.
    certain = layout.pruning.exact_count or layout.pruning.retention_ratio == 1
    assert layout.keeps_everything == (certain and layout.num_retained == layout.num_stock)
    exact = layout.pruning.replace(exact_count=True)
    kept = layout.kept_indices(select_hivtp(torch.zeros(layout.valid.shape), layout.valid, exact))
    assert len(kept) == layout.num_retained
    if len(kept):
        check_indices(kept, layout)
    boxes = layout.pixel_boxes(kept)
    assert bool(boxes.isfinite().all())
    assert bool((boxes[:, :2] <= boxes[:, 2:]).all())


SIDES = st.one_of(st.integers(1, 7000), st.sampled_from([1, 2, 3, 335, 336, 337, 10**6, LARGEST_SIDE]))
ODD_SIDES = st.one_of(SIDES, PYTHON, st.integers(-5, 5))


@st.composite
def geometries(draw):
    """Patches, tiles and pinpoints that fit each other."""
    patch_size, grid = draw(st.integers(1, 20)), draw(st.integers(1, 15))
    tile_size = patch_size * grid
    tiles = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda pair: [side * tile_size for side in pair])
    return {"patch_size": patch_size, "tile_size": tile_size, "pinpoints": draw(st.lists(tiles, min_size=1, max_size=6))}


@settings(FUZZ, max_examples=200)
@given(SIDES, SIDES, GOOD_SETTINGS, geometries())
@example(LARGEST_SIDE, 1, {}, {})
@example(1, LARGEST_SIDE, {"retention_ratio": 0.1}, {})
@example(100, 100, {"retention_ratio": 0.3}, {"tile_size": 256, "patch_size": 1, "pinpoints": [[256, 256]]})
@example(100, 100, {}, {"tile_size": 1, "patch_size": 1, "pinpoints": [[1, MOST_CELLS - 1]]})
def test_any_size_on_any_geometry_that_fits(height, width, given_settings, geometry):
    pruning = VisualTokenPruningConfig(**given_settings)
    check_layout(TokenLayout.from_image_size(height, width, pruning, **geometry), height, width)


ODD_GEOMETRIES = st.fixed_dictionaries(
    {},
    optional={
        "tile_size": ODD_SIDES | st.sampled_from([1, 13, 672, 10**6]),
        "patch_size": ODD_SIDES | st.sampled_from([1, 7, 28, 336, 10**6]),
        "pinpoints": st.one_of(
            PYTHON,
            st.lists(st.one_of(st.tuples(ODD_SIDES, ODD_SIDES), st.lists(ODD_SIDES, max_size=3)), max_size=4),
            st.integers(0, 3000).map(lambda number: [[336, 336 * (1 + i)] for i in range(number)]),
            st.sampled_from([iter([(336, 336)]), np.array([[336, 672]]), torch.tensor([[336, 672]]), {(336, 672)}, "ab"]),
        ),
    },
)


@FUZZ
@given(ODD_SIDES, ODD_SIDES, st.one_of(GOOD_SETTINGS, NEARLY_GOOD, PYTHON), ODD_GEOMETRIES)
@example(10**18, 1, {}, {})
@example(1, 10**400, {}, {})
@example(300, 400, {}, {"tile_size": 10**6, "patch_size": 1, "pinpoints": [[10**6, 10**6]]})
@example(300, 400, {}, {"tile_size": 2**31 - 1, "patch_size": 1, "pinpoints": [[2**31 - 1, 2**31 - 1]]})
@example(300, 400, {}, {"pinpoints": [[336 * 10**6, 336 * 10**6]]})
@example(300, 400, {"retention_ratio": 0.5}, {"tile_size": 512, "patch_size": 1, "pinpoints": [[512, 512]]})
def test_any_arguments_of_a_layout(height, width, pruning, geometry):
    try:
        layout = TokenLayout.from_image_size(height, width, pruning, **geometry)
    except ValueError as error:
        check_message(error)
    else:
        check_layout(layout, int(height), int(width))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"tile_size": 10**6, "patch_size": 1, "pinpoints": [[10**6, 10**6]]}, "1000000 x 1000000 cells, up to 2 an image"),
        ({"pinpoints": [[336, 672], [336, 336 * 10**6]]}, "up to 1000001 an image.*131072 are allowed.*Use smaller tiles"),
        ({"tile_size": 257, "patch_size": 1, "pinpoints": [[257, 257]]}, "make 132098 cells; 131072 are allowed"),
    ],
)
def test_more_cells_than_memory_has_room_for(geometry, message):
    # Refused for every image, also for one that would get by with a smaller pinpoint: at construction, not at the first
    # large picture.
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_image_size(10, 10, VisualTokenPruningConfig(), **geometry)


@pytest.mark.parametrize("field", ["height", "width", "tile_size", "patch_size"])
@pytest.mark.parametrize(
    "value",
    [10**18, 10**5000, -(10**5000), float("nan"), "336", torch.zeros(2), [[]]],
    ids=["huge", "unprintable", "negative", "nan", "string", "tensor", "list"],
)
def test_sides_that_are_refused_by_name(field, value):
    arguments = {"height": 300, "width": 400, "pruning": {}, field: value}
    with pytest.raises(ValueError, match=f"`{field}` is .*whole number of pixels from 1 to {LARGEST_SIDE}"):
        TokenLayout.from_image_size(**arguments)


def test_pinpoints_that_never_end_are_not_read():
    def endless():
        while True:
            yield 336, 672

    with pytest.raises(ValueError, match="`pinpoints` is <generator"):
        TokenLayout.from_image_size(10, 10, VisualTokenPruningConfig(), pinpoints=endless())
