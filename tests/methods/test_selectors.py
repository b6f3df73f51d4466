"""What all selections of cells by tiles share: counts, independence of tiles, no waiting, and refusals. G-Prune has graphs."""

import math

import numpy as np
import pytest
import torch

from hivtp_hf import VisualTokenPruningConfig, select_hivtp
from hivtp_hf.methods.base import check_views, settings_of
from hivtp_hf.methods.cls_attention import select_cls_attention
from hivtp_hf.methods.dpp import select_dpp
from hivtp_hf.methods.hiprune import select_hiprune
from hivtp_hf.methods.id_selection import select_id_selection
from hivtp_hf.methods.mmr import select_mmr
from hivtp_hf.methods.mmtok import select_mmtok
from hivtp_hf.methods.random import select_random
from hivtp_hf.methods.scope import select_scope
from hivtp_hf.methods.spread import select_spread
from hivtp_hf.methods.uniform import select_uniform
from hivtp_hf.methods.visionzip import select_visionzip

pytestmark = pytest.mark.once


def as_features(*scores):
    """Features of two numbers, made of two kinds of scores."""
    return torch.stack([of.to(scores[-1].dtype) for of in scores], dim=-1)


def is_its_own(holders):
    """Which cells are kept, of the cells that hold each cell, (views, rows, columns)."""
    rows, columns = holders.shape[1:]
    return holders == torch.arange(rows * columns, device=holders.device).view(rows, columns)


# name: (settings beside a ratio, the call with two kinds of scores, valid cells, indices of the tiles and settings)
SELECTORS = {
    "hivtp": ({}, lambda first, second, valid, tiles, pruning: select_hivtp(first, valid, pruning)),
    "hiprune": (
        {"method": "hiprune", "alpha": 0.5},
        lambda first, second, valid, tiles, pruning: select_hiprune(first, second, valid, pruning),
    ),
    "hiprune, published borders": (
        {"method": "hiprune", "alpha": 0.5, "published_borders": True},
        lambda first, second, valid, tiles, pruning: select_hiprune(first, second, valid, pruning),
    ),
    "cls_attention": (
        {"method": "cls_attention"},
        lambda first, second, valid, tiles, pruning: select_cls_attention(first, valid, pruning),
    ),
    "visionzip": (
        {"method": "visionzip"},
        lambda first, second, valid, tiles, pruning: is_its_own(
            select_visionzip(first, as_features(first, second), valid, pruning)
        ),
    ),
    "scope": (
        {"method": "scope"},
        lambda first, second, valid, tiles, pruning: select_scope(as_features(first, second), first, valid, pruning),
    ),
    "dpp": (
        {"method": "dpp"},
        lambda first, second, valid, tiles, pruning: select_dpp(as_features(first, second), valid, pruning),
    ),
    "mmtok": (
        {"method": "mmtok"},
        lambda first, second, valid, tiles, pruning: select_mmtok(as_features(first, second), valid, pruning),
    ),
    "id_selection": (
        {"method": "id_selection"},
        lambda first, second, valid, tiles, pruning: select_id_selection(as_features(first, second), first, valid, pruning),
    ),
    "mmr": (
        {"method": "mmr"},
        lambda first, second, valid, tiles, pruning: select_mmr(as_features(first, second), first, valid, pruning),
    ),
    "spread": ({"method": "spread"}, lambda first, second, valid, tiles, pruning: select_spread(first, valid, pruning)),
    "random": ({"method": "random"}, lambda first, second, valid, tiles, pruning: select_random(tiles, valid, pruning)),
    "uniform": ({"method": "uniform"}, lambda first, second, valid, tiles, pruning: select_uniform(valid, pruning)),
}
RATIOS = [1, 0.9, 0.5, 1 / 3, 2 / 9, 0.1, 1 / 36, 1e-9]


def inputs(tiles=6, shape=(7, 7), seed=0):
    """Two kinds of scores with many ties, masks from empty to full, and indices that come more than once."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (2, tiles, *shape), generator=generator) / 9
    share = torch.rand(tiles, 1, 1, generator=generator)
    share[0], share[-1] = 1, 0
    valid = torch.rand(tiles, *shape, generator=generator) < share
    return *scores, valid, [tile % 3 for tile in range(tiles)]


def select(name, given, ratio):
    own, call = SELECTORS[name]
    return call(*given, VisualTokenPruningConfig(retention_ratio=ratio, **own))


def every_selector(function):
    return pytest.mark.parametrize("name", SELECTORS)(function)


@every_selector
def test_counts_are_exact_and_of_valid_cells(name):
    for shape in ((1, 1), (2, 2), (1, 9), (9, 1), (7, 5), (8, 40), (24, 24)):
        given = inputs(shape=shape, seed=shape[1])
        before = [tensor.clone() for tensor in given[:3]]
        valid = given[2]
        for ratio in RATIOS:
            kept = select(name, given, ratio)
            assert (kept.dtype, kept.shape) == (torch.bool, valid.shape)
            cells = valid.flatten(1).sum(1).tolist()
            assert kept.flatten(1).sum(1).tolist() == [min(n, math.floor(ratio * n + 0.5)) for n in cells]
            assert not bool((kept & ~valid).any())
        assert all(map(torch.equal, given[:3], before))  # arguments stay as they are


@every_selector
def test_shares_are_rounded_as_the_layout_rounds_them(name):
    # 0.285 * 100 + 0.5 is 28.999999999999996 in float64 and 29.0 in float32.
    given = (*torch.rand(2, 1, 10, 10), torch.ones(1, 10, 10, dtype=torch.bool), [0])
    assert int(select(name, given, 0.285).sum()) == 28


@every_selector
def test_a_batch_gives_what_its_tiles_give_alone(name):
    first, second, valid, tiles = given = inputs()
    for ratio in RATIOS:
        parts = [
            select(name, (first[tile, None], second[tile, None], valid[tile, None], [index]), ratio)
            for tile, index in enumerate(tiles)
        ]
        assert torch.equal(select(name, given, ratio), torch.cat(parts))
    assert select(name, (first[:0], second[:0], valid[:0], []), 0.5).shape == (0, 7, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_selector
def test_other_dtypes_are_compared_in_float32(name, dtype):
    *scores, valid, tiles = inputs()
    scores = [of.to(dtype) for of in scores]
    expected = select(name, (*(of.float() for of in scores), valid, tiles), 0.3)
    assert torch.equal(select(name, (*scores, valid, tiles), 0.3), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_selector
def test_scores_that_are_no_numbers_keep_the_count(name, value):
    scores, valid = torch.full((2, 1, 8, 8), value), torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, 5:] = False
    kept = select(name, (*scores, valid, [0]), 0.5)
    assert int(kept.sum()) == 20
    assert not kept[~valid].any()


@pytest.mark.parametrize("ratio", [1.0, 0.3, 1e-9])
@every_selector
def test_nothing_waits_for_the_device(name, ratio):
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    with torch.device("meta"):
        given = (*torch.rand(2, 3, 24, 24), torch.ones(3, 24, 24, dtype=torch.bool), [0, 1, 2])
    kept = select(name, given, ratio)
    assert (kept.shape, kept.device.type) == ((3, 24, 24), "meta")


@every_selector
def test_compiles_into_one_graph(name):
    own, call = SELECTORS[name]
    given, pruning = inputs(), VisualTokenPruningConfig(retention_ratio=0.3, **own)
    # The graph is what matters here, not the code generated from it: "aot_eager" needs no C++ compiler. Draws have breaks.
    compiled = torch.compile(call, fullgraph=name != "random", backend="aot_eager")
    assert torch.equal(compiled(*given, pruning), call(*given, pruning))


# What does not fit, by what checks it; that every selection asks is tested below.

FULL = torch.ones(2, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("valid", "scores", "message"),
    [
        (torch.ones(4, 4, dtype=torch.bool), torch.rand(4, 4), r"\(4, 4\).*\(views, rows, columns\)"),
        (torch.ones(1, 3, 0, dtype=torch.bool), torch.rand(1, 3, 0), "at least one cell"),
        (torch.ones(2, 4, 4), torch.rand(2, 4, 4), "`valid` is torch.float32; it must be bool"),
        (FULL, torch.rand(1, 4, 4), r"`scores` has shape \(1, 4, 4\) and `valid` \(2, 4, 4\)"),
        (FULL, torch.ones(2, 4, 4, dtype=torch.int64), "`scores` is torch.int64.*floating"),
        (FULL, np.ones((2, 4, 4)), r"`scores` is a ndarray; it must be a torch\.Tensor"),
        ([[[True]]], torch.rand(1, 1, 1), r"`valid` is a list; it must be a torch\.Tensor"),
    ],
)
def test_tiles_that_do_not_fit(valid, scores, message):
    with pytest.raises(ValueError, match=message):
        check_views(valid, scores=scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "`pruning` has the method 'hivtp'; select_uniform needs 'uniform'"),
        ({"method": "uniform", "token_budget": 9}, r"`token_budget` \(9\).*`retention_ratio`"),
        ({"method": "uniform", "retention_ratio": 2}, "`retention_ratio` is 2"),
        (0.5, "`pruning_config` is 0.5"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        settings_of("uniform", settings)


@every_selector
def test_every_selection_takes_a_dict_and_refuses_what_does_not_fit(name):
    own, call = SELECTORS[name]
    given = inputs()
    assert torch.equal(call(*given, {"retention_ratio": 0.3, **own}), select(name, given, 0.3))
    with pytest.raises(ValueError, match=r"has the method 'none'"):
        call(*given, {"method": "none"})
    first, second, valid, tiles = given
    with pytest.raises(ValueError, match=r"`valid` is torch\.float32"):
        select(name, (first, second, valid.float(), tiles), 0.3)
    if name in ("scope", "id_selection", "mmr", "visionzip"):
        with pytest.raises(ValueError, match=r"`saliency` is torch\.int64"):
            select(name, (first.long(), second, valid, tiles), 0.3)
    elif name not in ("random", "uniform", "dpp", "mmtok"):
        with pytest.raises(ValueError, match=r"`(object_)?scores` is torch\.int64"):
            select(name, (first.long(), second, valid, tiles), 0.3)
    if "hiprune" in name:
        with pytest.raises(ValueError, match=r"`deep_scores` is torch\.int64"):
            select(name, (first, second.long(), valid, tiles), 0.3)
