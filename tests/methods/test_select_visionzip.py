"""VisionZip's selection and averages of plain tensors: against plain loops, with ties, and at the ends of the budget."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visionzip_reference as plain
from hivtp_hf import StitchedViews, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.methods.visionzip import select_visionzip
from hivtp_hf.pruning.evidence import EncoderFacts, VisualEvidence
from hivtp_hf.pruning.features import choose_and_merge, cut_and_merge_features
from hivtp_hf.pruning.registry import METHODS

pytestmark = pytest.mark.once

ENCODER = EncoderFacts(5, 3)


@st.composite
def some_views(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    views, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    shape = (views, rows * columns)
    saliency = (random.integers(0, 5, shape) / 4).astype(np.float32)
    # Signs alone have one length, so that equal products are equal cosines.
    keys = random.choice([-1.0, 1.0], (*shape, 4)).astype(np.float32)
    if draw(st.booleans()):
        keys[random.random(shape) < 0.2] = draw(st.sampled_from([0.0, np.nan, np.inf]))
    valid = random.random(shape) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    ratio = draw(st.sampled_from([1e-9, 1 / 18, 2 / 9, 0.5, 0.9, 1.0]))
    return saliency, keys, valid, (rows, columns), ratio, draw(st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(some_views())
def test_holders_equal_plain_loops(case):
    saliency, keys, valid, grid, ratio, share = case
    pruning = VisualTokenPruningConfig("visionzip", ratio, contextual_share=share)
    of_views = [torch.from_numpy(of).unflatten(1, grid) for of in (saliency, keys, valid)]
    found = select_visionzip(*of_views, pruning).flatten(1).tolist()
    for view in range(len(valid)):
        kept = plain.rounded(int(valid[view].sum()), ratio)
        held, _ = plain.holders(saliency[view], keys[view], valid[view], kept, share)
        assert len(held) == kept
        expected = [-1] * valid.shape[1]
        for cell, others in held.items():
            for member in (cell, *others):
                expected[member] = cell
        assert found[view] == expected


def evidence_of(layouts, seed, class_token, encoded_size=None):
    """Made-up evidence of some images, and a projector that is not linear, where the encoder is to be read."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(layout.num_cells for layout in layouts)
    scores = {3: torch.randint(0, 9, (cells,), generator=generator) / 9}
    encoded = projector = None
    features = [torch.randn(layout.num_stock, 6, generator=generator) for layout in layouts]
    if encoded_size:
        encoded = [
            torch.randn(rows * columns, encoded_size, generator=generator)
            for layout in layouts
            for rows, columns in layout.view_shapes
        ]
        weight = torch.randn(encoded_size, 6, generator=generator)
        projector = lambda of: torch.nn.functional.gelu(of @ weight)  # noqa: E731
    return VisualEvidence(
        layouts,
        features,
        {} if class_token else scores,
        scores if class_token else {},
        ENCODER,
        encoded=encoded,
        keys={3: torch.randn(cells, 5, generator=generator)},
        projector=projector,
    )


@pytest.mark.parametrize("encoded_size", [None, 4], ids=["of features", "before the projector"])
@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "no class token"])
@pytest.mark.parametrize("ratio", [1e-9, 0.1, 2 / 9, 0.6, 0.99])
def test_averages_equal_plain_loops(ratio, class_token, encoded_size):
    pruning = VisualTokenPruningConfig("visionzip", ratio)
    layouts = [
        TokenLayout.from_image_size(60, 100, pruning, tile_size=56, patch_size=7, pinpoints=[(56, 112), (112, 56)]),
        TokenLayout.single_tile(7, pruning, has_class_token=True),
        TokenLayout(None, pruning, [StitchedViews(5, 9)]),
        TokenLayout.single_tile(6, pruning, skips_first_cell=True),
    ]
    evidence = evidence_of(layouts, 0, class_token, encoded_size)
    kept_indices, merged = choose_and_merge(evidence)
    found = cut_and_merge_features(evidence, kept_indices, merged)
    first, view_number, averages = 0, 0, 0
    for image, layout in enumerate(layouts):
        expected = {position: evidence.features[image][position] for position in layout.is_no_cell.nonzero()[:, 0].tolist()}
        is_average = dict.fromkeys(expected, False)
        positions = layout.by_view(layout.token_of_cell)
        for view, (rows, columns) in enumerate(layout.view_shapes):
            of_view = slice(first, first + rows * columns)
            saliency = (evidence.class_attention or evidence.received)[3][of_view].numpy()
            valid, keys = layout.by_view(layout.valid)[view].flatten().numpy(), evidence.keys[3][of_view].numpy()
            total = layout.group_totals[view]
            held, targets = plain.holders(saliency, keys, valid, total, 10 / 64)
            assert len(targets) == plain.rounded(total, 10 / 64)
            tokens = positions[view].flatten()
            for cell, others in held.items():
                position = int(tokens[cell])
                is_average[position] = bool(others)
                if encoded_size is None or not others:
                    row = plain.average(evidence.features[image][tokens], cell, others, class_token)
                else:
                    row = evidence.projector(plain.average(evidence.encoded[view_number], cell, others, class_token))
                expected[position] = row
            first += rows * columns
            view_number += 1
        kept = kept_indices[image].tolist()
        assert kept == sorted(expected)
        assert len(kept) == layout.num_retained
        assert merged[image].is_average.tolist() == [is_average[position] for position in kept]
        for row, position, is_mean in zip(found[image], kept, merged[image].is_average.tolist(), strict=True):
            if is_mean:
                torch.testing.assert_close(row, expected[position], atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(row, expected[position])
        averages += sum(is_average.values())
    assert (averages > 0) == (ratio > 0.01)


def test_images_of_a_batch_are_averaged_as_alone():
    pruning = VisualTokenPruningConfig("visionzip", 0.3)
    layouts = [TokenLayout.single_tile(grid, pruning) for grid in (9, 12, 9)]
    evidence = evidence_of(layouts, 1, True, 4)
    together = cut_and_merge_features(evidence, *choose_and_merge(evidence))
    for image in range(3):
        alone = evidence.of_images([image])
        (rows,) = cut_and_merge_features(alone, *choose_and_merge(alone))
        assert torch.equal(rows, together[image])


def test_numbers_that_are_none_stay_where_they_are():
    """What is in one average, or in none, touches no other."""
    pruning = VisualTokenPruningConfig("visionzip", 0.3)
    layout = TokenLayout.single_tile(10, pruning)
    evidence = evidence_of([layout], 2, False)
    (clean,) = cut_and_merge_features(evidence, *choose_and_merge(evidence))
    kept, (merged,) = choose_and_merge(evidence)
    number = int(merged.source[merged.is_average][0])
    broken = int(merged.members[merged.starts[number]])
    evidence.features[0][broken] = torch.nan
    (rows,) = cut_and_merge_features(evidence, kept, [merged])
    is_broken = merged.source == number
    assert rows[is_broken].isnan().all()
    assert torch.equal(rows[~is_broken], clean[~is_broken])


def test_it_ranks_dominant_cells_before_contextual_ones():
    pruning = VisualTokenPruningConfig("visionzip", 0.4)
    layout = TokenLayout.single_tile(8, pruning)
    evidence, method = evidence_of([layout], 3, True), METHODS["visionzip"]
    importance = evidence.ask(method, method.importance, pruning)
    kept = evidence.ask(method, method.select, pruning)
    saliency = evidence.class_attention[3]
    held, targets = plain.holders(saliency.numpy(), evidence.keys[3].numpy(), layout.valid.numpy(), int(kept.sum()), 10 / 64)
    order = sorted(range(64), key=lambda cell: -float(importance[cell]))
    dominant = sorted(set(held) - set(targets), key=lambda cell: (-float(saliency[cell]), cell))
    assert order[: len(dominant)] == dominant
    assert sorted(order[len(dominant) : int(kept.sum())]) == targets
    assert bool(kept[order[: int(kept.sum())]].all())


@pytest.mark.parametrize("weights", ["cluster_size", "inclusion"])
def test_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"`token_weights` is '.*so it must be 'none'|does not know the chance"):
        VisualTokenPruningConfig("visionzip", 0.3, token_weights=weights)
    with pytest.raises(ValueError, match="exact_count"):
        VisualTokenPruningConfig("visionzip", 0.3, exact_count=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.rand(1, 4, 4), r"of shape \(1, 4, 4\); it must be a floating point torch.Tensor of shape \(1, 4, 4, size\)"),
        (torch.ones(1, 4, 4, 2, dtype=torch.int64), "`keys` is torch.int64"),
        ([0.5], "`keys` is list"),
    ],
)
def test_keys_that_do_not_fit(keys, message):
    saliency, valid = torch.rand(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        select_visionzip(saliency, keys, valid, {"method": "visionzip", "retention_ratio": 0.5})
