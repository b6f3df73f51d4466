"""Every method in whole models: the same guarantees at every ratio, on every kind of batch, in both families."""

import pytest
import torch

from families import FAMILIES
from hivtp_hf import Evidence, TokenLayout, VisualTokenPruningConfig, select_hivtp
from hivtp_hf.methods.cls_attention import select_cls_attention
from hivtp_hf.methods.divprune import select_divprune
from hivtp_hf.methods.dpp import select_dpp
from hivtp_hf.methods.gprune import select_gprune
from hivtp_hf.methods.hiprune import select_hiprune
from hivtp_hf.methods.id_selection import select_id_selection
from hivtp_hf.methods.mmr import select_mmr
from hivtp_hf.methods.mmtok import select_mmtok
from hivtp_hf.methods.random import select_random
from hivtp_hf.methods.scope import select_scope
from hivtp_hf.methods.spread import distance_from_mean, select_spread
from hivtp_hf.methods.uniform import select_uniform
from hivtp_hf.pruning.registry import METHODS
from layouts import counts_of_groups, views
from nightly import mostly_nightly
from oracle import oracle_inputs
from places_reference import Placed
from tested_methods import TESTED
from tiny_models import image_inputs, photo, twins

RATIOS = (1.0, 0.9, 0.57, 0.5, 1 / 3, 2 / 9, 1 / 9, 1 / 18, 1 / 36)
# Rows of several lengths and numbers of images, one of them without any; every pinpoint shape of LLaVA-NeXT occurs.
TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>, <image>"]
SIZES = [(60, 100), (112, 112), (200, 50), (20, 20), (30, 170)]
TOWERS = {"CLIP": {}, "SigLIP": {"vision_type": "siglip_vision_model"}}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(family=request.param)


@pytest.fixture(scope="module")
def next_pair():
    return twins()


def prune_by(pair, **pruning):
    pair.pruned.config.pruning_config = pair.processor.pruning_config = pruning
    return pair


def ratios_of(method: str) -> tuple[float, ...]:
    return (1.0,) if METHODS[method].keeps_everything else RATIOS


MATRIX = mostly_nightly(
    ((method, ratio) for method in TESTED for ratio in ratios_of(method)), lambda method, ratio: ratio in (1, 2 / 9)
)


def images():
    return [photo(*size, seed) for seed, size in enumerate(SIZES)]


def batch(pair, **call):
    return pair.processor(images=images(), text=TEXTS, padding=True, return_tensors="pt", **call)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def features(pair, inputs):
    with torch.no_grad():
        return pair.pruned.get_image_features(**image_inputs(inputs))


@pytest.mark.parametrize(("method", "ratio"), MATRIX)
def test_guarantees(pair, method, ratio):
    prune_by(pair, method=method, retention_ratio=ratio, **TESTED[method].small)
    inputs = batch(pair)
    output = features(pair, inputs)
    layouts = [pair.processor.token_layout(*size) for size in SIZES]

    # Processor, layout and model count the same, and the cells of each group are as many as the layout says.
    is_placeholder = inputs["input_ids"] == pair.pruned.config.image_token_id
    assert int(is_placeholder.sum()) == sum(layout.num_retained for layout in layouts)
    in_stages = METHODS[method].drops_in_stages(pair.pruned.config.pruning_config)
    if in_stages:
        with pytest.raises(ValueError, match=r"'vflowopt' has stages of its own.*and another method"):
            pair.processor._get_num_multimodal_tokens(image_sizes=SIZES)
    else:
        announced = pair.processor._get_num_multimodal_tokens(image_sizes=SIZES)
        assert announced["num_image_tokens"] == [layout.num_retained for layout in layouts]
    for layout, kept in zip(layouts, output.kept_indices, strict=True):
        assert len(kept) == layout.num_retained
        assert bool((kept.diff() > 0).all())
        assert counts_of_groups(layout, kept) == layout.group_totals
        assert bool(layout.valid[layout.cell_numbers(kept)].all())

    # The kept features are stock's own, and what follows from them is what stock makes of the shorter sequence.
    with torch.no_grad():
        packed = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
    averages = output.is_average or [torch.zeros_like(kept, dtype=torch.bool) for kept in output.kept_indices]
    assert (output.is_average is not None) == METHODS[method].merges
    for kept, pruned, stock, is_average in zip(output.kept_indices, output.pooler_output, packed, averages, strict=True):
        assert torch.equal((pruned != stock[kept]).any(1), is_average)
    got, is_token = logits(pair.pruned, inputs), inputs["attention_mask"].bool()
    if in_stages and ratio < 1:
        placed = Placed(pair, inputs)
        with torch.no_grad():
            expected = placed.logits(inputs["input_ids"], inputs["attention_mask"])
        # What is dropped at the very beginning of a row has nothing before it that it could show.
        is_left = is_token & (placed.stages_of_columns > 1)
        is_token = is_token & (is_left.cumsum(1) > 0)
    else:
        expected = logits(pair.stock, oracle_inputs(pair, inputs))
    torch.testing.assert_close(got[is_token], expected[is_token], atol=1e-4, rtol=1e-4)
    if ratio == 1:
        stock_inputs = pair.stock_processor(images=images(), text=TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(got, logits(pair.stock, stock_inputs))


@pytest.mark.parametrize("method", TESTED)
def test_no_newlines(next_pair, method):
    settings = {"method": method, "retention_ratio": ratios_of(method)[-1], **TESTED[method].small}
    pair = prune_by(next_pair, **settings, keep_newlines=False)
    inputs = batch(pair)
    for size, kept in zip(SIZES, features(pair, inputs).kept_indices, strict=True):
        assert len(kept) == len(pair.processor.token_layout(*size).cells(kept))
    assert logits(pair.pruned, inputs).isfinite().all()


@pytest.mark.parametrize("method", TESTED)
def test_ratios_in_one_batch(pair, method):
    """Images of one call at ratios of their own keep what they keep alone."""
    prune_by(pair, method=method, **TESTED[method].small)
    ratios = [1.0] * 5 if METHODS[method].keeps_everything else [1.0, 0.5, 1 / 9, 0.5, 0.3]
    inputs = batch(pair, retention_ratio=ratios)
    with torch.no_grad():
        together = pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=inputs["retention_ratio"])
        for image, ratio, kept in zip(images(), ratios, together.kept_indices, strict=True):
            single = pair.processor(images=image, text="<image>", return_tensors="pt", retention_ratio=ratio)
            alone = pair.pruned.get_image_features(**image_inputs(single), retention_ratio=single["retention_ratio"])
            assert torch.equal(alone.kept_indices[0], kept)


def attention_maps(model, pixels):
    """Of every encoder layer the whole attention, (tiles, heads, queries, keys), from eager attention."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return tower(pixels, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)


def features_of_cells(layout, packed):
    """What stock packed for the cells of an image whose views are alike, (views, rows, columns, hidden); 0 elsewhere."""
    of_cells = packed.new_zeros(layout.num_cells, packed.shape[-1])
    of_cells[layout.cell_numbers(layout.cell_positions)] = packed[layout.cell_positions]
    return of_cells.view(layout.num_views, *layout.view_shapes[0], -1)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("pruning", "feature_layer", "read_layers"),
    [
        ({"method": "hivtp", "importance_start_layer": 2, "importance_num_layers": 2}, -2, (2, 3)),
        ({"method": "hiprune", "object_layer": 4}, -2, (4, 8)),
        ({"method": "hiprune", "object_layer": 4}, [-4, 3], (4, 2)),
        ({"method": "hiprune", "object_layer": 4, "deep_layer": 7}, -2, (4, 7)),
        ({"method": "hiprune", "object_layer": 4, "deep_layer": 4, "published_borders": True}, -1, (4, 4)),
        ({"method": "cls_attention"}, -2, (8,)),
        ({"method": "cls_attention"}, -1, (9,)),
        ({"method": "cls_attention", "layer": 3}, -2, (3,)),
        ({"method": "gprune", "iterations": 2}, -2, ()),
        ({"method": "divprune"}, -2, ()),
        ({"method": "scope"}, -2, (8,)),
        ({"method": "scope"}, [-4, 3], (2,)),
        ({"method": "dpp"}, -1, ()),
        ({"method": "mmtok"}, 3, ()),
        ({"method": "id_selection", "layer": 4}, -2, (4,)),
        ({"method": "mmr"}, -2, (8,)),
        ({"method": "spread", "importance_start_layer": 2, "importance_num_layers": 2}, -2, (2, 3)),
        ({"method": "spread", "score": "features"}, -2, ()),
        ({"method": "random", "seed": 3}, -2, ()),
        ({"method": "uniform"}, -2, ()),
    ],
    ids=str,
)
def test_the_whole_chain_by_hand(tower, pruning, feature_layer, read_layers):
    """What each method is to look at, taken from the stock model's own maps and features, gives what the model keeps."""
    if tower == "SigLIP" and pruning["method"] == "cls_attention":
        pytest.skip("no class token, which is refused")
    settings = VisualTokenPruningConfig(**pruning, retention_ratio=0.3)
    pair = twins(settings, vision_feature_layer=feature_layer, **TOWERS[tower])
    size = (60, 100)
    inputs = pair.processor(images=photo(*size), text="<image>", return_tensors="pt")
    layout: TokenLayout = pair.processor.token_layout(*size)
    pixels, valid = inputs["pixel_values"][0, : layout.num_views], views(layout)
    maps = [layer.mean(1) for layer in attention_maps(pair.stock, pixels)]
    has_cls = int(tower == "CLIP")

    def cells(of_tokens):
        return of_tokens[:, has_cls:].reshape(*valid.shape, *of_tokens.shape[2:])

    received = [cells(maps[layer].mean(1)) for layer in read_layers]
    # Where there is no class token, what cells receive stands for what it attends to.
    saliency = [cells(maps[layer][:, 0]) if has_cls else cells(maps[layer].mean(1)) for layer in read_layers]
    with torch.no_grad():
        packed = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
        states = pair.stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    read = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    encoded = torch.cat([cells(states[layer]) for layer in read], dim=-1)
    projected = features_of_cells(layout, packed[0])
    expected = {
        "hivtp": lambda: select_hivtp(sum(received) / 2, valid, settings),
        "hiprune": lambda: select_hiprune(*received, valid, settings),
        "cls_attention": lambda: select_cls_attention(cells(maps[read_layers[0]][:, 0]), valid, settings),
        "gprune": lambda: select_gprune(packed, [layout], settings),
        "divprune": lambda: select_divprune(packed, [layout], settings),
        "scope": lambda: select_scope(encoded, saliency[0], valid, settings),
        "dpp": lambda: select_dpp(projected, valid, settings),
        "mmtok": lambda: select_mmtok(encoded, valid, settings),
        "id_selection": lambda: select_id_selection(projected, saliency[0], valid, settings),
        "mmr": lambda: select_mmr(projected, saliency[0], valid, settings),
        "spread": lambda: select_spread(
            sum(received) / 2 if received else distance_from_mean(projected.flatten(1, 2), valid.flatten(1)).view_as(valid),
            valid,
            settings,
        ),
        "random": lambda: select_random(list(range(layout.num_views)), valid, settings),
        "uniform": lambda: select_uniform(valid, settings),
    }[pruning["method"]]()
    assert torch.equal(features(pair, inputs).kept_indices[0], layout.kept_indices(expected))


@pytest.mark.parametrize(
    ("pruning", "vision_feature_layer", "named"),
    [
        ({"method": "hiprune", "object_layer": 10}, None, ["object_layer", "given: 10", "0 to 9"]),
        ({"method": "hiprune", "deep_layer": 11}, None, ["deep_layer", "given: 11", "0 to 9"]),
        ({"method": "cls_attention", "layer": 10}, None, ["`layer` (given: 10)", "0 to 9"]),
        ({"method": "cls_attention"}, 0, ["`layer` (given: None)", "0 to 9"]),
        ({"method": "scope", "layer": 10}, None, ["`layer` (given: 10)", "0 to 9"]),
        ({"method": "mmr"}, 0, ["`layer` (given: None)", "0 to 9"]),
    ],
    ids=str,
)
def test_layers_beyond_the_tower(pruning, vision_feature_layer, named):
    with pytest.raises(ValueError, match="the vision tower has 10 layers") as refused:
        twins(pruning, vision_feature_layer=vision_feature_layer)
    for words in named:
        assert words in str(refused.value)


def test_methods_choose_differently(next_pair):
    kept = {}
    for method in TESTED:
        if not METHODS[method].keeps_everything:
            pair = prune_by(next_pair, method=method, retention_ratio=0.3, **TESTED[method].small)
            kept[method] = tuple(features(pair, batch(pair)).kept_indices[1].tolist())
    assert len(set(kept.values())) == len(kept)


@pytest.mark.parametrize("method", TESTED)
def test_scoring_reads_nothing_that_is_not_needed(next_pair, method, monkeypatch):
    """Methods that do not look at attention leave the tower alone, and so does a ratio of 1."""
    calls = []
    tap = next_pair.pruned.model._received_attention_tap
    monkeypatch.setattr(
        tap, "call", lambda stock, collector: calls.extend(collector.layers) or type(tap).call(tap, stock, collector)
    )
    pair = prune_by(next_pair, method=method, retention_ratio=ratios_of(method)[-1], **TESTED[method].small)
    features(pair, batch(pair))
    reads = METHODS[method].reads(pair.pruned.config.pruning_config)[0]
    assert bool(calls) == bool(reads - {Evidence.FEATURES, Evidence.ENCODED})
    calls.clear()
    prune_by(pair, method=method, retention_ratio=1, **TESTED[method].small)
    features(pair, batch(pair))
    assert not calls
