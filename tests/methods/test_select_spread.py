"""Spread: against a second one written plainly, in Python's own whole numbers; exact counts; an even walk."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivtp_hf import Evidence, VisualTokenPruningConfig
from hivtp_hf.methods.spread import distance_from_mean, hilbert_walk, select_spread
from hivtp_hf.pruning.evidence import CellFeatures, EncoderFacts, ViewEvidence
from hivtp_hf.pruning.registry import METHODS

pytestmark = pytest.mark.once

ONE = 2**24


def hilbert_place(side, x, y):
    """How many cells of a square of side 2 ** m the curve passes before (x, y)."""
    place, half = 0, side // 2
    while half:
        right, below = int(x & half > 0), int(y & half > 0)
        place += half * half * ((3 * right) ^ below)
        if not below:
            if right:
                x, y = side - 1 - x, side - 1 - y
            x, y = y, x
        half //= 2
    return place


def plain_walk(rows, columns):
    side = 1
    while side < max(rows, columns):
        side *= 2
    return sorted(range(rows * columns), key=lambda cell: hilbert_place(side, cell % columns, cell // columns))


def plain_chances(extra, k):
    """The chances of cells, whole numbers of which `ONE` is 1, from their extra ones, a list of whole numbers."""
    n = len(extra)
    if sum(extra) > k * ONE:
        return [one * k * ONE // sum(extra) for one in extra]
    ordered = sorted(extra, reverse=True)
    for certain in range(n):
        even = (k * ONE - certain * ONE - sum(ordered[certain:])) // (n - certain)
        if ordered[certain] + even <= ONE:
            return [min(ONE, one + even) for one in extra]
    return [ONE] * n


def plain_kept(extra, valid, k):
    """The cells that stay of one view, as raster indices; `extra` of all its cells, `valid` bool (rows, columns)."""
    cells = np.flatnonzero(valid).tolist()
    chances = dict(zip(cells, plain_chances([extra[cell] for cell in cells], k), strict=True))
    kept, passed = [], 0
    for cell in plain_walk(*valid.shape):
        if cell in chances:
            before, passed = passed, passed + chances[cell]
            if (passed + ONE // 2) // ONE > (before + ONE // 2) // ONE:
                kept.append(cell)
    return sorted(kept)


def plain_extra(scores, valid, pruning):
    """Extra chances in float32, as the description reads: a list of whole numbers, 0 for cells that are not valid."""
    values = scores[valid].astype(np.float32)
    mean = values.mean(dtype=np.float64).astype(np.float32) if len(values) else np.float32(0)
    if not np.isfinite(mean) or mean <= 1e-6:
        return [0] * scores.size
    with np.errstate(all="ignore"):
        excess = np.clip((scores.astype(np.float32) / mean - 1) / np.float32(pruning.contrast - 1), 0, 1)
    extra = np.rint(np.float32(pruning.focus) * excess * ONE)
    return np.where(valid, np.nan_to_num(extra), 0).astype(np.int64).ravel().tolist()


@st.composite
def views_and_settings(draw):
    rows, columns = draw(st.tuples(st.integers(1, 9), st.integers(1, 12)) | st.sampled_from([(1, 1), (8, 40), (24, 24)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    views, kind = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["whole", "powers of two", "equal", "zero", "one high", "none"])),
    )
    # Sums of these are exact, and so are means of a power of two of them; others may round one way or the other.
    scores = random.integers(0, 9, (views, rows, columns)).astype(np.float32)
    if kind == "powers of two":
        scores = 2.0 ** random.integers(-3, 6, scores.shape)
    elif kind == "equal":
        scores[:] = 0.37
    elif kind == "zero":
        scores[:] = 0
    elif kind == "one high":
        scores[:, 0, 0] = 1e6
    elif kind == "none":
        scores[:, 0, 0] = draw(st.sampled_from([np.nan, np.inf]))
    valid = random.random(scores.shape) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    pruning = VisualTokenPruningConfig(
        "spread",
        draw(st.sampled_from([1e-9, 1 / 36, 1 / 18, 1 / 9, 2 / 9, 0.5, 0.9, 1.0])),
        focus=draw(st.sampled_from([0.0, 0.3, 1.0])),
        contrast=draw(st.sampled_from([1.5, 2.0, 9.0])),
    )
    return scores.astype(np.float32), valid, pruning


def counted(valid, ratio):
    return min(int(valid.sum()), math.floor(ratio * int(valid.sum()) + 0.5))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(views_and_settings())
def test_equals_the_reference(case):
    scores, valid, pruning = case
    kept = select_spread(torch.from_numpy(scores), torch.from_numpy(valid), pruning).numpy()
    inclusion = METHODS["spread"].inclusion(evidence_of(scores, valid), pruning)
    assert not kept[~valid].any()
    for number, (of_view, usable) in enumerate(zip(scores, valid, strict=True)):
        k = counted(usable, pruning.retention_ratio)
        assert int(kept[number].sum()) == k
        # Chances are float32's own where they are not whole: from these on everything is exact.
        extra = plain_extra(of_view, usable, pruning)
        chances = plain_chances([extra[cell] for cell in np.flatnonzero(usable)], k) if usable.any() else []
        found = inclusion[number][torch.from_numpy(usable)]
        torch.testing.assert_close(found, torch.tensor(chances, dtype=torch.float64).float() / ONE, atol=2e-6, rtol=0)
        whole = (found.double() * ONE).long().tolist()
        if whole == chances:
            assert np.flatnonzero(kept[number]).tolist() == plain_kept(extra, usable, k)


def evidence_of(scores, valid, **features):
    received = {6: torch.from_numpy(scores)}
    return ViewEvidence(torch.from_numpy(valid), [], [], received, {}, EncoderFacts(9, 8), **features)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.floats(1e-9, 1),
    st.floats(0, 1),
    st.floats(1.001, 50),
)
def test_counts_are_exact_whatever_the_scores(seed, shape, ratio, focus, contrast):
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(random.lognormal(0, random.choice([0, 1, 8]), (2, *shape)).astype(np.float32))
    valid = torch.from_numpy(random.random((2, *shape)) < random.choice([0.3, 1]))
    pruning = VisualTokenPruningConfig("spread", ratio, focus=focus, contrast=contrast)
    kept = select_spread(scores, valid, pruning)
    assert kept.flatten(1).sum(1).tolist() == [counted(of_view, ratio) for of_view in valid]
    assert not (kept & ~valid).any()


def test_counts_are_exact_for_as_many_cells_as_there_may_be():
    """Where products no longer fit into 64 bits."""
    scores, valid = torch.zeros(1, 256, 512), torch.ones(1, 256, 512, dtype=torch.bool)
    scores[0, :128] = 2.0
    for ratio, focus in ((0.3, 1.0), (0.75, 0.3), (1.0, 0.3)):
        pruning = VisualTokenPruningConfig("spread", ratio, focus=focus)
        kept = select_spread(scores, valid, pruning)
        assert int(kept.sum()) == counted(valid, ratio)
        if focus == 1.0:  # extra chances use up the budget
            assert not kept[0, 128:].any()


def test_every_stretch_of_the_walk_keeps_what_its_chances_add_up_to():
    random = np.random.default_rng(0)
    scores, valid = random.random((1, 24, 24)).astype(np.float32) ** 4, np.ones((1, 24, 24), dtype=bool)
    pruning = VisualTokenPruningConfig("spread", 2 / 9)
    kept = select_spread(torch.from_numpy(scores), torch.from_numpy(valid), pruning)
    walk = hilbert_walk(24, 24)
    chances = METHODS["spread"].inclusion(evidence_of(scores, valid), pruning).flatten()[walk].double()
    behind = kept.flatten()[walk].double().cumsum(0) - chances.cumsum(0)
    assert behind.abs().max() <= 0.5 + 1e-5  # of every beginning, and so of every stretch within 1
    assert float(chances.sum()) == pytest.approx(128, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 8), (5, 9), (9, 5), (1, 7), (24, 24), (13, 40)])
def test_the_walk(shape):
    walk = hilbert_walk(*shape).tolist()
    assert walk == plain_walk(*shape)
    assert sorted(walk) == list(range(math.prod(shape)))


@pytest.mark.parametrize("side", [2, 4, 16, 32])
def test_the_walk_goes_from_cell_to_neighbour(side):
    walk = hilbert_walk(side, side)
    steps = (walk // side).diff().abs() + (walk % side).diff().abs()
    assert set(steps.tolist()) == {1}


def test_what_stands_out_has_an_extra_chance():
    scores, valid = torch.zeros(1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    scores[0, 4:12, 4:12] = 1.0  # 64 of 256 cells, at four times the mean
    kept = select_spread(scores, valid, VisualTokenPruningConfig("spread", 0.25))
    inside = int(kept[0, 4:12, 4:12].sum())
    # (64 - 0.3 * 64) / 256 for all, and 0.3 more inside.
    assert abs(inside - 64 * (0.175 + 0.3)) <= 4
    even = select_spread(scores, valid, VisualTokenPruningConfig("spread", 0.25, focus=0.0))
    assert abs(int(even[0, 4:12, 4:12].sum()) - 16) <= 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from(["random", "zeros", "nothing", "no numbers"]))
def test_distances_from_the_mean_feature(seed, cells, kind):
    random = np.random.default_rng(seed)
    features = random.standard_normal((2, cells, 6)).astype(np.float32)
    valid = random.random((2, cells)) < 0.7
    if kind == "zeros":
        features[:, ::2] = 0
    elif kind == "nothing":
        features[:] = 0
    elif kind == "no numbers":
        features[:, ::3] = np.nan
    found = distance_from_mean(torch.from_numpy(features), torch.from_numpy(valid)).numpy()
    for of_view, usable, values in zip(features.astype(np.float64), valid, found, strict=True):
        length = np.nan_to_num(np.sqrt((of_view**2).sum(1, keepdims=True)))
        directions = np.where(length > 0, of_view / np.where(length > 0, length, 1), 0)
        mean = directions[usable].sum(0)
        mean = mean / max(np.sqrt((mean**2).sum()), 1e-300)
        np.testing.assert_allclose(values[usable], np.maximum(0, 1 - directions[usable] @ mean), atol=1e-5)


def test_features_as_scores():
    """No attention is read; images are scored a few views at a time."""
    pruning = VisualTokenPruningConfig("spread", 0.25, score="features")
    method = METHODS["spread"]
    assert method.reads(pruning) == (frozenset({Evidence.FEATURES}),)
    assert method.layers(pruning, EncoderFacts(24, 22)) == ()
    generator = torch.Generator().manual_seed(0)
    features, valid = torch.randn(3, 64, 5, generator=generator), torch.ones(3, 8, 8, dtype=torch.bool)
    cells = CellFeatures([(of_view, None) for of_view in features], torch.device("cpu"))
    evidence = ViewEvidence(valid, [16] * 3, range(3), {}, {}, EncoderFacts(24, 22), features=cells)
    scores = distance_from_mean(features, valid.flatten(1)).view_as(valid)
    assert torch.equal(method.select(evidence, pruning), select_spread(scores, valid, pruning))


def test_layers_in_two_ways_are_refused():
    with pytest.raises(
        ValueError, match=r"`importance_layers` is .* and `importance_num_layers` 2; give the layers themselves"
    ):
        VisualTokenPruningConfig("spread", importance_layers=[1, 2], importance_num_layers=2)
