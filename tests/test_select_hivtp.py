"""The selector: against the released code's results, and against the reference written from the description."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hivtp_hf.pruning.registry.hivtp import count_hivtp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hivtp_reference
from hivtp_hf import VisualTokenPruningConfig, select_hivtp

pytestmark = pytest.mark.once

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def released():
    with np.load(DATA / "hivtp.npz") as arrays:
        return torch.from_numpy(arrays["scores"]), torch.from_numpy(arrays["kept"])


def test_published_selection_is_reproduced(released):
    scores, kept = released
    selected = select_hivtp(scores, torch.ones_like(kept), VisualTokenPruningConfig(exact_count=False))
    assert torch.equal(selected, kept)
    assert kept.flatten(1).sum(1).unique().numel() > 1  # the released code's count does depend on content


def test_exact_selection_contains_the_published_one(released):
    scores, kept = released
    selected = select_hivtp(scores, torch.ones_like(kept), VisualTokenPruningConfig())
    assert bool((selected | ~kept).all())
    assert selected.flatten(1).sum(1).tolist() == [288] * 24


def test_half_the_tokens_is_the_published_setting(released):
    scores, kept = released
    valid = torch.ones_like(kept)
    half = select_hivtp(scores, valid, VisualTokenPruningConfig(retention_ratio=0.5))
    assert torch.equal(half, select_hivtp(scores, valid, VisualTokenPruningConfig()))


@pytest.mark.parametrize(("ratio", "cells"), [(1.0, 576), (2 / 9, 128), (1 / 9, 64), (1 / 18, 32), (1e-9, 0)])
def test_ratio_of_a_full_tile(released, ratio, cells):
    scores, kept = released
    selected = select_hivtp(scores, torch.ones_like(kept), VisualTokenPruningConfig(retention_ratio=ratio))
    assert selected.flatten(1).sum(1).unique().tolist() == [cells]


def test_floors_are_those_of_float64():
    # 0.57 * 100 is 56.99999999999999 in float64 and 57.0 in float32.
    pruning = VisualTokenPruningConfig(global_ratio=0.57, regions=1, local_window=10, exact_count=False)
    selected = select_hivtp(torch.rand(1, 10, 10), torch.ones(1, 10, 10, dtype=torch.bool), pruning)
    assert int(selected.sum()) == 56 + 1


@st.composite
def tiles_and_settings(draw):
    grid = draw(st.integers(2, 9))
    num_tiles = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 10**6]))  # few levels: many ties
    scores = random.integers(0, levels, (num_tiles, grid, grid)).astype(np.float32) / levels
    valid = random.random((num_tiles, grid, grid)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    pruning = VisualTokenPruningConfig(
        retention_ratio=draw(st.none() | st.floats(0, 1, exclude_min=True)),
        global_ratio=draw(st.floats(0, 1)),
        local_window=draw(st.integers(1, 12)),
        regions=draw(st.integers(1, 12)),
        exact_count=draw(st.booleans()),
    )
    return scores, valid, pruning


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tiles_and_settings())
def test_equals_the_reference(case):
    scores, valid, pruning = case
    selected = select_hivtp(torch.from_numpy(scores), torch.from_numpy(valid), pruning).numpy()
    expected = [hivtp_reference.select_tile(s, v, pruning) for s, v in zip(scores, valid, strict=True)]
    assert np.array_equal(selected, np.stack(expected))
    totals = count_hivtp(torch.from_numpy(valid), pruning).tolist()
    assert totals == [hivtp_reference.counts(v, pruning)[2] for v in valid]
    if pruning.exact_count:
        assert selected.sum((1, 2)).tolist() == totals


@pytest.mark.parametrize("pruning", [VisualTokenPruningConfig(), VisualTokenPruningConfig(retention_ratio=0.2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype, pruning):
    scores = torch.rand(3, 24, 24).to(dtype)
    valid = torch.rand(3, 24, 24) < 0.9
    assert torch.equal(select_hivtp(scores, valid, pruning), select_hivtp(scores.float(), valid, pruning))


def test_equal_scores_keep_the_first_cells():
    pruning = VisualTokenPruningConfig(global_ratio=0.5, regions=1, local_window=4, exact_count=False)
    selected = select_hivtp(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), pruning)
    assert selected.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_scores_that_are_no_numbers_keep_the_count():
    scores = torch.full((2, 8, 8), float("nan"))
    scores[1] = float("inf")
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[:, 5:] = False
    selected = select_hivtp(scores, valid, VisualTokenPruningConfig())
    assert selected.flatten(1).sum(1).tolist() == count_hivtp(valid, VisualTokenPruningConfig()).tolist()
    assert not selected[~valid].any()


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_compiles_into_one_graph(ratio):
    pruning = VisualTokenPruningConfig(retention_ratio=ratio)
    scores, valid = torch.rand(3, 8, 8), torch.rand(3, 8, 8) < 0.8
    # The graph is what matters here, not the code generated from it: "aot_eager" needs no C++ compiler.
    compiled = torch.compile(select_hivtp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, valid, pruning), select_hivtp(scores, valid, pruning))


@pytest.mark.parametrize("ratio", [None, 0.3, 1.0])
def test_exact_counts_never_wait_for_the_device(ratio):
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    scores = torch.rand(3, 24, 24, device="meta")
    valid = torch.ones(3, 24, 24, dtype=torch.bool, device="meta")
    assert select_hivtp(scores, valid, VisualTokenPruningConfig(retention_ratio=ratio)).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("scores", "valid", "message"),
    [
        (torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), "square"),
        (torch.rand(2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), "shape"),
        (torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool), "shape"),
        (torch.rand(1, 4, 4), torch.ones(1, 4, 4), "bool"),
        (torch.ones(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4, dtype=torch.bool), "floating"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(scores, valid, message):
    with pytest.raises(ValueError, match=message):
        select_hivtp(scores, valid, VisualTokenPruningConfig())
