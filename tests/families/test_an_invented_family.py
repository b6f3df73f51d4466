"""The contracts, held by a family of rectangles, a packed tower with windows, and two streams."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface

import hivtp_reference
from hivtp_hf.methods.divprune import select_divprune
from hivtp_hf.methods.dpp import select_dpp
from hivtp_hf.methods.gprune import select_gprune
from hivtp_hf.methods.hiprune import select_hiprune
from hivtp_hf.methods.id_selection import select_id_selection
from hivtp_hf.methods.mmr import select_mmr
from hivtp_hf.methods.mmtok import select_mmtok
from hivtp_hf.methods.random import select_random
from hivtp_hf.methods.scope import select_scope
from hivtp_hf.methods.spread import select_spread
from hivtp_hf.methods.uniform import select_uniform
from hivtp_hf.methods.vflowopt import merge_vflowopt, strategy_vflowopt
from hivtp_hf.methods.visionzip import select_visionzip
from hivtp_hf.pruning.evidence import methods_of
from hivtp_hf.pruning.registry import METHODS
from invented_family import (
    PATCH,
    HIVTPInventedConfig,
    HIVTPInventedModel,
    InventedConfig,
    InventedFamily,
    InventedModel,
    eager_attention_forward,
)

METHODS_THAT_CAN = methods_of(InventedFamily.provides)
SHAPES = [(1, 1), (8, 40), (5, 3), (1, 9), (5, 3), (7, 1)]


def packed_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """As flash attention is called: all sequences of a call at once, and where each ends."""
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([eager_attention_forward(module, *part, None, scaling)[0] for part in parts], dim=1), None


AttentionInterface.register("flash_attention_stand_in", packed_attention)


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    model = InventedModel(InventedConfig()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def pruned(stock):
    model = HIVTPInventedModel(HIVTPInventedConfig()).eval()
    model.load_state_dict(stock.state_dict())
    return model


def inputs(shapes=SHAPES, seed=0):
    grids = torch.tensor(shapes)
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(int(grids.prod(1).sum()), PATCH * PATCH, generator=generator), "grids": grids}


def prune(model, given, **pruning):
    model.config.pruning_config = pruning
    with torch.no_grad():
        return model.get_image_features(**given)


def alone(given, image):
    lengths = given["grids"].prod(1).tolist()
    return {"pixel_values": given["pixel_values"].split(lengths)[image], "grids": given["grids"][image, None]}


def settings_of(method, ratio=0.4):
    return {"method": method} if METHODS[method].keeps_everything else {"method": method, "retention_ratio": ratio}


def maps_of(stock, given):
    """Of every layer and image the attention, (heads, cells, cells), from what the layers project; full layers alone."""
    found, hooks = {}, []
    for layer, block in enumerate(stock.tower.blocks):
        hook = block.attention.qkv.register_forward_hook(
            lambda module, args, output, layer=layer: found.update({layer: output})
        )
        hooks.append(hook)
    with torch.no_grad():
        stock.get_image_features(**given)
    for hook in hooks:
        hook.remove()
    maps = {}
    for layer in (1, 3):
        images = found[layer].split(given["grids"].prod(1).tolist())
        query, key, _ = zip(*(image.view(len(image), 3, 4, 8).permute(1, 2, 0, 3) for image in images), strict=True)
        maps[layer] = [(q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) for q, k in zip(query, key, strict=True)]
    return maps


def keys_of(stock, given):
    """Of every image the keys of the last layer, heads averaged, (cells, size)."""
    found = []
    hook = stock.tower.blocks[3].attention.qkv.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        stock.get_image_features(**given)
    hook.remove()
    keys = found[0].view(len(found[0]), 3, 4, 8)[:, 1].mean(1)
    return keys.split(given["grids"].prod(1).tolist())


def received_of(stock, given, layer):
    return [
        of_image.mean((0, 1)).view(*shape) for of_image, shape in zip(maps_of(stock, given)[layer], given["grids"], strict=True)
    ]


def test_methods_that_can():
    assert [name for name in METHODS if name != "cls_attention"] == METHODS_THAT_CAN
    with pytest.raises(ValueError, match="'vflowopt' reads pixels, but the vision tower has no known scale of its pixels"):
        HIVTPInventedModel(HIVTPInventedConfig(pruning_config={"method": "vflowopt", "entropy_weight": 0.1}))
    with pytest.raises(ValueError, match="'cls_attention' reads what the class token attends to, but the vision tower has no"):
        HIVTPInventedModel(HIVTPInventedConfig(pruning_config={"method": "cls_attention"}))


@pytest.mark.parametrize("method", METHODS_THAT_CAN)
def test_counts_streams_and_neighbours(stock, pruned, method):
    given = inputs()
    with torch.no_grad():
        expected = stock.get_image_features(**given)
    output = prune(pruned, given, **settings_of(method))
    for image, (rows, columns) in enumerate(SHAPES):
        kept = output.kept_indices[image]
        assert len(kept) == pruned.token_layout(rows * PATCH, columns * PATCH).num_retained
        # Both streams are stock's own rows, except for averages.
        is_own = torch.ones_like(kept, dtype=torch.bool) if output.is_average is None else ~output.is_average[image]
        for found, of_stock in (
            (output.pooler_output[image], expected.pooler_output[image]),
            (output.deepstack_features[0][image], expected.deepstack_features[0][image]),
        ):
            assert torch.equal(found[is_own], of_stock[kept[is_own]])
        # A row of a batch does not depend on its neighbours.
        assert torch.equal(prune(pruned, alone(given, image), **settings_of(method)).kept_indices[0], kept)


@pytest.mark.parametrize("method", METHODS_THAT_CAN)
def test_a_ratio_of_one_is_stock(stock, pruned, method):
    given = inputs()
    with torch.no_grad():
        expected = stock.get_image_features(**given)
    output = prune(pruned, given, **settings_of(method, ratio=1))
    assert all(map(torch.equal, output.pooler_output, expected.pooler_output))
    assert all(map(torch.equal, output.deepstack_features[0], expected.deepstack_features[0]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_stand_in"])
def test_scores_equal_whole_maps(stock, pruned, implementation):
    model, given = copy.deepcopy(pruned), inputs()
    model.config._attn_implementation = implementation
    look = model.look(given, layers=[1, 3])
    for layer, scores in look.received.items():
        for of_image, expected, layout in zip(
            scores.split([rows * columns for rows, columns in SHAPES]),
            received_of(stock, given, layer),
            look.layouts({"method": "none"}),
            strict=True,
        ):
            torch.testing.assert_close(layout.by_view(of_image)[0], expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        expected = stock.get_image_features(**given).pooler_output
    for features, of_stock in zip(look.features, expected, strict=True):
        torch.testing.assert_close(features, of_stock, atol=1e-5, rtol=1e-5)


def kept_by(method, first, last, features, layout, pruning, last_map, keys):
    """The cells of one image that a method keeps, bool (1, rows, columns), from the scores of the two full layers."""
    if method == "vflowopt":
        importance = plain_importance(last_map, strategy_vflowopt(pruning).sink_threshold)
        kept = merge_vflowopt(importance, layout, layout.pruning).kept_indices
        return torch.zeros(layout.num_cells, dtype=torch.bool).index_fill(0, kept, True)
    valid = torch.ones(1, *first.shape, dtype=torch.bool)
    if method == "hivtp":
        return torch.from_numpy(hivtp_reference.select_view(((first + last) / 2).numpy(), valid[0].numpy(), pruning))
    if method == "hiprune":
        return select_hiprune(first[None], last[None], valid, pruning)
    if method == "gprune":
        return select_gprune([features], [layout], pruning)
    if method == "random":
        return select_random([0], valid, pruning)
    of_cells = features.view(1, *first.shape, -1)
    if method == "divprune":
        return select_divprune([features], [layout], pruning)
    if method in ("scope", "id_selection", "mmr"):
        select = {"scope": select_scope, "id_selection": select_id_selection, "mmr": select_mmr}[method]
        return select(of_cells, last[None], valid, pruning)
    if method in ("dpp", "mmtok"):
        return {"dpp": select_dpp, "mmtok": select_mmtok}[method](of_cells, valid, pruning)
    if method == "spread":
        return select_spread((first + last)[None] / 2, valid, pruning)
    if method == "visionzip":
        holders = select_visionzip(last[None], keys.view(1, *first.shape, -1), valid, pruning)
        return holders == torch.arange(layout.num_cells).view(first.shape)
    return select_uniform(valid, pruning) if method == "uniform" else valid


def plain_importance(maps, threshold):
    """What the sinks of one view attend to, from its attention (heads, cells, cells)."""
    attention = maps.mean(0)
    received = attention.mean(0)
    sinks = [cell for cell in range(len(received)) if received[cell] > threshold * received.mean()]
    return attention[sinks or [int(received.argmax())]].mean(0)


def test_averages_stand_in_both_streams(stock, pruned):
    """Sinks by their rows in a packed tower, and one average of the same cells in each stream."""
    given = inputs()
    own = {"method": "vflowopt", "retention_ratio": 0.3, "sink_threshold": 1.3, "recycling_cell_side": 2.5}
    output = prune(pruned, given, **own)
    with torch.no_grad():
        whole = stock.get_image_features(**given)
        importance = pruned.look(given).importance().split(given["grids"].prod(1).tolist())
    for image, (rows, columns) in enumerate(SHAPES):
        expected = plain_importance(maps_of(stock, given)[3][image], 1.3)
        torch.testing.assert_close(importance[image], expected, atol=1e-6, rtol=1e-5)
        merged = merge_vflowopt(expected, pruned.token_layout(rows * PATCH, columns * PATCH), own)
        assert torch.equal(output.kept_indices[image], merged.kept_indices)
        assert torch.equal(output.is_average[image], merged.is_average)
        for found, of_stock in (
            (output.pooler_output[image], whole.pooler_output[image]),
            (output.deepstack_features[0][image], whole.deepstack_features[0][image]),
        ):
            for place, (token, average) in enumerate(zip(merged.kept_indices, merged.source.tolist(), strict=True)):
                row = of_stock[token]
                if average < merged.num_averages:
                    of_average = slice(*merged.starts[average : average + 2])
                    members = merged.members[of_average][merged.weights[of_average] > 0]
                    weights = expected[members] / expected[members].sum()
                    row = (weights[:, None] * of_stock[members]).sum(0)
                torch.testing.assert_close(found[place], row, atol=1e-5, rtol=1e-5)
    assert sum(int(of_image.sum()) for of_image in output.is_average) > 10


SOME_SHAPES = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 12)) | st.sampled_from([(8, 40), (1, 1)]), min_size=1, max_size=4
)


# Always the same examples: scores that are equal but for rounding may rank either way.
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(SOME_SHAPES, st.sampled_from([1 / 9, 0.4, 0.75]), st.integers(0, 1000))
def test_kept_cells_equal_plain_references(stock, pruned, shapes, ratio, seed):
    given = inputs(shapes, seed)
    first, last = received_of(stock, given, 1), received_of(stock, given, 3)
    last_maps, keys = maps_of(stock, given)[3], keys_of(stock, given)
    with torch.no_grad():
        features = stock.get_image_features(**given).pooler_output
    for method in METHODS_THAT_CAN:
        output = prune(pruned, given, **settings_of(method, ratio))
        pruning = pruned.config.pruning_config
        for image, (rows, columns) in enumerate(shapes):
            layout = pruned.token_layout(rows * PATCH, columns * PATCH)
            of_image = (first[image], last[image], features[image], layout, pruning, last_maps[image], keys[image])
            expected = kept_by(method, *of_image)
            assert output.kept_indices[image].tolist() == expected.flatten().nonzero()[:, 0].tolist(), method


def test_layers_within_windows_are_refused():
    for pruning in (
        {"importance_layers": [1, 2]},
        {"importance_start_layer": 0, "importance_num_layers": 1},
        {"method": "hiprune", "object_layer": 2},
    ):
        with pytest.raises(ValueError, match=r"which attend within windows.*Layers over the whole image are \[1, 3\]. Change"):
            HIVTPInventedModel(HIVTPInventedConfig(pruning_config=pruning))
