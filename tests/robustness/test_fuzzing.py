"""Arbitrary settings and arbitrary geometry: a ValueError that says something, or an object that holds what it promises."""

import copy
import json
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor

from fed import check_indices
from hivtp_hf import EncoderFacts, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.methods.divprune import DivPrune
from hivtp_hf.methods.greedy import GreedyMethod
from hivtp_hf.pruning.checked_values import LARGEST_SIDE, MOST_CELLS
from hivtp_hf.pruning.evidence import VisualEvidence
from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.settings import SHARED_SETTINGS
from layouts import FIRST_TOKENS, counts_of_groups

ENCODER = EncoderFacts(24, 22)

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


SHARED = ["method", *SHARED_SETTINGS]
FIELDS = SHARED + [setting.name for method in METHODS.values() for setting in method.settings]
RATIOS = st.floats(0, 1, exclude_min=True) | st.fractions(Fraction(1, 1000), 1) | st.just(np.int8(1))
BUDGETS = st.integers(1, 10**100) | st.integers(1, 900) | st.just(np.uint8(40))


def values_of(setting):
    """What its entry allows, as Python and NumPy write it."""
    low, high = setting.minimum, setting.maximum
    if setting.kind is bool:
        values = st.booleans()
    elif setting.kind is str:
        values = st.sampled_from(setting.choices)
    elif setting.kind is tuple:
        values = st.lists(st.integers(0, 30), min_size=1, max_size=4) | st.just("3+9") | st.just(np.uint8(4))
    elif setting.kind is int:
        values = st.integers(low, high or 10**100) | st.integers(low, low + 30) | st.just(np.uint8(low + 3))
    else:
        high = 1e300 if high is None else high
        others = [value for value in (1, np.float16(0.5), np.float32(7)) if low < value <= high]
        values = st.floats(low, high, exclude_min=setting.above_minimum)
        values = values | st.sampled_from(others) if others else values
    return values if setting.default is not None else st.none() | values


@st.composite
def good_settings(draw, methods=tuple(METHODS)):
    """Settings of one of the methods, some or all of them, with a ratio or a budget or neither."""
    method = METHODS[draw(st.sampled_from(methods))]
    optional = {setting.name: values_of(setting) for setting in method.settings}
    optional["exact_count"] = st.booleans() if method.content_dependent_count else st.just(True)
    optional["keep_newlines"] = st.booleans()
    optional["weight_strength"] = values_of(SHARED_SETTINGS["weight_strength"])
    settings = draw(st.fixed_dictionaries({}, optional=optional))
    if settings.get("importance_layers") is not None:  # in place of these
        settings |= {name: None for name in ("importance_start_layer", "importance_num_layers") if name in settings}
    if settings.get("exact_count", True) and draw(st.booleans()):
        weights = ["none"] + ["cluster_size"] * (method.name != "visionzip") + ["inclusion"] * method.knows_inclusion
        settings |= {
            "token_weights": draw(st.sampled_from(weights)),
            "positions": draw(st.sampled_from(["packed", "original"])),
        }
    if method.name != "hivtp" or draw(st.booleans()):
        settings["method"] = method.name
    no_budgets = [{}, {"retention_ratio": None}, {"token_budget": None}]
    budgets = [st.sampled_from(no_budgets)]
    if method.keeps_everything:
        budgets.append(st.just({"retention_ratio": 1}))
    else:
        budgets.append(st.builds(lambda ratio: {"retention_ratio": ratio}, RATIOS))
        budgets.append(st.builds(lambda budget: {"token_budget": budget}, BUDGETS))
    settings |= draw(st.one_of(budgets))
    if method.name == "vflowopt":
        if settings.get("token_budget") is not None:  # which looks for what enters
            settings = {name: value for name, value in settings.items() if name not in ("first_stage_ratio", "exact_count")}
        if (settings.get("third_stage_layer") or 10**100) <= (settings.get("second_stage_layer") or 0):
            del settings["third_stage_layer"]
    return settings


GOOD_SETTINGS = good_settings()
OTHER_KEYS = st.sampled_from(["self", "cls", "args", "pruning", "Method", "", "__class__", "__dict__"]) | st.text(max_size=8)
NEARLY_GOOD = st.builds(
    lambda good, key, value: {**good, key: value}, GOOD_SETTINGS, st.sampled_from(FIELDS) | OTHER_KEYS, PYTHON
)


SAYINGS = [
    "must be",
    "not a setting",
    "does not divide",
    "is smaller than a patch",
    "are allowed",
    "give one of them",
    "give the layers themselves",
    "at most one of them may be True",
    "keeps every token",
    "stay whatever",
    "must be 'none'",
    "must be 'packed'",
]


def check_message(error):
    """An error of ours: it names a field or a cause, and can be read."""
    message = str(error)
    assert 20 < len(message) < 3000
    assert any(saying in message for saying in SAYINGS)


def check_pruning(pruning, given_settings):
    """Everything that the rest of the package takes for granted."""
    stored = pruning.to_dict()
    method = METHODS[stored["method"]]
    assert list(stored) == SHARED + [setting.name for setting in method.settings]
    ratio, budget = stored["retention_ratio"], stored["token_budget"]
    assert ratio is None or (type(ratio) is float and 0 < ratio <= 1)
    assert budget is None or (type(budget) is int and budget >= 1 and ratio is None)
    assert type(stored["exact_count"]) is type(stored["keep_newlines"]) is bool
    assert stored["exact_count"] or method.content_dependent_count
    assert stored["exact_count"] or (stored["token_weights"], stored["positions"]) == ("none", "packed")
    assert stored["token_weights"] != "inclusion" or method.knows_inclusion
    assert type(stored["weight_strength"]) is float
    assert 0 <= stored["weight_strength"] <= 1
    for setting in method.settings:
        value = stored[setting.name]
        if value is None:
            assert setting.default is None
            continue
        if setting.kind is tuple:
            assert value == sorted(set(value))
            assert all(type(layer) is int and layer >= 0 for layer in value)
            continue
        assert type(value) is setting.kind
        if setting.kind is str:
            assert value in setting.choices
            continue
        assert value >= setting.minimum
        assert setting.maximum is None or value <= setting.maximum
        assert math.isfinite(value)
    for field, value in given_settings.items():
        defaults = {"retention_ratio": None if budget else method.default_retention_ratio}
        wanted = defaults.get(field) if value is None else value
        if field == "importance_layers" and value is not None:
            wanted = list(getattr(VisualTokenPruningConfig(importance_layers=value), field))
        assert stored[field] == wanted or math.isclose(stored[field], wanted)
    layers = pruning.scored_layers(ENCODER)
    if method.name == "vflowopt":  # no setting names it
        assert list(layers) == [22]
    elif method.name == "spread" and stored["score"] == "features":
        assert not layers
    elif method.name in ("hivtp", "spread"):
        start, number = stored["importance_start_layer"], stored["importance_num_layers"]
        assert stored["importance_layers"] is None or list(layers) == stored["importance_layers"]
        assert stored["importance_layers"] is not None or layers[0] == (6 if start is None else start)
        assert stored["importance_layers"] is not None or layers[-1] - layers[0] == (number or 3) - 1
    else:
        named = [stored[setting.name] for setting in method.settings if setting.is_layer]
        defaults = [8 if setting.name == "object_layer" else 22 for setting in method.settings if setting.is_layer]
        assert list(layers) == sorted(
            {default if layer is None else layer for layer, default in zip(named, defaults, strict=True)}
        )
    for twin in (
        VisualTokenPruningConfig.from_dict(json.loads(json.dumps(stored))),
        VisualTokenPruningConfig.coerce(pruning),
        copy.deepcopy(pruning),
        pickle.loads(pickle.dumps(pruning)),
        pruning.replace(),
    ):
        assert twin == pruning
        assert hash(twin) == hash(pruning)
    assert eval(repr(pruning)) == pruning


@FUZZ
@given(st.one_of(NEARLY_GOOD, st.dictionaries(st.sampled_from(FIELDS) | OTHER_KEYS, PYTHON, max_size=4), PYTHON))
@example({"self": 1})
@example({"local_window": 10**400})
@example({"method": "gprune", "temperature": 0.0})
@example({"method": "random", "seed": 2**32})
@example({"method": "none", "token_budget": 10})
@example({"retention_ratio": 0.5, "token_budget": 10})
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
    """Tokens of an image of LLaVA-NeXT by stock's own formula, as (all, newlines)."""
    grid, crops = layout.view_shapes[0][0], layout.parts[1]
    unpadded, newlines = LlavaNextProcessor._get_unpadded_features(
        None, *layout.image_size, grid, grid, crops.down, crops.across
    )
    return grid**2 + unpadded + newlines, newlines


def selection(layout, pruning):
    """The positions that the method keeps of an image of equal cells; None where that takes long."""
    if pruning.method == "gprune":
        if layout.num_stock > 1000:  # a graph of all pairs
            return None
        pruning = pruning.replace(iterations=min(pruning.iterations, 3))
    if isinstance(METHODS[pruning.method], (GreedyMethod, DivPrune)) and layout.num_stock > 300:  # all pairs, one by one
        return None
    layers = [0] if pruning.method in ("hivtp", "spread") else pruning.scored_layers(ENCODER)  # of hivtp there may be 10**100
    scores = dict.fromkeys(layers, torch.zeros(layout.num_cells))
    evidence, method = (
        VisualEvidence(
            [layout],
            [torch.ones(layout.num_stock, 2)],
            scores,
            scores,
            ENCODER,
            attention_rows=scores,
            grey_levels=torch.zeros(layout.num_cells, 4, dtype=torch.uint8),
            keys=dict.fromkeys(layers, torch.zeros(layout.num_cells, 2)),
        ),
        METHODS[pruning.method],
    )
    if method.merges:
        return method.merge(evidence, pruning)[0].kept_indices
    return layout.kept_indices(evidence.ask(method, method.select, pruning))


def check_layout(layout, pruning):
    """A layout of either family that was asked for under `pruning`."""
    assert layout.valid.shape == (layout.num_cells,)
    assert layout.valid.dtype == torch.bool
    assert layout.valid.numel() <= MOST_CELLS
    valid = counts_of_groups(layout, layout.cell_positions)
    assert all(0 <= total <= most for total, most in zip(layout.group_totals, valid, strict=True))
    assert layout.num_retained == sum(layout.group_totals) + layout.num_newlines + layout.num_class_tokens <= layout.num_stock
    if pruning.token_budget is None:
        assert layout.pruning == pruning
    else:
        assert layout.pruning == pruning.replace(retention_ratio=layout.pruning.retention_ratio)
        assert layout.num_retained <= pruning.token_budget
    # Published counts may stay below the placeholders, except at a ratio of 1.
    certain = layout.pruning.exact_count or layout.pruning.retention_ratio == 1
    assert layout.keeps_everything == (certain and layout.num_retained == layout.num_stock)
    exact = layout.pruning.replace(exact_count=True)
    if METHODS[exact.method].merges and exact != layout.pruning:  # their number is another one
        return
    kept = selection(layout, exact)
    if kept is None:
        return
    assert len(kept) == layout.num_retained
    if len(kept):
        check_indices(kept, layout)
    if layout.image_size is not None:
        boxes = layout.pixel_boxes(kept)
        assert bool(boxes.isfinite().all())
        assert bool((boxes[:, :2] <= boxes[:, 2:]).all())


def check_llava_next_layout(layout, height, width, pruning):
    assert layout.image_size == (height, width)
    assert 1 <= height <= LARGEST_SIDE
    assert 1 <= width <= LARGEST_SIDE
    assert bool(layout.by_view(layout.valid)[0].all())
    num_stock, newlines = stock_counts(layout)
    assert layout.num_stock == num_stock == int(layout.valid.sum()) + newlines
    kept_newlines = newlines if layout.pruning.keep_newlines else 0
    # Where newlines are in the budget, there may be no room for all.
    counted = METHODS[layout.pruning.method].counts_newlines
    assert layout.num_newlines <= kept_newlines if counted else layout.num_newlines == kept_newlines
    check_layout(layout, pruning)


def check_single_tile(layout, grid, extra_tokens, pruning):
    assert (layout.view_shapes, layout.num_newlines) == (((grid, grid),), 0)
    assert layout.num_stock == grid * grid + extra_tokens
    assert layout.num_class_tokens == max(extra_tokens, 0)
    assert int(layout.valid.sum()) == grid * grid + min(extra_tokens, 0)
    check_layout(layout, pruning)


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
    try:
        layout = TokenLayout.from_image_size(height, width, pruning, **geometry)
    except ValueError as error:
        check_message(error)
        assert pruning.token_budget is not None  # and smaller than what stays whatever is pruned
    else:
        check_llava_next_layout(layout, height, width, pruning)


@settings(FUZZ, max_examples=200)
@given(st.integers(1, 40), GOOD_SETTINGS, st.sampled_from([-1, 0, 1]), st.none() | st.tuples(SIDES, SIDES))
@example(362, {"retention_ratio": 0.3}, 0, None)
@example(1, {}, -1, (1, 1))
@example(1, {"token_budget": 1}, 1, (1, LARGEST_SIDE))
def test_any_grid_of_a_single_tile(grid, given_settings, extra_tokens, image_size):
    pruning = VisualTokenPruningConfig(**given_settings)
    layout = TokenLayout.single_tile(grid, pruning, **FIRST_TOKENS[extra_tokens], image_size=image_size)
    check_single_tile(layout, grid, extra_tokens, pruning)


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
        check_llava_next_layout(layout, int(height), int(width), VisualTokenPruningConfig.coerce(pruning))


@FUZZ
@given(
    st.integers(-2, 400) | PYTHON,
    st.one_of(GOOD_SETTINGS, NEARLY_GOOD, PYTHON),
    st.booleans() | PYTHON,
    st.booleans() | PYTHON,
    st.none() | st.tuples(ODD_SIDES, ODD_SIDES) | PYTHON,
    st.none() | st.tuples(FLOATS, FLOATS, FLOATS, FLOATS) | PYTHON,
)
@example(363, {}, False, False, None, None)
@example(10**400, {}, False, False, None, None)
@example(8, {}, True, True, None, None)
@example(8, {}, False, False, (10**400, 1), None)
@example(8, {}, False, False, (10, 10), (0, 0, float("nan"), 1))
@example(8, {}, False, False, (10, 10), (5, 0, 4, 1))
def test_any_arguments_of_a_single_tile(grid, pruning, has_class_token, skips_first_cell, image_size, view):
    try:
        layout = TokenLayout.single_tile(
            grid,
            pruning,
            has_class_token=has_class_token,
            skips_first_cell=skips_first_cell,
            image_size=image_size,
            view=view,
        )
    except ValueError as error:
        check_message(error)
    else:
        check_single_tile(layout, int(grid), has_class_token - skips_first_cell, VisualTokenPruningConfig.coerce(pruning))


def test_more_cells_than_memory_has_room_for():
    # Refused for every image, also for one that would get by with a smaller pinpoint: at construction, not at the first
    # large picture.
    with pytest.raises(ValueError, match=r"up to 1000001 an image.*131072 are allowed.*Use smaller tiles"):
        TokenLayout.from_image_size(10, 10, VisualTokenPruningConfig(), pinpoints=[[336, 672], [336, 336 * 10**6]])


def test_pinpoints_that_never_end_are_not_read():
    def endless():
        while True:
            yield 336, 672

    with pytest.raises(ValueError, match="`pinpoints` is <generator"):
        TokenLayout.from_image_size(10, 10, VisualTokenPruningConfig(), pinpoints=endless())
