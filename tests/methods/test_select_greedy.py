"""The selections that pick cells one by one: each pick against plain formulas in NumPy, from the picks before it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.methods import folded_matrix, greedy
from hivtp_hf.methods.divprune import select_divprune
from hivtp_hf.methods.dpp import select_dpp
from hivtp_hf.methods.folded_matrix import FoldedMatrix
from hivtp_hf.methods.greedy import (
    NEVER_PICKED,
    Picks,
    bands_of_rows,
    coverage_order,
    determinant_order,
    max_min_order,
    relevance_order,
    similarities,
    suppression_order,
    unit_vectors,
)
from hivtp_hf.methods.id_selection import select_id_selection
from hivtp_hf.methods.mmr import select_mmr
from hivtp_hf.methods.mmtok import select_mmtok
from hivtp_hf.methods.ranking import rounded_share
from hivtp_hf.methods.scope import select_scope
from hivtp_hf.pruning.evidence import CellFeatures, EncoderFacts, ViewEvidence, VisualEvidence
from hivtp_hf.pruning.layout import StitchedViews, TokenLayout
from hivtp_hf.pruning.registry import METHODS
from layouts import FIRST_TOKENS

pytestmark = pytest.mark.once

OF_VIEWS = ("scope", "dpp", "mmtok", "id_selection", "mmr")
LAYER = 3
ENCODER = EncoderFacts(5, LAYER)
TOLERANCE = 2e-5


def evidence_of(features, saliency, valid, totals):
    """What methods of views are given: features (views, rows, columns, hidden), the rest (views, rows, columns)."""
    cells = CellFeatures([(of_view, None) for of_view in features.flatten(1, 2)], torch.device("cpu"))
    return ViewEvidence(valid, totals, range(len(valid)), {}, {LAYER: saliency}, ENCODER, features=cells)


def picks_in_order(name, features, saliency, valid, pruning):
    """Of every view the cells in the order in which a method picks them, as raster indices."""
    totals = [rounded_share(int(of_view.sum()), pruning.retention_ratio) for of_view in valid]
    order = METHODS[name].order(evidence_of(features, saliency, valid, totals), pruning).flatten(1)
    picks = []
    for of_view, total in zip(order.tolist(), totals, strict=True):
        picked = sorted((step, cell) for cell, step in enumerate(of_view) if step != NEVER_PICKED)
        assert [step for step, _ in picked] == list(range(total))
        picks.append([cell for _, cell in picked])
    return picks


# What every cell scores, given what was picked before: from scratch, in float64, as the papers' formulas read.


def cosines(features, valid):
    """float64 (n, n) of features (n, hidden); nothing resembles what is zero, not finite or not valid."""
    features = features.astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.sqrt((features**2).sum(1, keepdims=True))
        usable = np.isfinite(length) & (length > 0) & valid[:, None]
        directions = np.where(usable, features / length, 0)
    return directions @ directions.T


def span_zero_to_one(saliency, valid):
    values = np.where(np.isfinite(saliency), saliency, 0).astype(np.float64)
    low, high = values[valid].min(), values[valid].max()
    return np.where(valid, (values - low) / (high - low) if high > low else 1.0, 0.0)


def scores_of_scope(similarity, saliency, valid, before, pruning):
    covered = similarity[before].max(0).clip(0) if before else np.zeros(len(similarity))
    weights = np.where(np.isfinite(saliency), saliency, 0).clip(0).astype(np.float64) ** pruning.saliency_power
    return np.maximum(similarity - covered, 0).sum(1) * weights


def scores_of_mmtok(similarity, saliency, valid, before, pruning):
    shares = np.exp(similarity / pruning.similarity_temperature) * valid * valid[:, None]
    shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-300) / valid.sum()  # rows: what is represented
    covered = shares[:, before].max(1) if before else np.zeros(len(shares))
    return np.maximum(shares - covered[:, None], 0).sum(0)


def scores_of_dpp(similarity, saliency, valid, before, pruning):
    left = similarity.diagonal().copy()
    if before:
        of_cells = similarity[before]
        left -= (of_cells * np.linalg.solve(similarity[np.ix_(before, before)], of_cells)).sum(0)
    return left


def scores_of_id_selection(similarity, saliency, valid, before, pruning):
    scores = span_zero_to_one(saliency, valid)
    for pick in before:
        scores = np.maximum(scores - np.exp(-pruning.sharpness * (1 - similarity[pick]) ** 2) * scores[pick], 0)
    return scores


def scores_of_mmr(similarity, saliency, valid, before, pruning):
    nearest = similarity[before].max(0) if before else np.zeros(len(similarity))
    return pruning.relevance * span_zero_to_one(saliency, valid) - (1 - pruning.relevance) * nearest


def scores_of_divprune(similarity, saliency, valid, before, pruning):
    distance = 1 - similarity
    if before:
        return distance[before].min(0)
    return np.where(np.eye(len(distance), dtype=bool), np.inf, distance).min(1)


REFERENCES = {
    "scope": scores_of_scope,
    "mmtok": scores_of_mmtok,
    "dpp": scores_of_dpp,
    "id_selection": scores_of_id_selection,
    "mmr": scores_of_mmr,
    "divprune": scores_of_divprune,
}


def hold_picks_against_formulas(name, picks, features, saliency, valid, pruning):
    """Every pick has the highest score, but for rounding; of cells that are alike in all the first is picked."""
    similarity, free = cosines(features, valid), valid.copy()
    same = [(np.nan_to_num(features[cell]).tobytes(), float(np.nan_to_num(saliency[cell]))) for cell in range(len(valid))]
    for step, pick in enumerate(picks):
        scores = REFERENCES[name](similarity, saliency, valid, picks[:step], pruning)
        assert free[pick]
        if name == "dpp" and scores[free].max() < 1e-4:
            hold_fill_against_formula(picks, step, free)
            return
        best = scores[free].max()
        assert scores[pick] == best or scores[pick] >= best - TOLERANCE * max(1, abs(best)), (step, pick)
        assert not any(free[cell] and same[cell] == same[pick] for cell in range(pick)), (step, pick)
        free[pick] = False


def hold_fill_against_formula(picks, step, free):
    """Behind the features' rank cells are taken at even distances in raster order."""
    left, missing = np.flatnonzero(free).tolist(), len(picks) - step
    n = len(left)
    assert picks[step:] == [cell for i, cell in enumerate(left) if (i + 1) * missing // n > i * missing // n]


KINDS = ("random", "few numbers", "signs", "one", "zeros among them", "no numbers among them", "low rank", "alike")


@st.composite
def views_of_features(draw):
    """Features (views, rows, columns, hidden), saliency and valid cells, and a ratio."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    views, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    hidden, kind = draw(st.sampled_from([1, 3, 16, 48])), draw(st.sampled_from(KINDS))
    shape = (views, rows * columns, hidden)
    features = random.standard_normal(shape)
    if kind == "few numbers":
        features = random.integers(-1, 2, shape)
    elif kind == "signs":
        features = random.choice([-1, 1], shape)
    elif kind == "one":
        features = np.broadcast_to(features[:, :1], shape)
    elif kind == "zeros among them":
        features = features * (random.random(shape[:2]) < 0.7)[..., None]
    elif kind == "no numbers among them":
        features[random.random(shape[:2]) < 0.3] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    elif kind == "low rank":
        features = random.standard_normal((views, rows * columns, 2)) @ random.standard_normal((views, 2, hidden))
    elif kind == "alike":
        features = features[:, random.integers(0, max(1, rows * columns // 3), rows * columns)]
    saliency = random.random(shape[:2]) if draw(st.booleans()) else random.integers(0, 4, shape[:2]) / 4
    if draw(st.integers(0, 4)) == 0:
        saliency[random.random(shape[:2]) < 0.2] = np.nan
    valid = random.random(shape[:2]) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    ratio = draw(st.sampled_from([1e-9, 1 / 18, 2 / 9, 0.5, 0.9, 1.0]))
    return features.astype(np.float32), saliency.astype(np.float32), valid, (rows, columns), ratio


@pytest.mark.parametrize("name", OF_VIEWS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(views_of_features())
def test_every_pick_of_a_view_is_the_best(name, case):
    features, saliency, valid, grid, ratio = case
    pruning = VisualTokenPruningConfig(name, ratio)
    views = [torch.from_numpy(given).unflatten(1, grid) for given in (features, saliency, valid)]
    picks = picks_in_order(name, *views, pruning)
    for of_view in zip(picks, features, saliency, valid, strict=True):
        hold_picks_against_formulas(name, *of_view, pruning)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(views_of_features())
def test_every_pick_of_divprune_is_the_best(case):
    features, _, _, (rows, columns), ratio = case
    pruning = VisualTokenPruningConfig("divprune", ratio)
    layout = TokenLayout(None, pruning, [StitchedViews(rows, columns)])
    evidence = VisualEvidence([layout] * len(features), list(map(torch.from_numpy, features)), {}, {}, ENCODER)
    importance = METHODS["divprune"].importance(evidence, pruning).view(len(features), -1)
    total = rounded_share(rows * columns, ratio)
    for of_image, feature in zip(importance, features, strict=True):
        picks = torch.sort(of_image, descending=True, stable=True).indices[:total].tolist()
        assert of_image[picks].tolist() == [-step for step in range(total)]
        everything = np.ones(rows * columns, dtype=bool)
        hold_picks_against_formulas("divprune", picks, feature, np.zeros(rows * columns), everything, pruning)


# The loops themselves, on numbers whose sums and differences are exact: the same picks, ties included.


def exact_matrices(seed, groups=3, cells=24):
    random = np.random.default_rng(seed)
    matrix = random.integers(-8, 9, (groups, cells, cells)) / 8
    matrix = np.maximum(matrix, matrix.transpose(0, 2, 1))
    if seed % 3 == 0:  # cells that are alike
        twin = random.integers(0, cells, cells)
        matrix = matrix[:, twin][:, :, twin]
    weights = random.integers(0, 5, (groups, cells)) / 4
    valid = random.random((groups, cells)) < (0.7 if seed % 2 else 1)
    number = (valid.sum(1) * random.choice([0, 0.3, 0.6, 1])).astype(np.int64)
    return matrix.astype(np.float32), weights.astype(np.float32), valid, number


def plain_picks(number, valid, scores_of, similarity, saliency=None, pruning=None):
    """The picks of a loop by `scores_of`, a formula as above; the first of the best that are free."""
    picks = []
    for _ in range(number):
        scores = np.where(valid, scores_of(similarity, saliency, valid, picks, pruning), -np.inf)
        scores[picks] = -np.inf
        picks.append(int(scores.argmax()))
    return picks


def order_of(picks, cells):
    order = np.full(cells, NEVER_PICKED)
    order[picks] = np.arange(len(picks))
    return order.tolist()


def picks_for(number):
    return Picks(torch.from_numpy(number), int(number.max()))


@pytest.mark.parametrize("seed", range(24))
def test_coverage_of_exact_numbers(seed, monkeypatch):
    matrix, weights, valid, number = exact_matrices(seed)
    gains = matrix.clip(0) * valid[:, None] * valid[..., None]
    expected = [
        order_of(plain_picks(many, usable, scores_of_scope, gain, weight, ONE), len(usable))
        for gain, weight, usable, many in zip(gains, weights, valid, number, strict=True)
    ]
    given_ = [torch.from_numpy(of) for of in (gains, weights, valid)]
    assert coverage_order(*given_, picks_for(number)).tolist() == expected
    monkeypatch.setattr(greedy, "_GAINS_AT_ONCE", 2)  # so that many are left out
    assert coverage_order(*given_, picks_for(number)).tolist() == expected
    # The loop that looks at every cell at every step, as it runs on other devices.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert coverage_order(*given_, picks_for(number)).tolist() == expected


ONE = VisualTokenPruningConfig("scope", 0.5)


@pytest.mark.parametrize("kind", ["any", "mixtures", "low rank"])
def test_leaving_out_what_cannot_win_changes_no_pick(kind, monkeypatch):
    """On features as they are, whose gains are rounded: the loop of a CPU against the one that looks at every cell."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2 * 150, 12, generator=generator).softmax(-1) @ torch.randn(12, 40, generator=generator)
    features = {
        "any": torch.randn(2 * 150, 40, generator=generator),
        "mixtures": mixed + 0.1 * torch.randn(2 * 150, 40, generator=generator),
        "low rank": torch.randn(2 * 150, 2, generator=generator) @ torch.randn(2, 40, generator=generator),
    }[kind].view(2, 150, 40)
    everything, weights = torch.ones(2, 150, dtype=torch.bool), torch.rand(2, 150, generator=generator)
    similarity = similarities(unit_vectors(features, everything))
    picks = Picks(torch.tensor([150, 70]), 150)
    found = coverage_order(similarity, weights, everything, picks)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(coverage_order(similarity, weights, everything, picks), found)


@pytest.mark.parametrize("seed", range(24))
def test_max_min_of_exact_numbers(seed):
    matrix, _, valid, number = exact_matrices(seed)
    expected = []
    for similarity, usable, many in zip(matrix, valid, number, strict=True):
        # What is not valid is as far as can be from everything.
        among_valid = np.where(usable & usable[:, None], similarity, -np.inf)
        picks = plain_picks(many, usable, scores_of_divprune, among_valid)
        expected.append(order_of(picks, len(usable)))
    found = max_min_order(1 - torch.from_numpy(matrix), torch.from_numpy(valid), picks_for(number))
    assert found.tolist() == expected


def balances(similarity, weight, valid, before, pruning):
    return weight / 2 - (similarity[before].max(0) if before else 0 * weight) / 2


@pytest.mark.parametrize("seed", range(12))
def test_balances_of_exact_numbers(seed):
    matrix, weights, valid, number = exact_matrices(seed)
    expected = []
    for similarity, weight, usable, many in zip(matrix, weights, valid, number, strict=True):
        picks = plain_picks(many, usable, balances, similarity, weight)
        expected.append(order_of(picks, len(usable)))
    tensors = [torch.from_numpy(of) for of in (matrix, weights, valid)]
    assert relevance_order(*tensors, picks_for(number), 0.5).tolist() == expected


def test_determinant_of_exact_numbers():
    # Two cells for each of four directions, and one that is none.
    similarity = torch.eye(4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    similarity = torch.nn.functional.pad(similarity, (1, 0, 1, 0))[None]
    everything = torch.ones(1, 9, dtype=torch.bool)
    order = determinant_order(similarity, everything, Picks(torch.tensor([4]), 4))
    assert order[0].tolist() == [NEVER_PICKED, 0, NEVER_PICKED, 1, NEVER_PICKED, 2, NEVER_PICKED, 3, NEVER_PICKED]
    # Beyond the rank: 2 of the 5 cells 0, 2, 4, 6, 8 that are left, at even distances.
    order = determinant_order(similarity, everything, Picks(torch.tensor([6]), 6))
    assert order[0].tolist() == [NEVER_PICKED, 0, NEVER_PICKED, 1, 4, 2, NEVER_PICKED, 3, 5]


def test_suppression_by_hand():
    similarity = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    scores = torch.tensor([[1.0, 0.75, 0.5]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    # The second is the first's twin, and loses all that it had.
    assert suppression_order(similarity, scores, everything, Picks(torch.tensor([3]), 3), 20.0).tolist() == [[0, 2, 1]]
    # Nothing is left of either of the others, so the earlier one comes first.
    scores = torch.tensor([[1.0, 0.25, 0.5]])
    alike = torch.ones(1, 3, 3)
    assert suppression_order(alike, scores, everything, Picks(torch.tensor([3]), 3), 20.0).tolist() == [[0, 1, 2]]


# Counts, batches, ratios and shapes.


def test_similarities_are_symmetric_and_those_of_a_product():
    features = torch.randn(2, 700, 9, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(2, 700, dtype=torch.bool)
    directions = unit_vectors(features, everything)
    found = similarities(directions)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, directions @ directions.mT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [*OF_VIEWS, "divprune"])
def test_float16_overflows_nothing(name):
    features = 6e4 * torch.ones(1, 4, 4, 64, dtype=torch.float16)
    features[0, 1, 1, :32] *= -1
    kept = SELECT[name](features, torch.rand(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), 2 / 16)
    assert kept.flatten().nonzero().flatten().tolist()[1] == 5 if name in ("dpp", "divprune") else kept.sum() == 2


def of_divprune(features, saliency, valid, ratio):
    """DivPrune of images that are one view each; all cells of it are valid."""
    pruning = VisualTokenPruningConfig("divprune", ratio)
    layout = TokenLayout(None, pruning, [StitchedViews(*valid.shape[1:])])
    return select_divprune(list(features.flatten(1, 2)), [layout] * len(valid), pruning).view_as(valid)


def of_scores(select, name):
    return lambda features, saliency, valid, ratio: select(features, saliency, valid, VisualTokenPruningConfig(name, ratio))


def of_features(select, name):
    return lambda features, saliency, valid, ratio: select(features, valid, VisualTokenPruningConfig(name, ratio))


SELECT = {
    "scope": of_scores(select_scope, "scope"),
    "dpp": of_features(select_dpp, "dpp"),
    "mmtok": of_features(select_mmtok, "mmtok"),
    "id_selection": of_scores(select_id_selection, "id_selection"),
    "mmr": of_scores(select_mmr, "mmr"),
    "divprune": of_divprune,
}


def full_views(shape=(3, 6, 8), hidden=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, hidden, generator=generator)
    return features, torch.rand(shape, generator=generator), torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("name", SELECT)
def test_a_larger_ratio_keeps_a_superset_below_the_rank(name):
    given_ = full_views(hidden=60)
    smaller = torch.zeros_like(given_[2])
    for ratio in (1e-9, 0.1, 0.3, 0.7, 1):
        larger = SELECT[name](*given_, ratio)
        assert bool((larger | ~smaller).all())
        smaller = larger


@pytest.mark.parametrize("name", SELECT)
def test_little_memory_changes_nothing(name, monkeypatch):
    given_ = full_views()
    expected = SELECT[name](*given_, 0.4)
    monkeypatch.setattr(greedy, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(greedy, "_ROWS_AT_ONCE", 1000)
    assert torch.equal(SELECT[name](*given_, 0.4), expected)


@pytest.mark.parametrize("name", SELECT)
def test_large_groups_are_chosen_in_bands_of_rows(name, monkeypatch):
    """A band keeps what a view of its rows keeps, with its share of the number."""
    features, saliency, valid = full_views((2, 7, 4))
    monkeypatch.setattr(greedy, "bands_of_rows", lambda rows: bands_of_rows(rows, 12))
    kept = SELECT[name](features, saliency, valid, 0.5)
    # 28 cells in bands of 2, 3 and 2 rows; 14 of them by 8, 12 and 8 cells are 4, 6 and 4.
    parts = [SELECT[name](features[:, rows], saliency[:, rows], valid[:, rows], 0.5) for rows in BANDS]
    if name in ("id_selection", "mmr"):  # whose importance spans 0 to 1 over the whole view
        assert [int(kept[:, rows].sum()) for rows in BANDS] == [8, 12, 8]
    else:
        assert torch.equal(kept, torch.cat(parts, dim=1))


BANDS = (slice(0, 2), slice(2, 5), slice(5, 7))


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        ([4] * 7, 100, [28]),
        ([4] * 7, 12, [8, 12, 8]),
        ([4] * 7, 4, [4] * 7),
        ([4] * 7, 3, [2, 3, 3, 3, 3, 2, 3, 3, 3, 3]),  # rows that are longer are cut
        ([9, 1, 1], 9, [9, 2]),
        ([10, 10], 8, [6, 7, 7]),
        ([5], 5, [5]),
    ],
)
def test_bands(rows, most, expected):
    bands = bands_of_rows(rows, most)
    assert [band.stop - band.start for band in bands] == expected
    assert (bands[0].start, bands[-1].stop) == (0, sum(rows))
    assert all(band.stop == after.start for band, after in itertools.pairwise(bands))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_bands_are_never_too_large(rows, most):
    sizes = [band.stop - band.start for band in bands_of_rows(rows, most)]
    assert sum(sizes) == sum(rows)
    assert max(sizes) <= most


@pytest.mark.parametrize("name", OF_VIEWS)
def test_bands_share_the_number_by_largest_remainder(name, monkeypatch):
    features, saliency, valid = full_views((1, 6, 5))
    valid[0, :2, 1:] = False  # 2, 10 and 10 cells of the bands
    monkeypatch.setattr(greedy, "bands_of_rows", lambda rows: bands_of_rows(rows, 10))
    kept = SELECT[name](features, saliency, valid, 7 / 22)
    # 0.64, 3.18 and 3.18 of 7.
    assert [int(kept[:, rows].sum()) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))] == [1, 3, 3]


@pytest.mark.parametrize("extra", FIRST_TOKENS)
def test_divprune_leaves_newlines_and_class_tokens_alone(extra):
    pruning = VisualTokenPruningConfig("divprune", 0.4)
    single = TokenLayout.single_tile(4, pruning, **FIRST_TOKENS[extra])
    crops = TokenLayout.from_image_size(60, 110, pruning, tile_size=56, patch_size=14, pinpoints=((56, 112), (112, 112)))
    generator = torch.Generator().manual_seed(0)
    layouts = [single, crops, single]
    features = [torch.randn(layout.num_stock, 12, generator=generator) for layout in layouts]
    kept = select_divprune(features, layouts, pruning).split([layout.num_cells for layout in layouts])
    for of_image, packed, layout in zip(kept, features, layouts, strict=True):
        cells = packed[layout.cell_positions].numpy()
        picks = np.flatnonzero(of_image[layout.cell_numbers(layout.cell_positions)].numpy())
        assert layout.group_totals == (len(picks),) == (rounded_share(len(cells), 0.4),)
        assert not of_image[~layout.valid].any()
        similarity = cosines(cells, np.ones(len(cells), dtype=bool))
        expected = plain_picks(len(picks), np.ones(len(cells), dtype=bool), scores_of_divprune, similarity)
        assert picks.tolist() == sorted(expected)


# Settings and evidence.


def test_settings_turn_halves_off():
    features, saliency, valid = full_views()
    by_saliency = METHODS["cls_attention"].select(
        evidence_of(features, saliency, valid, [24] * 3), VisualTokenPruningConfig("cls_attention", 0.5, layer=LAYER)
    )
    alone = {"mmr": {"relevance": 1.0}, "id_selection": {"sharpness": 1e6}}
    for name, own in alone.items():
        pruning = VisualTokenPruningConfig(name, 0.5, **own)
        select = {"mmr": select_mmr, "id_selection": select_id_selection}[name]
        assert torch.equal(select(features, saliency, valid, pruning), by_saliency)
    no_saliency = VisualTokenPruningConfig("scope", 0.5, saliency_power=0.0)
    ones = select_scope(features, torch.ones_like(saliency), valid, VisualTokenPruningConfig("scope", 0.5))
    assert torch.equal(select_scope(features, saliency, valid, no_saliency), ones)


def test_what_is_read_where_something_is_missing():
    """SCOPE prefers what the encoder says to projected features, and class attention to received attention."""
    features, saliency, valid = full_views()
    pruning, other = VisualTokenPruningConfig("scope", 0.5), saliency.flip(1)
    expected = select_scope(features, saliency, valid, pruning)
    cells = [(of_view, None) for of_view in features.flatten(1, 2)]
    encoded, nothing = CellFeatures(cells, torch.device("cpu")), CellFeatures([], torch.device("cpu"))
    evidence = ViewEvidence(
        valid, [24] * 3, range(3), {LAYER: other}, {LAYER: saliency}, ENCODER, features=nothing, encoded=encoded
    )
    assert torch.equal(METHODS["scope"].select(evidence, pruning), expected)
    evidence = ViewEvidence(valid, [24] * 3, range(3), {LAYER: saliency}, {}, ENCODER, features=encoded)
    assert torch.equal(METHODS["scope"].select(evidence, pruning), expected)


@pytest.mark.parametrize("name", ["scope", "id_selection", "mmr"])
def test_the_last_layer_over_the_whole_image_is_read(name):
    within_windows = EncoderFacts(8, 7, comparable_layers=(2, 5))
    assert list(METHODS[name].layers(VisualTokenPruningConfig(name), within_windows)) == [5]
    assert list(METHODS[name].layers(VisualTokenPruningConfig(name, layer=2), within_windows)) == [2]
    assert list(METHODS[name].layers(VisualTokenPruningConfig(name), EncoderFacts(8, 6))) == [6]


@pytest.mark.parametrize("name", OF_VIEWS)
def test_importance_ranks_what_was_picked_first(name):
    features, saliency, valid = full_views((2, 4, 4))
    valid[1, 0] = False
    pruning, evidence = VisualTokenPruningConfig(name, 0.5), evidence_of(features, saliency, valid, [8, 6])
    method = METHODS[name]
    importance, kept = method.importance(evidence, pruning), method.select(evidence, pruning)
    assert torch.equal(importance.isnan(), ~valid)
    for of_view, kept_of_view, usable in zip(importance, kept, valid, strict=True):
        assert sorted(of_view[kept_of_view].tolist()) == [float(-step) for step in reversed(range(int(kept_of_view.sum())))]
        assert (of_view[usable & ~kept_of_view] < of_view[kept_of_view].min()).all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((1, 4, 4, 2)), r"`features` is a ndarray; it must be a torch\.Tensor"),
        (torch.rand(1, 4, 4), r"`features` is torch.float32 of shape \(1, 4, 4\); .* shape \(1, 4, 4, hidden\)"),
        (torch.rand(2, 4, 4, 2), r"of shape \(2, 4, 4, 2\); `valid` has shape \(1, 4, 4\)"),
        (torch.ones(1, 4, 4, 2, dtype=torch.int64), "torch.int64.*floating point"),
    ],
)
@pytest.mark.parametrize("name", OF_VIEWS)
def test_features_that_do_not_fit(name, features, message):
    with pytest.raises(ValueError, match=message):
        SELECT[name](features, torch.rand(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), 0.5)


def test_packed_features_that_do_not_fit():
    pruning = VisualTokenPruningConfig("divprune", 0.4)
    layout = TokenLayout.single_tile(4, pruning)
    with pytest.raises(ValueError, match=r"of shape \(9, 2\); its layout needs floating point of shape \(16, hidden\)"):
        select_divprune([torch.rand(9, 2)], [layout], pruning)
    with pytest.raises(ValueError, match="has 0 images and `layouts` 1"):
        select_divprune([], [layout], pruning)


# Large groups, of whose matrix half is held.


def folded_and_whole(monkeypatch, cells, block, hidden=12, seed=0):
    monkeypatch.setattr(folded_matrix, "_ROWS_OF_A_BLOCK", block)
    features = torch.randn(1, cells, hidden, generator=torch.Generator().manual_seed(seed))
    features[0, ::5] = features[0, 0].clone()
    features[0, 3:4] = 0
    directions = unit_vectors(features, torch.ones(1, cells, dtype=torch.bool))
    return FoldedMatrix(lambda part: directions[:, part], cells), directions[0] @ directions[0].T


@pytest.mark.parametrize(("cells", "block"), [(1, 4), (4, 4), (5, 4), (23, 4), (23, 7), (9, 100)])
def test_a_folded_matrix_is_the_whole_one(monkeypatch, cells, block):
    folded, whole = folded_and_whole(monkeypatch, cells, block)
    everything = torch.arange(cells)
    found = folded.rows(everything)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    assert torch.equal(found, found.T)
    some = torch.tensor([cells - 1, 0, cells // 2, 0])
    assert torch.equal(folded.rows(some), found[some])
    assert torch.equal(folded.diagonal(), found.diagonal())
    torch.testing.assert_close(folded.column_sums(), found.sum(0), atol=1e-5, rtol=0)
    folded.change(lambda block, rows, columns: block.add_(2))
    folded.divide_columns(everything + 1.0)
    assert torch.equal(folded.rows(some), (found[some] + 2) / (everything + 1.0))


@pytest.mark.parametrize("name", REFERENCES)
def test_every_pick_of_a_large_group_is_the_best(monkeypatch, name):
    """As of small groups; with bands too, of which each is folded by itself."""
    monkeypatch.setattr(folded_matrix, "_ROWS_OF_A_BLOCK", 16)
    monkeypatch.setattr(greedy, "_MOST_CELLS_HELD_WHOLE", 20)
    generator = np.random.default_rng(5)
    for ratio, hidden in ((0.3, 8), (1.0, 40)):
        features = generator.standard_normal((2, 7, 9, hidden)).astype(np.float32)
        features[:, 2, ::2] = features[:, 0, :1]
        features[0, 5, 5] = np.nan
        saliency = generator.integers(0, 5, (2, 7, 9)).astype(np.float32) / 4
        valid = generator.random((2, 7, 9)) < 0.8
        pruning = VisualTokenPruningConfig(name, ratio)
        if name == "divprune":
            valid[:] = True
            layout = TokenLayout(None, pruning, [StitchedViews(7, 9)])
            packed = list(torch.from_numpy(features).flatten(1, 2))
            importance = METHODS[name].importance(VisualEvidence([layout] * 2, packed, {}, {}, ENCODER), pruning).view(2, -1)
            total = rounded_share(63, ratio)
            picks = [torch.sort(one, descending=True, stable=True).indices[:total].tolist() for one in importance]
        else:
            picks = picks_in_order(name, *map(torch.from_numpy, (features, saliency, valid)), pruning)
        for view in range(2):
            given_ = (features[view].reshape(63, -1), saliency[view].flatten(), valid[view].flatten())
            hold_picks_against_formulas(name, picks[view], *given_, pruning)


# Not of dpp, whose first picks are among cells that are equal but for rounding.
@pytest.mark.parametrize("name", ["scope", "mmtok", "id_selection", "mmr"])
def test_large_groups_are_split_and_folded_alike(monkeypatch, name):
    """In bands a folded matrix picks what a whole one does."""
    generator = torch.Generator().manual_seed(4)
    features, saliency = torch.randn(1, 12, 6, 9, generator=generator), torch.rand(1, 12, 6, generator=generator)
    valid = torch.ones(1, 12, 6, dtype=torch.bool)
    pruning = VisualTokenPruningConfig(name, 0.4)
    monkeypatch.setattr(greedy, "bands_of_rows", lambda rows: bands_of_rows(rows, 40))
    whole = picks_in_order_of_any(name, features, saliency, valid, pruning)
    monkeypatch.setattr(folded_matrix, "_ROWS_OF_A_BLOCK", 10)
    monkeypatch.setattr(greedy, "_MOST_CELLS_HELD_WHOLE", 5)
    assert torch.equal(picks_in_order_of_any(name, features, saliency, valid, pruning), whole)


def picks_in_order_of_any(name, features, saliency, valid, pruning):
    return METHODS[name].order(evidence_of(features, saliency, valid, [0]), pruning)
