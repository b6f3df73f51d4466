"""VFlowOpt up to what enters the language model: against the released functions' results, and against a plain reference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hivtp_hf import StitchedViews, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.methods.vflowopt import (
    attention_sinks,
    count_vflowopt,
    grey_level_entropy,
    groups_of_tokens,
    merge_vflowopt,
    recycle_tokens,
    select_vflowopt,
    stages_vflowopt,
    strategy_vflowopt,
    third_stage_ratio,
)
from hivtp_hf.pruning.features import cut
from hivtp_hf.pruning.merging import averages_of, with_averages
from layouts import FIRST_TOKENS

pytestmark = pytest.mark.once

DATA = Path(__file__).parents[1] / "data"
# LLaVA-OneVision's resolutions for tiles of 384 pixels, with tiles of 378, which are the same 27 x 27 cells.
SIDE = 378
PINPOINTS = [(rows * SIDE, columns * SIDE) for rows in range(1, 7) for columns in range(1, 7)]


@pytest.fixture(scope="module")
def released():
    with np.load(DATA / "vflowopt.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name[0] in "ABCDF"}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=1e-5)


def packed_with_newlines(grid, newline):
    """The tokens of a stitched grid (rows, columns, ...), a newline behind every row."""
    behind = newline.expand(len(grid), 1, *grid.shape[2:])
    return torch.cat((grid, behind), dim=1).flatten(0, 1)


def places_with_newlines(part, rows, columns):
    return torch.cartesian_prod(torch.tensor([part]), torch.arange(rows), torch.arange(columns))


def kept_of(features, merged):
    """What enters the language model, (n, hidden)."""
    return with_averages([features], [features[merged.kept_indices]], [merged])[0]


# Importance.


def test_published_entropy_is_reproduced(released):
    levels = released["A_raw_u8"].float().mean(1).round().to(torch.uint8)
    cells = levels.unflatten(1, (4, 14)).unflatten(3, (4, 14)).transpose(2, 3).reshape(-1, 14 * 14)
    assert_close(grey_level_entropy(cells).view(2, 4, 4), released["A_entropy_px01"])


def importance_of_maps(maps, entropy, threshold, weight):
    """From whole attention maps, (views, heads, tokens, tokens), by the functions that the method uses."""
    attention = maps.mean(1)
    sinks, weights = attention_sinks(attention.mean(1), [threshold] * len(maps))
    rows = attention.gather(1, sinks[..., None].expand(-1, -1, attention.shape[2]))
    return (rows * weights[..., None]).sum(1) + weight * entropy.flatten(1).softmax(1)


def test_published_importance_is_reproduced(released):
    for case, (threshold, weight) in enumerate(released["B_cases_t_alpha"].tolist()):
        found = importance_of_maps(released["B_attn"], released["B_entropy"], threshold, weight)
        if case < 6:
            assert_close(found, released[f"B_map_{case}"])
        else:  # no sink: the released code has no numbers there
            assert released[f"B_map_{case}"].isnan().all()
            attention = released["B_attn"].mean(1)
            best = attention.mean(1).argmax(1)
            assert_close(found, attention[torch.arange(2), best])


# Stage 1.


def layout_of(tiles_size, par, exact_count=False):
    """The layout of an image (width, height) with the settings of a recorded case."""
    _, width, height, ratio, side = par
    pruning = VisualTokenPruningConfig(
        "vflowopt", 0.5, first_stage_ratio=ratio, recycling_cell_side=side, exact_count=exact_count
    )
    return TokenLayout.from_image_size(
        int(height), int(width), pruning, tile_size=SIDE, patch_size=14, pinpoints=[tuple(SIDE * n for n in tiles_size)]
    )


@pytest.mark.parametrize(("case", "tiles"), [(0, (2, 2)), (1, (2, 2)), (3, (1, 1)), (4, (2, 2))])
def test_published_recycling_is_reproduced(released, case, tiles):
    """Through the layout of the image: base tile, crops, un-padding, a newline for every row."""
    features, maps = released[f"D{case}_feat_f16"].float(), released[f"D{case}_maps"]
    layout = layout_of(tiles, released[f"D{case}_par"].tolist())
    views = [features[:1], features[1:]]
    packed = [views[0][0]]
    part = layout.parts[1]
    grid = part.stitched(views[1].flatten(0, 1).T).movedim(0, -1)
    grid = grid[part.used_rows.start : part.used_rows.stop, part.used_columns.start : part.used_columns.stop]
    packed.append(packed_with_newlines(grid, released[f"D{case}_newline"]))
    packed = torch.cat(packed)
    assert len(packed) == layout.num_stock

    merged = merge_vflowopt(maps.flatten(), layout, layout.pruning)
    assert len(merged.kept_indices) == int(released[f"D{case}_n_out"]) <= layout.num_retained
    assert_close(kept_of(packed, merged), released[f"D{case}_out_feat"])
    assert_close(layout.packed(maps.flatten(), 1.0, 1.0)[merged.kept_indices], released[f"D{case}_out_map"])
    assert merged.is_average.any()


def resized(grid, rows, columns):
    """As stock brings features (hidden, rows, columns) to fewer cells."""
    return torch.nn.functional.interpolate(grid[None], (rows, columns), mode="bilinear")[0]


def test_published_recycling_of_resampled_crops_is_reproduced(released):
    features, maps, (_, width, height, ratio, side) = (
        released["D2_feat_f16"].float(),
        released["D2_maps"],
        released["D2_par"].tolist(),
    )
    stitched = StitchedViews(27, 27, down=4, across=4)
    of_cells = torch.cat((features[1:].flatten(0, 1).T, maps[None, 1:].flatten(1)))
    grid = stitched.stitched(of_cells)
    # 1536 x 1400 pixels in 4 x 4 tiles: rows are un-padded. 9 tiles' worth of cells are the most.
    padding = (108 - round(height * 108 / width)) // 2
    grid = grid[:, padding : 108 - padding]
    scale = math.sqrt(grid.shape[1] * grid.shape[2] / (9 * 27**2))
    assert scale > 1.1
    grid = resized(grid, int(grid.shape[1] // scale), int(grid.shape[2] // scale))
    rows, columns = grid.shape[1:]
    newline = torch.cat((released["D2_newline"], torch.ones(1)))
    packed = packed_with_newlines(grid.movedim(0, -1), newline)
    tokens = torch.cat((torch.cat((features[0], maps[0][:, None]), dim=1), packed))
    places = torch.cat((places_with_newlines(0, 27, 27), places_with_newlines(1, rows, columns + 1)))
    kept = len(tokens) - round(len(tokens) * (1 - ratio))
    merged = recycle_tokens(tokens[:, -1], groups_of_tokens(places, side), kept, int(len(tokens) / side**2), exact_count=False)
    assert len(merged.kept_indices) == int(released["D2_n_out"])
    assert_close(kept_of(tokens[:, :-1], merged), released["D2_out_feat"])
    assert_close(tokens[merged.kept_indices, -1], released["D2_out_map"])


def test_published_stage_without_recycling_is_reproduced(released):
    """A video of 4 frames, and two images in a prompt."""
    for case in (5, 6):
        features, maps = released[f"D{case}_feat_f16"].float(), released[f"D{case}_maps"]
        ratio = released[f"D{case}_par"].tolist()[3]
        tokens = torch.cat((features, maps[..., None]), dim=2)
        if case == 5:
            tokens = resized(tokens.movedim(2, 1).flatten(0, 1).unflatten(1, (27, 27)), 14, 14)
            tokens = tokens.unflatten(0, (4, -1)).movedim(1, -1).flatten(0, 2)
            images = [torch.cat((tokens, torch.cat((released["D5_newline"], torch.ones(1)))[None]))]
        else:
            images = list(tokens)
        found = []
        for image in images:
            kept = len(image) - round(len(image) * (1 - ratio))
            merged = recycle_tokens(image[:, -1], groups_of_tokens(torch.zeros(len(image), 3).long(), 9), kept, 0)
            assert not merged.is_average.any()
            found.append(kept_of(image, merged))
        found = torch.cat(found)
        assert len(found) == int(released[f"D{case}_n_out"])
        assert_close(found[:, :-1], released[f"D{case}_out_feat"])
        assert_close(found[:, -1], released[f"D{case}_out_map"])


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_published_unpadding_is_reproduced(released, case):
    """Features and importance go through the same geometry, which is the layout's."""
    features, importance = released[f"C{case}_feat"], released[f"C{case}_map"]
    width, height = released[f"C{case}_size_wh"].tolist()
    rows, columns = importance.shape
    cells = 27 if rows % 27 == 0 else 10
    tile = cells * 14
    layout = TokenLayout.from_image_size(
        height,
        width,
        VisualTokenPruningConfig("vflowopt"),
        tile_size=tile,
        patch_size=14,
        pinpoints=[(rows // cells * tile, columns // cells * tile)],
    )
    part = layout.parts[1]
    for values, expected in (
        (importance[None], released[f"C{case}_out_map"][None]),
        (features, released[f"C{case}_out_feat"]),
    ):
        of_cells = torch.cat((values.new_zeros(len(values), cells**2), part.unstitched(values)), dim=1)
        for channel, unpadded in zip(of_cells, expected, strict=True):
            packed = layout.packed(channel, -7.0, -7.0)[cells**2 :].view(len(part.used_rows), -1)
            assert torch.equal(packed[:, :-1], unpadded)
            assert (packed[:, -1] == -7).all()


# Budgets.


def test_published_budgets_are_reproduced(released):
    layers = (9, 18, 28)
    clipped, ratios, violations = (released[f"F_{name}"].tolist() for name in ("clipped", "ratios", "violation"))
    assert len(ratios) == 20
    for (first, second, *_), (_, _, third), violation in zip(clipped, ratios, violations, strict=True):
        solved = third_stage_ratio(0.25, first, second, *layers)
        assert min(solved, 1.0) == pytest.approx(third, abs=1e-5)
        average = (first * 9 + first * second * 9 + first * second * third * 10) / 28
        assert 0.25 - average == pytest.approx(violation, abs=1e-5)
        pruning = VisualTokenPruningConfig("vflowopt", 0.25, first_stage_ratio=first, second_stage_ratio=second)
        if solved > 1:
            with pytest.raises(ValueError, match=r"`retention_ratio` is 0.25, the average over 28 layers.*Raise the first two"):
                stages_vflowopt(pruning, 28)
        else:
            assert stages_vflowopt(pruning, 28) == ((9, second), (18, solved))


PUBLISHED = {
    0.5: (28.683047941520474, 11.756787150848968, 0.7233201448753168, 0.748747637472693, 0.4830),
    0.25: (34.759552803070484, 15.580797034937687, 0.2651026358526424, 0.9833433139039235, 0.8700),
    0.1: (39.26492840997221, 17.386981849158786, 0.11661529508161146, 1.0, 0.6011),
}


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_published_strategies(ratio):
    *strategy, third = PUBLISHED[ratio]
    pruning = VisualTokenPruningConfig("vflowopt", ratio)
    assert strategy_vflowopt(pruning) == tuple(strategy)
    (second_layer, second), (third_layer, solved) = stages_vflowopt(pruning, 28)
    assert (second_layer, third_layer, second) == (9, 18, strategy[3])
    assert solved == pytest.approx(third, abs=1e-4)


def test_strategies_between_published_ones():
    def strategy(ratio, **own):
        return strategy_vflowopt(VisualTokenPruningConfig("vflowopt", ratio, **own))

    middle = [(low + high) / 2 for low, high in zip(PUBLISHED[0.25], PUBLISHED[0.5], strict=True)]
    assert strategy(0.375) == pytest.approx(middle[:4])
    assert strategy(0.05) == pytest.approx((*PUBLISHED[0.1][:2], PUBLISHED[0.1][2] / 2, 1))
    assert strategy(0.75) == pytest.approx((*PUBLISHED[0.5][:2], *((1 + value) / 2 for value in PUBLISHED[0.5][2:4])))
    assert strategy(1)[2:] == (1, 1)
    assert strategy(1, first_stage_ratio=0.3)[2:] == (1, 1)  # nothing is done at a ratio of 1
    assert strategy(0.3, sink_threshold=2, second_stage_ratio=0.6)._replace(recycling_cell_side=0, first_stage_ratio=0) == (
        2,
        0,
        0,
        0.6,
    )


def average(pruning, layers):
    """Of what is left over all layers, from the stages alone."""
    left, total, done = strategy_vflowopt(pruning).first_stage_ratio, 0.0, 0
    for layer, ratio in stages_vflowopt(pruning, layers):
        total, left, done = total + left * (layer - done), left * ratio, layer
    return (total + left * (layers - done)) / layers


@given(ratio=st.floats(1e-6, 1, exclude_max=True), layers=st.integers(3, 200))
@settings(deadline=None)
def test_the_ratio_is_the_average_over_layers(ratio, layers):
    pruning = VisualTokenPruningConfig("vflowopt", ratio)
    stages = stages_vflowopt(pruning, layers)
    assert 1 <= stages[0][0] < stages[1][0] < layers
    assert average(pruning, layers) == pytest.approx(ratio, rel=1e-9)


def test_stages_that_are_set():
    pruning = VisualTokenPruningConfig("vflowopt", 0.25, second_stage_layer=2, third_stage_layer=5)
    assert [layer for layer, _ in stages_vflowopt(pruning, 8)] == [2, 5]
    assert [layer for layer, _ in stages_vflowopt({"method": "vflowopt", "third_stage_layer": 3}, 28)] == [2, 3]
    assert [layer for layer, _ in stages_vflowopt({"method": "vflowopt", "second_stage_layer": 9}, 28)] == [9, 18]
    assert stages_vflowopt(VisualTokenPruningConfig("vflowopt", 1), 28) == ((9, 1), (18, 1))


@pytest.mark.parametrize(
    ("own", "layers", "message"),
    [
        ({"third_stage_layer": 28}, 28, r"layers 9 and 28.*has 28 layers, 0 to 27.*1 <= second < third < 28"),
        ({"second_stage_layer": 18}, 18, r"layers 18 and 19.*has 18 layers"),
        ({}, 2, r"layers 1 and 2.*at least 3 layers"),
        ({"first_stage_ratio": 0.2, "retention_ratio": 0.3}, 28, r"is 0\.3, .*28 layers.*`first_stage_ratio` 0\.2 .*Raise"),
        ({"first_stage_ratio": 0.9, "retention_ratio": 0.1}, 28, r"`second_stage_ratio` 1 .*Lower the first two"),
    ],
)
def test_stages_that_cannot_be(own, layers, message):
    with pytest.raises(ValueError, match=message):
        stages_vflowopt(VisualTokenPruningConfig("vflowopt", **own), layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"second_stage_layer": 9, "third_stage_layer": 9}, r"`second_stage_layer` is 9 and `third_stage_layer` 9"),
        ({"token_budget": 9, "first_stage_ratio": 0.5}, r"`token_budget` is 9 and `first_stage_ratio` 0\.5"),
        ({"stages": [[3, 0.5]]}, r"`stages` is \(\(3, 0\.5\),\).*has stages of its own.*`second_stage_layer`"),
        ({"token_budget": 9, "exact_count": False}, r"`token_budget` is 9 and `exact_count` False"),
        ({"recycling_cell_side": 0.5}, r"`recycling_cell_side` is 0\.5.*from 1"),
        ({"entropy_weight": 1.5}, r"`entropy_weight` is 1\.5.*from -1 to 1"),
        ({"second_stage_ratio": 0}, r"`second_stage_ratio` is 0.*above 0"),
        ({"second_stage_layer": 0}, r"`second_stage_layer` is 0.*from 1"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        VisualTokenPruningConfig("vflowopt", **given)


# The rule, written plainly: lists and loops, from the description alone.


def plainly_recycled(importance, places, kept, averages, side, exact):
    """Kept tokens, and of each the tokens whose average it holds, as a dict."""
    tokens = range(len(importance))
    by_importance = sorted(tokens, key=lambda token: -importance[token])
    if kept == len(importance):
        return {token: [token] for token in tokens}
    low = by_importance[kept - averages :]
    groups = {}
    for token in low:
        grid, row, column = places[token]
        groups.setdefault((grid, math.floor(row / side), math.floor(column / side)), []).append(token)
    making = sorted(groups)
    extra = []
    if exact:
        making = sorted(making, key=lambda group: -sum(importance[token] for token in groups[group]))[:averages]
        holders = {groups[group][0] for group in making}
        extra = [token for token in low if token not in holders][: averages - len(making)]
    result = {token: [token] for token in (*by_importance[: kept - averages], *extra)}
    for group in making:
        result[groups[group][0]] = [token for token in groups[group] if token not in extra]
    return dict(sorted(result.items()))


def plain_averages(result, importance, features):
    rows = []
    for holder, members in result.items():
        weights = [max(importance[token], 1e-12) for token in members]
        sums = sum(weight * features[token].double() for weight, token in zip(weights, members, strict=True))
        rows.append((sums / sum(weights)).float() if len(members) > 1 else features[holder])
    return torch.stack(rows) if rows else features[:0]


LAYOUTS = {
    "single": lambda pruning, size: TokenLayout.single_tile(1 + size % 9, pruning, **FIRST_TOKENS[size % 3 - 1]),
    "next": lambda pruning, size: TokenLayout.from_image_size(
        1 + size * 37 % 411,
        1 + size * 91 % 503,
        pruning,
        tile_size=56,
        pinpoints=[(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)],
    ),
    "rectangle": lambda pruning, size: TokenLayout(
        None, pruning, [StitchedViews(1 + size % 7, 1 + size // 7 % 13)], at_least_one=True
    ),
    "newline at the end": lambda pruning, size: TokenLayout(
        None, pruning, [StitchedViews(2, 3, down=2), StitchedViews(1 + size % 7, 1 + size // 7 % 13, newlines="end")]
    ),
}


@given(
    kind=st.sampled_from(list(LAYOUTS)),
    size=st.integers(0, 2000),
    ratio=st.floats(1e-9, 1) | st.sampled_from([0.1, 0.25, 0.5, 0.99, 0.999, 1.0]),
    first=st.none() | st.floats(1e-6, 1) | st.sampled_from([0.01, 0.5, 0.999, 1.0]),
    side=st.none() | st.floats(1, 40) | st.sampled_from([1, 1.5, 2, 3]),
    keep_newlines=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 2**20),
    alike=st.booleans(),
)
@example(kind="next", size=3, ratio=0.5, first=1.0, side=2, keep_newlines=True, exact=True, seed=0, alike=False)  # drop = 0
@example(kind="next", size=3, ratio=0.5, first=1.0, side=2, keep_newlines=True, exact=False, seed=0, alike=False)
@example(kind="next", size=3, ratio=0.5, first=0.05, side=1, keep_newlines=True, exact=True, seed=0, alike=True)  # drop + c > N
@example(kind="rectangle", size=30, ratio=0.1, first=1e-6, side=1, keep_newlines=True, exact=True, seed=0, alike=False)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_rule_and_its_count(kind, size, ratio, first, side, keep_newlines, exact, seed, alike):
    pruning = VisualTokenPruningConfig(
        "vflowopt", ratio, first_stage_ratio=first, recycling_cell_side=side, keep_newlines=keep_newlines, exact_count=exact
    )
    layout = LAYOUTS[kind](pruning, size)
    generator = torch.Generator().manual_seed(seed)
    # In eighths, sums and ties are the same in any order; else there are none.
    importance = torch.rand(layout.num_cells, generator=generator, dtype=torch.float64)
    importance = ((importance * 4).floor() / 8 if alike else importance).float()
    merged = merge_vflowopt(importance, layout, pruning)

    strategy = strategy_vflowopt(pruning)
    tokens = [
        token
        for token in range(layout.num_stock)
        if keep_newlines
        or bool(layout.packed(torch.ones(layout.num_cells), 0.0, 0.0)[token])
        or (layout.has_class_token and token == 0)
    ]
    drop = round(len(tokens) * (1 - strategy.first_stage_ratio))
    kept = len(tokens) - drop
    if kind == "rectangle" and exact:
        kept = max(kept, 1)
    averages = min(int(len(tokens) / strategy.recycling_cell_side**2), kept)
    packed = layout.packed(importance, 1.0, 1.0)[tokens].tolist()
    places = [layout.token_places[token].tolist() for token in tokens]
    expected = plainly_recycled(packed, places, kept, averages, strategy.recycling_cell_side, exact)
    assert merged.kept_indices.tolist() == [tokens[token] for token in expected]
    assert merged.is_average.tolist() == [len(members) > 1 for members in expected.values()]
    features = torch.rand(layout.num_stock, 5, generator=generator)
    torch.testing.assert_close(
        kept_of(features, merged), plain_averages(expected, packed, features[tokens]), atol=1e-5, rtol=1e-5
    )

    # The number is the layout's.
    if exact:
        assert len(merged.kept_indices) == kept == layout.num_retained
    else:
        assert len(merged.kept_indices) <= layout.num_retained
    assert layout.num_retained == sum(layout.group_totals) + layout.num_newlines + layout.num_class_tokens
    if ratio == 1:
        assert not merged.is_average.any()
        assert layout.num_retained == len(tokens)
        assert layout.keeps_everything == (len(tokens) == layout.num_stock)


@given(
    tokens=st.integers(1, 1500),
    first=st.floats(1e-9, 1),
    side=st.floats(1, 60),
    seed=st.integers(0, 2**20),
    width=st.integers(1, 90),
)
@settings(max_examples=2000, deadline=None)
def test_exactly_as_many_as_are_to_stay(tokens, first, side, seed, width):
    kept = tokens - round(tokens * (1 - first))
    averages = min(int(tokens / side**2), kept)
    index = torch.arange(tokens)
    places = torch.stack((index // 700, index % 700 // width, index % width), dim=1)
    importance = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    merged = recycle_tokens(importance, groups_of_tokens(places, side), kept, averages)
    assert len(merged.kept_indices) == kept
    assert bool((merged.kept_indices.diff() > 0).all())
    assert int(merged.is_average.sum()) <= averages
    held = merged.source[merged.is_average]
    torch.testing.assert_close(averages_of(torch.ones(tokens, 1), merged)[held, 0], torch.ones(len(held)))
    # Nothing is averaged twice, and nothing that stays as it is.
    average_of_member = torch.arange(merged.num_averages).repeat_interleave(merged.starts.diff())
    members = merged.members[torch.isin(average_of_member, held) & (merged.weights > 0)]
    assert len(members.unique()) == len(members)
    assert not bool(torch.isin(members, merged.kept_indices[~merged.is_average]).any())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_importance_that_is_no_number_keeps_the_count(value):
    layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig("vflowopt", 0.25))
    importance = torch.rand(layout.num_cells, generator=torch.Generator().manual_seed(0))
    importance[::3] = value
    merged = merge_vflowopt(importance, layout, layout.pruning)
    assert len(merged.kept_indices) == layout.num_retained
    assert layout.is_no_cell[merged.kept_indices].sum() == layout.num_newlines == 36
    features = torch.rand(layout.num_stock, 3)
    assert kept_of(features, merged).isfinite().all()


def test_averages_do_not_touch_what_is_no_member():
    importance = torch.tensor([0.9, 0.5, 0.4, 0.1, 0.1, 0.1])
    groups = groups_of_tokens(torch.tensor([[0, 0, 0]] * 3 + [[0, 9, 0]] + [[0, 18, 0]] * 2), 3.0)
    merged = recycle_tokens(importance, groups, 2, 1)
    features = torch.full((6, 2), math.nan)
    features[:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(kept_of(features, merged)[1], (features[1] * 0.5 + features[2] * 0.4) / 0.9)
    assert torch.equal(kept_of(features, merged)[0], features[0])


def test_streams_are_averaged_alike():
    layout = TokenLayout.single_tile(12, VisualTokenPruningConfig("vflowopt", 0.25, recycling_cell_side=3))
    merged = merge_vflowopt(torch.rand(144, generator=torch.Generator().manual_seed(1)), layout, layout.pruning)
    features = torch.rand(144, 6)
    streams = [[features], [2 * features]]
    kept = [cut(stream, [merged.kept_indices], [layout]) for stream in streams]
    first, second = with_averages(streams, kept, [merged])
    torch.testing.assert_close(2 * first[0], second[0])
    assert torch.equal(first[0][~merged.is_average], features[merged.kept_indices][~merged.is_average])
    assert with_averages([features.bfloat16()], [kept[0][0].bfloat16()], [merged])[0].dtype == torch.bfloat16
    # In steps, the same sums.
    large = torch.rand(144, 300_000)
    stepped = kept_of(large, merged)
    torch.testing.assert_close(stepped[:, :6], kept_of(large[:, :6].clone(), merged))


def test_what_is_left_out_of_counts():
    count = count_vflowopt(TokenLayout.single_tile(24, VisualTokenPruningConfig("none")), {"method": "vflowopt"})
    assert count == (576 - round(576 * (1 - 0.7233201448753168)),)
    with pytest.raises(ValueError, match="`pruning` has the method 'random'; select_vflowopt needs 'vflowopt'"):
        strategy_vflowopt({"method": "random"})


def test_kept_cells_of_several_images():
    pruning = VisualTokenPruningConfig("vflowopt", 0.25, recycling_cell_side=4)
    layouts = [TokenLayout.from_image_size(*size, pruning) for size in ((480, 640), (300, 900))]
    generator = torch.Generator().manual_seed(4)
    importance = [torch.rand(layout.num_cells, generator=generator) for layout in layouts]
    kept = select_vflowopt(torch.cat(importance), layouts, pruning).split([layout.num_cells for layout in layouts])
    for of_image, own, layout in zip(importance, kept, layouts, strict=True):
        expected = merge_vflowopt(of_image, layout, pruning).kept_indices
        assert own.nonzero()[:, 0].tolist() == sorted(layout.cell_numbers(expected).tolist())
        assert not bool((own & ~layout.valid).any())


def test_newlines_are_kept_first():
    layout = TokenLayout.from_image_size(672, 672, VisualTokenPruningConfig("vflowopt", 0.1))
    merged = merge_vflowopt(torch.rand(layout.num_cells), layout, layout.pruning)
    assert (layout.num_newlines, int(layout.is_no_cell[merged.kept_indices].sum())) == (48, 48)
    assert layout.num_retained == 2928 - round(2928 * (1 - 0.11661529508161146))
    few = TokenLayout.from_image_size(672, 672, VisualTokenPruningConfig("vflowopt", 0.01))
    assert (few.num_newlines, few.group_totals) == (34, (0,))


@pytest.mark.parametrize("budget", [1, 2, 35, 36, 37, 300, 2143, 2144, 9999])
def test_a_token_budget_counts_newlines(budget):
    layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig("vflowopt", token_budget=budget))
    ratio, stock = layout.pruning.retention_ratio, layout.num_stock
    assert layout.num_retained == min(budget, stock)
    if ratio < 1:
        above = VisualTokenPruningConfig("vflowopt", math.nextafter(ratio, 1))
        assert TokenLayout.from_image_size(480, 640, above).num_retained > budget


def test_sinks_of_sequences_of_their_own():
    received = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25], [math.nan] * 4])
    sinks, weights = attention_sinks(received, [1.1, 2.0, 1.5])
    assert sinks.shape == (3, 4)
    assert sinks[0, :2].tolist() == [1, 3]
    assert weights.tolist() == [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert (int(sinks[1, 0]), int(sinks[2, 0])) == (0, 0)
    # No more rows are read than can be sinks.
    assert attention_sinks(torch.rand(2, 729), [28.7, 39.3])[0].shape == (2, 26)
    every = attention_sinks(torch.rand(1, 5), [0.0])
    assert every[0].shape == (1, 5)
    assert every[1].tolist() == [[0.2] * 5] or torch.allclose(every[1], torch.full((1, 5), 0.2))


def test_nothing_waits_for_the_device():
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig("vflowopt", 0.25))
    merged = merge_vflowopt(torch.rand(layout.num_cells, device="meta"), layout, layout.pruning)
    assert merged.kept_indices.shape == (layout.num_retained,)
    features = torch.rand(layout.num_stock, 4, device="meta")
    assert kept_of(features, merged).shape == (layout.num_retained, 4)
    sinks, weights = attention_sinks(torch.rand(3, 49, device="meta"), [30.0, 20.0, 10.0])
    assert sinks.shape == weights.shape == (3, 5)
