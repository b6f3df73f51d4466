"""G-Prune's selector: against the released code's results, and against a second one written plainly from the description."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.methods import gprune as selectors_gprune
from hivtp_hf.methods.gprune import count_gprune, gprune_scores, propagated_mass, select_gprune
from hivtp_hf.pruning.layout import TokenLayout
from layouts import FIRST_TOKENS

pytestmark = pytest.mark.once

DATA = Path(__file__).parents[1] / "data"
NEWLINE = 1234.0  # what the released code's results have in place of the newline's embedding

# Image sizes (height, width) of tiles with 4 x 4 cells: crops side by side, on top of each other and both, un-padded or not.
SMALL_SIZES = [(112, 112), (60, 110), (30, 110), (112, 40), (56, 112), (1, 900), (900, 7)]


def small_layout(size, pruning):
    pinpoints = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    return TokenLayout.from_image_size(*size, pruning, tile_size=56, patch_size=14, pinpoints=pinpoints)


def some_layouts(pruning):
    """Of every kind of image: LLaVA-NeXT's shapes, and LLaVA-1.5's with and without a class token."""
    single = [TokenLayout.single_tile(4, pruning, **FIRST_TOKENS[extra]) for extra in (-1, 0, 1)]
    return single + [small_layout(size, pruning) for size in SMALL_SIZES]


def random_features(layouts, hidden=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(hidden, generator=generator)  # so that similarities lie on both sides of the threshold
    return [torch.randn(layout.num_stock, hidden, generator=generator) + 0.7 * centre for layout in layouts]


@pytest.fixture(scope="module")
def released():
    with np.load(DATA / "gprune.npz") as arrays:
        return dict(arrays)


def test_published_graphs_are_reproduced(released):
    results = [released[f"g1_{name}"] for name in ("case", "param", "kept", "score", "degree")]
    assert len(results[0]) == 32
    for (seed, count, iterations), (ratio, threshold, temperature), kept, score, degree in zip(*results, strict=True):
        pruning = VisualTokenPruningConfig(
            "gprune", ratio, similarity_threshold=threshold, temperature=temperature, iterations=iterations
        )
        features = torch.from_numpy(released["g1_feat"][seed])
        layout = TokenLayout.single_tile(24, pruning)
        assert layout.group_totals == (count,)
        selected = select_gprune([features], [layout], pruning)
        assert selected.flatten().nonzero().flatten().tolist() == kept[kept >= 0].tolist()
        assert propagated_mass(features[None], pruning)[1][0].tolist() == degree.tolist()
        torch.testing.assert_close(gprune_scores(features[None], pruning)[0], torch.from_numpy(score), rtol=2e-5, atol=0)


@pytest.mark.parametrize("image", [0, 1, 2])
@pytest.mark.parametrize(("ratio", "name"), [(0.5, "next_keep"), (0.25, "next{}_keep_r25"), (0.1, "next{}_keep_r10")])
def test_published_images_are_reproduced(released, image, ratio, name):
    width, height, tile_columns, tile_rows, rows, columns, packed_length, _ = released["next_case"][image].tolist()
    kept = released[name.format(image)]
    kept = kept[image][kept[image] >= 0] if ratio == 0.5 else kept
    layout = TokenLayout.from_image_size(height, width, VisualTokenPruningConfig("gprune", ratio))
    assert (layout.parts[1].across, layout.parts[1].down, layout.num_stock) == (tile_columns, tile_rows, packed_length)
    assert layout.num_newlines == rows
    assert sum(layout.valid_per_view[1:]) == rows * columns
    cell_of_token = layout._cell_of_token
    of_cells = torch.from_numpy(released[f"next{image}_crops"]).flatten(0, 1)[cell_of_token.clamp(min=0)]
    packed = torch.where((cell_of_token >= 0)[:, None], of_cells, NEWLINE)
    assert layout.kept_indices(select_gprune([packed], [layout], layout.pruning)).tolist() == kept.tolist()


# The same selection a second time: one image, float64, the matrix power, positions found by the layout's own table.


def reference_scores(features, pruning):
    features = features.double().numpy()
    length = np.linalg.norm(features, axis=1)
    directions = features / np.maximum(length, 1e-12)[:, None]
    similarity = directions @ directions.T
    edges = np.where(similarity < pruning.similarity_threshold, 0, similarity) / pruning.temperature
    edges = np.where(edges < 1e-6, -5000, edges)
    transition = np.exp(edges - edges.max(1, keepdims=True))
    transition /= transition.sum(1, keepdims=True)
    mass = length @ np.linalg.matrix_power(transition, pruning.iterations)
    return mass / (transition > 0).sum(1)


def graphs_of(layout):
    """Packed positions of the tokens of each graph."""
    cell_of_token, per_tile = layout._cell_of_token, math.prod(layout.view_shapes[0])
    base = ((cell_of_token >= 0) & (cell_of_token < per_tile)).nonzero().flatten()
    crops = (cell_of_token >= per_tile).nonzero().flatten()
    return [base] if layout.num_views == 1 else [base, crops]


def assert_keeps_the_best(kept_cells, features, layout, pruning):
    """Of every graph the right number, and no token whose score in float64 is clearly below one that is dropped."""
    kept_cells = kept_cells.flatten()
    assert kept_cells.sum() == sum(layout.group_totals)
    assert not kept_cells[~layout.valid.flatten()].any()
    for positions, count in zip(graphs_of(layout), layout.group_totals, strict=True):
        kept = kept_cells[layout._cell_of_token[positions]].numpy()
        assert kept.sum() == count
        if 0 < count < len(kept):
            scores = reference_scores(features[positions], pruning)
            assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-4)


@st.composite
def images_and_settings(draw):
    pruning = VisualTokenPruningConfig(
        "gprune",
        retention_ratio=draw(st.sampled_from([1 / 36, 1 / 18, 1 / 9, 2 / 9, 0.5, 1.0]) | st.floats(1 / 36, 1)),
        similarity_threshold=draw(st.floats(0, 0.95)),
        temperature=draw(st.sampled_from([0.03, 0.1, 1.0, 20.0])),
        iterations=draw(st.integers(0, 8)),
    )
    layouts = draw(st.lists(st.sampled_from(some_layouts(pruning)), min_size=1, max_size=4))
    features = random_features(layouts, draw(st.sampled_from([2, 8, 33])), draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        features[0][::3] = 0  # tokens without a direction
    return features, layouts, pruning


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images_and_settings())
def test_equals_the_reference(case):
    features, layouts, pruning = case
    selected = select_gprune(features, layouts, pruning)
    for image, layout, of_image in zip(
        features, layouts, selected.split([layout.num_cells for layout in layouts]), strict=True
    ):
        assert_keeps_the_best(of_image, image, layout, pruning)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_scores_equal_the_matrix_power(tokens, iterations, seed):
    features = torch.randn(3, tokens, 12, generator=torch.Generator().manual_seed(seed))
    pruning = VisualTokenPruningConfig("gprune", similarity_threshold=0.2, temperature=0.2, iterations=iterations)
    expected = np.stack([reference_scores(of_graph, pruning) for of_graph in features])
    np.testing.assert_allclose(gprune_scores(features, pruning).numpy(), expected, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=16, max_size=16), st.floats(1 / 36, 1))
def test_equal_scores_keep_the_first_tokens(lengths, ratio):
    # Tokens at right angles have no neighbours: the score of each is its length, without any rounding.
    pruning = VisualTokenPruningConfig("gprune", ratio)
    layout = TokenLayout.single_tile(4, pruning)
    selected = select_gprune([torch.diag(torch.tensor(lengths))], [layout], pruning).flatten().nonzero().flatten().tolist()
    best = sorted(range(16), key=lambda token: (-lengths[token], token))[: int(ratio * 16)]
    assert selected == sorted(best)


@pytest.mark.parametrize(("threshold", "degrees"), [(0.5, [2, 2, 1]), (0.5000001, [1, 1, 1])])
def test_the_threshold_itself_is_an_edge(threshold, degrees):
    features = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 3.0, 4.0, -12.0]]])  # a cosine of exactly 0.5
    pruning = VisualTokenPruningConfig("gprune", similarity_threshold=threshold)
    assert propagated_mass(features, pruning)[1].tolist() == [degrees]


def test_no_iterations_compare_lengths():
    features = torch.eye(5)[None] * torch.arange(1.0, 6.0)
    assert gprune_scores(features, {"method": "gprune", "iterations": 0}).tolist() == [[1, 2, 3, 4, 5]]


def test_count_keeps_the_order_of_operations():
    pruning = VisualTokenPruningConfig("gprune", 0.35)
    layout = TokenLayout.from_image_size(400, 640, pruning)
    assert sum(layout.valid_per_view[1:]) == 30 * 48
    assert int(0.35 * (30 * 48)) == 503
    assert count_gprune(layout, pruning) == layout.group_totals == (201, 504)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((480, 640), 0.5, (288, 864)),
        ((300, 1000), 0.25, (144, 396)),
        ((500, 300), 0.1, (57, 96)),
        ((672, 672), 1.0, (576, 2304)),
        ((1, 30000), 0.5, (288, 0)),  # no row of the crops survives un-padding
    ],
)
def test_count_of_an_image(size, ratio, expected):
    pruning = VisualTokenPruningConfig("gprune", ratio)
    layout = TokenLayout.from_image_size(*size, pruning)
    assert count_gprune(layout, {"method": "gprune", "retention_ratio": ratio}) == expected
    assert layout.num_retained == sum(expected) + layout.num_newlines


def test_a_ratio_of_one_keeps_every_valid_cell():
    pruning = VisualTokenPruningConfig("gprune", 1.0)
    layouts = some_layouts(pruning)
    selected = select_gprune(random_features(layouts), layouts, pruning)
    assert torch.equal(selected, torch.cat([layout.valid for layout in layouts]))
    assert all(layout.keeps_everything for layout in layouts)


@pytest.mark.parametrize("keep_newlines", [True, False])
def test_newlines_and_class_tokens_do_not_influence_the_choice(keep_newlines):
    pruning = VisualTokenPruningConfig("gprune", 0.4, keep_newlines=keep_newlines)
    layouts = some_layouts(pruning)
    features = random_features(layouts)
    before = select_gprune(features, layouts, pruning)
    for image, layout in zip(features, layouts, strict=True):
        image[layout._cell_of_token < 0] = float("nan")
    assert torch.equal(select_gprune(features, layouts, pruning), before)


def test_images_do_not_influence_each_other(monkeypatch):
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = some_layouts(pruning) + some_layouts(pruning)[::-2]  # the same layouts again: they are remembered
    features = random_features(layouts)
    selected = select_gprune(features, layouts, pruning)
    one_by_one = [select_gprune([image], [layout], pruning) for image, layout in zip(features, layouts, strict=True)]
    assert torch.equal(selected, torch.cat(one_by_one))
    monkeypatch.setattr(selectors_gprune, "_WORKING_BYTES", 0)
    assert torch.equal(select_gprune(features, layouts, pruning), selected)


def test_features_may_have_any_strides():
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = some_layouts(pruning)
    features = random_features(layouts)
    strided = [image.T.contiguous().T for image in features]
    before = [image.clone() for image in strided]
    assert torch.equal(select_gprune(strided, layouts, pruning), select_gprune(features, layouts, pruning))
    assert all(map(torch.equal, strided, before))


def test_images_of_one_shape_share_a_step_that_memory_bounds(monkeypatch):
    steps = []
    monkeypatch.setattr(
        selectors_gprune, "gprune_scores", lambda graphs, _: steps.append(tuple(graphs.shape)) or graphs[..., 0]
    )
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = [small_layout((112, 112), pruning)] * 5
    features = random_features(layouts)
    select_gprune(features, layouts, pruning)
    assert steps == [(5, 16, 8), (5, 64, 8)]
    steps.clear()
    monkeypatch.setattr(selectors_gprune, "_WORKING_BYTES", 2 * (2 * 4 * 64 * (64 + 8)))
    select_gprune(features, layouts, pruning)
    assert steps == [(5, 16, 8), (2, 64, 8), (2, 64, 8), (1, 64, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = some_layouts(pruning)
    features = [image.to(dtype) for image in random_features(layouts)]
    in_float32 = [image.float() for image in features]
    assert torch.equal(select_gprune(features, layouts, pruning), select_gprune(in_float32, layouts, pruning))
    scores = gprune_scores(features[0][None], pruning)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, gprune_scores(in_float32[0][None], pruning))


def test_autocast_changes_nothing():
    features, pruning = torch.randn(2, 50, 8), VisualTokenPruningConfig("gprune")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gprune_scores(features, pruning)
    assert torch.equal(under_autocast, gprune_scores(features, pruning))


def test_no_gradient_is_recorded():
    features = torch.randn(2, 50, 8, requires_grad=True)
    assert not gprune_scores(features, VisualTokenPruningConfig("gprune")).requires_grad


def test_features_that_are_no_numbers_keep_the_count():
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = some_layouts(pruning)
    for value in (float("nan"), float("inf"), 0.0):
        features = [torch.full((layout.num_stock, 8), value) for layout in layouts]
        selected = select_gprune(features, layouts, pruning)
        assert int(selected.sum()) == sum(sum(layout.group_totals) for layout in layouts)
        assert not selected[~torch.cat([layout.valid for layout in layouts])].any()


def peak_allocation(call):
    """The most bytes that `call` had allocated on the CPU at once, inside operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # negative where freed
    return max(np.cumsum(sizes))


def test_large_graphs_are_formed_in_bands(monkeypatch):
    features = random_features([TokenLayout.single_tile(24, VisualTokenPruningConfig("gprune"))] * 2)
    features = torch.stack(features)
    for iterations in (0, 1, 5):
        pruning = VisualTokenPruningConfig("gprune", iterations=iterations)
        mass, degree = propagated_mass(features, pruning)
        with monkeypatch.context() as patched:
            patched.setattr(selectors_gprune, "_MOST_TOKENS_AT_ONCE", 100)
            patched.setattr(selectors_gprune, "_WORKING_BYTES", 2 * 2 * 4 * 576 * 77)
            found = propagated_mass(features, pruning)
        torch.testing.assert_close(found[0], mass, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[1], degree)
    tokens = 6000
    peak = peak_allocation(lambda: propagated_mass(torch.rand(1, tokens, 16), VisualTokenPruningConfig("gprune", iterations=1)))
    assert peak < 192 * 2**20 < 2 * 4 * tokens**2  # bytes: bands, and what whole buffers would take


def three_buffers(tokens):
    similarity = torch.rand(tokens, tokens)
    edges = similarity / 2
    edges.softmax(-1)


def test_a_graph_takes_one_buffer_beside_its_similarities():
    tokens = 48 * 48
    square = 4 * tokens * tokens
    pruning = VisualTokenPruningConfig("gprune")
    layout = TokenLayout.from_image_size(672, 672, pruning)
    (features,) = random_features([layout], hidden=16)  # few, so that what is beside the two buffers is small
    assert peak_allocation(lambda: select_gprune([features], [layout], pruning)) < 2.1 * square
    assert peak_allocation(lambda: three_buffers(tokens)) >= 3 * square  # the meter itself


def test_compiles_into_one_graph():
    pruning = VisualTokenPruningConfig("gprune", 0.3)
    layouts = some_layouts(pruning)[::2]
    features = random_features(layouts)
    # The graph is what matters here, not the code generated from it: "aot_eager" needs no C++ compiler.
    compiled = torch.compile(select_gprune, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, layouts, pruning), select_gprune(features, layouts, pruning))


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_never_waits_for_the_device(ratio):
    # Reading a value back is impossible on the meta device, so running there shows that nothing is read.
    pruning = VisualTokenPruningConfig("gprune", ratio)
    layouts = some_layouts(pruning)
    selected = select_gprune([image.to("meta") for image in random_features(layouts)], layouts, pruning)
    assert selected.device.type == "meta"
    assert selected.shape == (sum(layout.num_cells for layout in layouts),)


GPRUNE = VisualTokenPruningConfig("gprune")
SINGLE = TokenLayout.single_tile(4, GPRUNE)


@pytest.mark.parametrize(
    ("features", "layouts", "message"),
    [
        ([], [], "0 images and `layouts` 0"),
        ([torch.rand(16, 8)], [SINGLE, SINGLE], "1 images and `layouts` 2"),
        ([torch.rand(16, 8), torch.rand(15, 8)], [SINGLE, SINGLE], r"`features\[1\]` is .* \(15, 8\).*\(16, hidden\)"),
        ([torch.rand(1, 16, 8)], [SINGLE], r"\(1, 16, 8\)"),
        ([torch.ones(16, 8, dtype=torch.int64)], [SINGLE], "int64.*floating point"),
    ],
)
def test_images_that_do_not_fit_are_refused(features, layouts, message):
    with pytest.raises(ValueError, match=message):
        select_gprune(features, layouts, GPRUNE)


def test_graphs_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be floating point of shape \(graphs, tokens, hidden\)"):
        gprune_scores(torch.rand(16, 8), GPRUNE)
    with pytest.raises(ValueError, match=r"must be floating point of shape \(graphs, tokens, hidden\)"):
        gprune_scores(torch.ones(1, 16, 8, dtype=torch.int64), GPRUNE)
    for call in (
        lambda pruning: select_gprune([torch.rand(16, 8)], [SINGLE], pruning),
        lambda pruning: count_gprune(SINGLE, pruning),
        lambda pruning: gprune_scores(torch.rand(1, 16, 8), pruning),
    ):
        with pytest.raises(ValueError, match="`pruning` has the method 'random'; select_gprune needs 'gprune'"):
            call({"method": "random"})
