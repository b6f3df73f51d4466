"""HiPrune's selector: against the released code's results, and against a second one written plainly from the description."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hivtp_hf.pruning.registry.hiprune import select_hiprune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivtp_hf import VisualTokenPruningConfig

pytestmark = pytest.mark.once

DATA = Path(__file__).parent / "data"
FULL_TILE = torch.ones(1, 24, 24, dtype=torch.bool)


@pytest.fixture(scope="module")
def released():
    with np.load(DATA / "hiprune.npz") as arrays:
        return dict(arrays)


def kept_of_full_tile(object_scores, deep_scores, budget, alpha):
    scores = (torch.from_numpy(of_layer).view(1, 24, 24) for of_layer in (object_scores, deep_scores))
    pruning = VisualTokenPruningConfig("hiprune", budget / 576, alpha=alpha, published_borders=True)
    return select_hiprune(*scores, FULL_TILE, pruning).flatten().nonzero().flatten().tolist()


def test_published_selections_are_reproduced(released):
    cases = [released[f"llava_case_{name}"] for name in ("seed", "budget", "alpha")]
    assert len(released["llava_kept"]) == 144
    for seed, budget, alpha, kept in zip(*cases, released["llava_kept"], strict=True):
        scores = released["llava_obj_score"][seed], released["llava_deep_score"][seed]
        assert kept_of_full_tile(*scores, budget, alpha) == kept[kept >= 0].tolist()


def test_published_borders_are_reproduced(released):
    deep, budget = released["border_deep_score"], released["border_budget"]
    cases = zip(released["border_obj_score"], released["border_alpha"], released["border_kept"], strict=True)
    kept_cells = [(kept_of_full_tile(scores, deep, budget, alpha), kept.tolist()) for scores, alpha, kept in cases]
    assert len(kept_cells) == 12
    for ours, theirs in kept_cells:
        assert ours == theirs


@pytest.mark.parametrize(
    ("published_borders", "expected"),
    [
        (False, [(0, 2), (0, 3), (1, 3), (3, 0), (3, 1)]),  # two neighbours, and so two registers
        (True, [(0, 0), (0, 2), (0, 3), (1, 0), (1, 3)]),  # the next row's first cell, and the tile's first
    ],
)
def test_neighbours_of_a_corner(published_borders, expected):
    object_scores, deep_scores = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    object_scores[0, 0, 3] = 1
    deep_scores[0, 3] = 1
    pruning = VisualTokenPruningConfig("hiprune", 5 / 16, alpha=1.0, published_borders=published_borders)
    selected = select_hiprune(object_scores, deep_scores, torch.ones(1, 4, 4, dtype=torch.bool), pruning)
    assert [tuple(cell) for cell in selected[0].nonzero().tolist()] == expected


# The same selection a second time: one tile, lists of raster indices, no tensors.


def best(cells, scores, count):
    return sorted(cells, key=lambda cell: (-scores[cell], cell))[:count]


def neighbours_of(cell, grid, published_borders):
    if published_borders:
        return [min(max(cell + step, 0), grid * grid - 1) for step in (-1, 1, -grid, grid)]
    row, column = divmod(cell, grid)
    near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [r * grid + c for r, c in near if 0 <= r < grid and 0 <= c < grid]


def reference_tile(object_scores, deep_scores, valid, pruning):
    """Kept cells of one tile, bool (grid, grid)."""
    grid = len(valid)
    object_scores, deep_scores = object_scores.flatten().tolist(), deep_scores.flatten().tolist()
    cells = [cell for cell in range(grid * grid) if valid.flat[cell]]
    budget = min(len(cells), math.floor(pruning.retention_ratio * len(cells) + 0.5))
    kept = set(best(cells, object_scores, min(round(budget * pruning.alpha / 5), budget // 5)))
    for anchor in sorted(kept):
        kept |= {near for near in neighbours_of(anchor, grid, pruning.published_borders) if near in cells}
    kept |= set(best([cell for cell in cells if cell not in kept], deep_scores, budget - len(kept)))
    assert len(kept) == budget
    return np.isin(np.arange(grid * grid), sorted(kept)).reshape(grid, grid)


@st.composite
def tiles_and_settings(draw):
    grid = draw(st.integers(1, 9))
    num_tiles = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 10**6]))  # few levels: many ties
    scores = random.integers(0, levels, (2, num_tiles, grid, grid)).astype(np.float32) / levels
    valid = random.random((num_tiles, grid, grid)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    pruning = VisualTokenPruningConfig(
        "hiprune",
        retention_ratio=draw(st.sampled_from([1 / 36, 1 / 18, 1 / 9, 2 / 9, 0.5, 1.0]) | st.floats(1 / 36, 1)),
        alpha=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1)),
        published_borders=draw(st.booleans()),
    )
    return *scores, valid, pruning


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tiles_and_settings())
def test_equals_the_reference(case):
    object_scores, deep_scores, valid, pruning = case
    selected = select_hiprune(*map(torch.from_numpy, (object_scores, deep_scores, valid)), pruning).numpy()
    expected = [reference_tile(*tile, pruning) for tile in zip(object_scores, deep_scores, valid, strict=True)]
    assert np.array_equal(selected, np.stack(expected))
    assert not selected[~valid].any()


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 7, 13, 64, 575, 576])
def test_anchors_and_neighbours_always_fit_the_budget(budget):
    # At alpha = 1 rounding up would ask for more anchors than there is room for: the released code fails there.
    scores = torch.rand(2, 1, 24, 24)
    pruning = VisualTokenPruningConfig("hiprune", max(budget, 1e-9) / 576, alpha=1.0)
    assert int(select_hiprune(*scores, FULL_TILE, pruning).sum()) == budget


@pytest.mark.parametrize(("budget", "anchors"), [(64, 1), (128, 3), (192, 4), (288, 6)])
def test_published_numbers_of_anchors(budget, anchors):
    object_scores = torch.zeros(1, 24, 24)
    object_scores[0, ::3, ::3] = 1  # so far apart that none is another's neighbour
    selected = select_hiprune(object_scores, -object_scores, FULL_TILE, VisualTokenPruningConfig("hiprune", budget / 576))
    assert int(selected[object_scores == 1].sum()) == anchors


@pytest.mark.parametrize("published_borders", [False, True])
def test_a_ratio_of_one_keeps_every_valid_cell(published_borders):
    scores, valid = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8) < 0.7
    pruning = VisualTokenPruningConfig("hiprune", 1.0, alpha=1.0, published_borders=published_borders)
    assert torch.equal(select_hiprune(*scores, valid, pruning), valid)


def test_settings_may_be_a_dict():
    scores, valid = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8) < 0.7
    as_dict = {"method": "hiprune", "retention_ratio": 0.3, "alpha": 0.4}
    assert torch.equal(
        select_hiprune(*scores, valid, as_dict), select_hiprune(*scores, valid, VisualTokenPruningConfig(**as_dict))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype):
    scores, valid = torch.rand(2, 3, 24, 24).to(dtype), torch.rand(3, 24, 24) < 0.9
    pruning = VisualTokenPruningConfig("hiprune", 0.2, alpha=0.5)
    assert torch.equal(select_hiprune(*scores, valid, pruning), select_hiprune(*scores.float(), valid, pruning))


@pytest.mark.parametrize("published_borders", [False, True])
def test_tiles_do_not_influence_each_other(published_borders):
    scores, valid = torch.rand(2, 5, 12, 12), torch.rand(5, 12, 12) < 0.8
    pruning = VisualTokenPruningConfig("hiprune", 0.3, alpha=0.6, published_borders=published_borders)
    one_by_one = [select_hiprune(*scores[:, [tile]], valid[[tile]], pruning) for tile in range(5)]
    assert torch.equal(select_hiprune(*scores, valid, pruning), torch.cat(one_by_one))
    assert select_hiprune(*scores[:, :0], valid[:0], pruning).shape == (0, 12, 12)


def test_arguments_stay_as_they_are():
    scores, valid = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8) < 0.7
    before = scores.clone(), valid.clone()
    select_hiprune(*scores, valid, VisualTokenPruningConfig("hiprune"))
    assert torch.equal(scores, before[0])
    assert torch.equal(valid, before[1])


def test_scores_that_are_no_numbers_keep_the_count():
    scores = torch.full((2, 2, 8, 8), float("nan"))
    scores[:, 1] = float("inf")
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[:, 5:] = False
    selected = select_hiprune(*scores, valid, VisualTokenPruningConfig("hiprune", 0.5, alpha=0.5))
    assert selected.flatten(1).sum(1).tolist() == [20, 20]
    assert not selected[~valid].any()


@pytest.mark.parametrize("published_borders", [False, True])
def test_compiles_into_one_graph(published_borders):
    pruning = VisualTokenPruningConfig("hiprune", 0.4, alpha=0.5, published_borders=published_borders)
    scores, valid = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8) < 0.8
    compiled = torch.compile(select_hiprune, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*scores, valid, pruning), select_hiprune(*scores, valid, pruning))


@pytest.mark.parametrize("published_borders", [False, True])
def test_never_waits_for_the_device(published_borders):
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    scores = torch.rand(2, 3, 24, 24, device="meta")
    valid = torch.ones(3, 24, 24, dtype=torch.bool, device="meta")
    pruning = VisualTokenPruningConfig("hiprune", published_borders=published_borders)
    assert select_hiprune(*scores, valid, pruning).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("scores", "valid", "message"),
    [
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), "square"),
        (torch.rand(2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), r"shape \(2, 4, 4\)"),
        (torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool), "shape"),
        (torch.rand(1, 0, 0), torch.ones(1, 0, 0, dtype=torch.bool), "at least one cell"),
        (torch.rand(1, 4, 4), torch.ones(1, 4, 4), "`valid` is torch.float32; it must be bool"),
        (torch.ones(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4, dtype=torch.bool), "floating"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(scores, valid, message):
    good = torch.rand(valid.shape)
    pruning = VisualTokenPruningConfig("hiprune")
    with pytest.raises(ValueError, match=message):
        select_hiprune(scores, good, valid, pruning)
    if good.shape == (1, 4, 4) and valid.dtype == torch.bool:  # `valid` itself is right
        with pytest.raises(ValueError, match=f"`deep_scores`.*{message}"):
            select_hiprune(good, scores, valid, pruning)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (VisualTokenPruningConfig(), "`pruning` has the method 'hivtp'; select_hiprune needs 'hiprune'"),
        ({"method": "random"}, "`pruning` has the method 'random'; select_hiprune needs 'hiprune'"),
        ({"method": "hiprune", "token_budget": 64}, r"`token_budget` \(64\).*give a `retention_ratio`"),
        ({"method": "hiprune", "alpha": 2}, "`alpha` is 2"),
        (0.5, "`pruning_config` is 0.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pruning, message):
    with pytest.raises(ValueError, match=message):
        select_hiprune(torch.rand(1, 4, 4), torch.rand(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), pruning)
