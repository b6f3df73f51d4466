"""The selectors of "cls_attention", "random" and "uniform": against plain Python, cell by cell."""

import math
import random

import pytest
import torch

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.methods.cls_attention import select_cls_attention
from hivtp_hf.methods.random import select_random
from hivtp_hf.methods.uniform import select_uniform

pytestmark = pytest.mark.once

RATIOS = [1, 0.9, 0.5, 1 / 3, 2 / 9, 0.1, 1 / 36, 1e-9]


def inputs(views, rows, columns, seed):
    """Scores with many ties, and masks from empty to full."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (views, rows, columns), generator=generator) / 9
    share = torch.rand(views, 1, 1, generator=generator)
    share[0], share[-1] = 1, 0
    return scores, torch.rand(views, rows, columns, generator=generator) < share


def counts(valid, ratio):
    return [min(n, math.floor(ratio * n + 0.5)) for n in valid.flatten(1).sum(1).tolist()]


def full(tiles, grid):
    return torch.ones(tiles, grid, grid, dtype=torch.bool)


@pytest.mark.parametrize("ratio", RATIOS)
def test_class_attention_keeps_the_highest_scores(ratio):
    scores, valid = inputs(5, 4, 9, seed=2)
    kept = select_cls_attention(scores, valid, VisualTokenPruningConfig(method="cls_attention", retention_ratio=ratio))
    for tile, total in enumerate(counts(valid, ratio)):
        score, usable = scores[tile].flatten().tolist(), valid[tile].flatten().tolist()
        best = sorted((cell for cell in range(36) if usable[cell]), key=lambda cell: (-score[cell], cell))[:total]
        assert kept[tile].flatten().nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("ratio", RATIOS)
def test_uniform_cells_lie_where_the_formula_puts_them(ratio):
    _, valid = inputs(6, 7, 8, seed=3)
    kept = select_uniform(valid, VisualTokenPruningConfig(method="uniform", retention_ratio=ratio))
    for tile, total in enumerate(counts(valid, ratio)):
        cells = valid[tile].flatten().nonzero().flatten().tolist()
        n = len(cells)
        expected = [cell for i, cell in enumerate(cells) if (i + 1) * total // n > i * total // n]
        assert kept[tile].flatten().nonzero().flatten().tolist() == expected


def test_the_published_random_draw():
    # Results of the random baseline are published for these draws: another literal here makes them other baselines, so a change
    # needs a new version and a line in the changelog.
    kept = select_random([0, 1], full(2, 8), VisualTokenPruningConfig(method="random", retention_ratio=1 / 8))
    assert [tile.flatten().nonzero().flatten().tolist() for tile in kept] == [
        [7, 21, 23, 26, 31, 37, 51, 54],
        [5, 9, 10, 11, 17, 18, 36, 49],
    ]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_draw_does_not_depend_on_its_surroundings(default):
    pruning = VisualTokenPruningConfig(method="random", seed=5)
    expected = select_random([2, 0], full(2, 8), pruning)
    state = torch.random.get_rng_state()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode():
            assert torch.equal(select_random([2, 0], full(2, 8), pruning), expected)
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):  # under which models are built
        valid = torch.ones(2, 8, 8, dtype=torch.bool, device="cpu")
        assert torch.equal(select_random([2, 0], valid, pruning), expected)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change


def test_random_cells_differ_by_seed_and_by_tile():
    # 2**32 - 1 and neighbours of powers of two: of a generator's seed the CPU reads 32 bits.
    seeds = [0, 1, 2**15, 2**16, 2**17, 2**31, 2**32 - 1]
    view_indices = [0, 1, 2, 31, 32, 33]
    draws = [
        kept.flatten().tolist()
        for seed in seeds
        for kept in select_random(view_indices, full(6, 8), VisualTokenPruningConfig(method="random", seed=seed))
    ]
    assert len(set(map(tuple, draws))) == len(seeds) * len(view_indices)


def test_equal_indices_draw_equal_cells():
    kept = select_random([3, 0, 3], full(3, 8), VisualTokenPruningConfig(method="random"))
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("name", ["cls_attention", "random"])
def test_a_larger_ratio_keeps_a_superset(name):
    scores, valid = inputs(5, 9, 9, seed=4)
    smaller = torch.zeros_like(valid)
    for ratio in sorted(RATIOS):
        pruning = VisualTokenPruningConfig(method=name, retention_ratio=ratio)
        by_scores = name == "cls_attention"
        larger = select_cls_attention(scores, valid, pruning) if by_scores else select_random(range(5), valid, pruning)
        assert bool((larger | ~smaller).all())
        smaller = larger


def test_random_cells_are_drawn_evenly():
    generator = random.Random(0)
    times = torch.zeros(4, 4)
    for _ in range(500):
        pruning = VisualTokenPruningConfig(method="random", retention_ratio=0.25, seed=generator.randrange(2**32))
        times += select_random([generator.randrange(9)], full(1, 4), pruning)[0]
    assert 90 < float(times.min()) <= float(times.max()) < 160  # 125 expected, with a deviation of about 10


@pytest.mark.parametrize(
    ("view_indices", "message"),
    [
        ([0], "1 indices and `valid` 2 views"),
        ([0, 1, 2], "3 indices and `valid` 2 views"),
        ([0, -1], r"\[0, -1\].*from 0 to 131071"),
        ([0, 2**17], "131072.*from 0 to 131071"),
        ([0, 1.0], r"\[0, 1.0\]"),
        (torch.tensor([0, 1]), "Tensor"),
        (2, r"2 \(int\)"),
    ],
)
def test_view_indices_that_do_not_fit_are_refused(view_indices, message):
    with pytest.raises(ValueError, match=message):
        select_random(view_indices, full(2, 4), {"method": "random"})
