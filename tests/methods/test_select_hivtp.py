"""The selector: against the released code's results, and against the reference written from the description."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hivtp_reference
from hivtp_hf import VisualTokenPruningConfig, select_hivtp
from hivtp_hf.methods.hivtp import count_hivtp

pytestmark = pytest.mark.once

DATA = Path(__file__).parents[1] / "data"


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


def test_floors_are_those_of_float64():
    # 0.57 * 100 is 56.99999999999999 in float64 and 57.0 in float32.
    pruning = VisualTokenPruningConfig(global_ratio=0.57, regions=1, local_window=10, exact_count=False)
    selected = select_hivtp(torch.rand(1, 10, 10), torch.ones(1, 10, 10, dtype=torch.bool), pruning)
    assert int(selected.sum()) == 56 + 1


@st.composite
def views_and_settings(draw):
    rows, columns = draw(st.tuples(st.integers(1, 8), st.integers(1, 12)) | st.sampled_from([(1, 1), (8, 40), (40, 8), (9, 9)]))
    num_views = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 10**6]))  # few levels: many ties
    scores = random.integers(0, levels, (num_views, rows, columns)).astype(np.float32) / levels
    valid = random.random((num_views, rows, columns)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    pruning = VisualTokenPruningConfig(
        retention_ratio=draw(st.none() | st.floats(0, 1, exclude_min=True)),
        global_ratio=draw(st.floats(0, 1)),
        local_window=draw(st.integers(1, 12)),
        regions=draw(st.integers(1, 12)),
        exact_count=draw(st.booleans()),
    )
    return scores, valid, pruning


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(views_and_settings())
def test_equals_the_reference(case):
    scores, valid, pruning = case
    selected = select_hivtp(torch.from_numpy(scores), torch.from_numpy(valid), pruning).numpy()
    expected = [hivtp_reference.select_view(s, v, pruning) for s, v in zip(scores, valid, strict=True)]
    assert np.array_equal(selected, np.stack(expected))
    totals = count_hivtp(torch.from_numpy(valid), pruning).tolist()
    assert totals == [hivtp_reference.counts(v, pruning)[2] for v in valid]
    if pruning.exact_count:
        assert selected.sum((1, 2)).tolist() == totals


def test_equal_scores_keep_the_first_cells():
    pruning = VisualTokenPruningConfig(global_ratio=0.5, regions=1, local_window=4, exact_count=False)
    selected = select_hivtp(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), pruning)
    assert selected.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
