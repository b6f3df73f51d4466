"""VisionZip in whole models: what it reads, against stock's own attention, keys and hidden states; and its averages."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import visionzip_reference as plain
from families import FAMILIES
from hivtp_hf.pruning.encoder_layers import find_layers
from hivtp_hf.pruning.features import choose_and_merge, cut_and_merge_features
from places_reference import Placed
from tiny_models import SIGLIP, image_inputs, photo, twins
from tiny_onevision import onevision_twins
from tiny_qwen import images_of, qwen_twins

OWN = {"method": "visionzip", "retention_ratio": 0.4, "contextual_share": 0.3}
SIZES = [(60, 100), (200, 50), (112, 112)]


def attention_inputs(model, call):
    """What reaches the attention interface in a call: (module, queries, keys, scaling) of every layer or segment."""
    found = []

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        found.append((module, query.float(), key.float(), scaling))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy_attention", spy)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("spy_attention")
        with torch.no_grad():
            call()
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping["spy_attention"]
    return found


def hold_image_against_loops(output, image, layout, packed, saliency, keys, rows_of_view, project, adds):
    """One image of an output against what plain loops make of stock's own tensors.

    Args:
        output: of `get_image_features`.
        image: its index.
        layout: of the image.
        packed: stock's features, (num_stock, hidden).
        saliency, keys: of its cells, (cells,) and (cells, size).
        rows_of_view: of a view what is averaged, (cells, width).
        project: makes features of that.
        adds: whether averages are added to targets.
    """
    expected = {position: (packed[position], False) for position in layout.is_no_cell.nonzero()[:, 0].tolist()}
    places = layout.by_view(layout.token_of_cell)
    parts = [layout.by_view(of) for of in (saliency, layout.valid)]
    first = 0
    for view, (of_view, valid) in enumerate(zip(*parts, strict=True)):
        keys_of_view = keys[first : first + of_view.numel()]
        first += of_view.numel()
        kept = plain.rounded(int(valid.sum()), layout.pruning.retention_ratio)
        held, _ = plain.holders(of_view.flatten().numpy(), keys_of_view.numpy(), valid.flatten().numpy(), kept, 0.3)
        for cell, others in held.items():
            position = int(places[view].flatten()[cell])
            row = project(plain.average(rows_of_view(view), cell, others, adds)) if others else packed[position]
            expected[position] = (row, bool(others))
    kept = output.kept_indices[image].tolist()
    assert kept == sorted(expected)
    assert output.is_average[image].tolist() == [expected[position][1] for position in kept]
    for row, position in zip(output.pooler_output[image], kept, strict=True):
        of_row, is_average = expected[position]
        if is_average:
            torch.testing.assert_close(row, of_row, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(row, of_row)
    return int(output.is_average[image].sum())


@pytest.mark.parametrize("tower", [{}, SIGLIP], ids=["CLIP", "SigLIP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_chain_by_hand(family, tower):
    """Of CLIP an average is added to its target, of SigLIP it holds the target too; both before the projector."""
    pair = twins(OWN, family=family, **tower)
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = pair.processor(images=images, text="<image>, <image> and <image>", return_tensors="pt")
    layouts = [pair.processor.token_layout(*size) for size in SIZES]
    with torch.no_grad():
        output = pair.pruned.get_image_features(**image_inputs(inputs))
        stock = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
    vision, layer = pair.stock.model.vision_tower, pair.pruned.model.encoder_facts().feature_layer
    has_class_token, averages = int(not tower), 0
    for image, layout in enumerate(layouts):
        pixels = inputs["pixel_values"][image].view(-1, 3, 56, 56)[: layout.num_views]
        states = []
        found = attention_inputs(
            vision, lambda pixels=pixels, states=states: states.extend(vision(pixels, output_hidden_states=True).hidden_states)
        )
        _, query, key, scaling = found[layer]
        attention = (query @ key.transpose(-1, -2) * scaling).softmax(-1).mean(1)
        saliency = attention[:, 0, 1:] if has_class_token else attention.mean(1)
        keys = key.mean(1)[:, has_class_token:].flatten(0, 1)
        encoded = states[pair.stock.config.vision_feature_layer][:, has_class_token:]
        averages += hold_image_against_loops(
            output,
            image,
            layout,
            stock[image],
            saliency.flatten(),
            keys,
            encoded.__getitem__,
            lambda row: pair.stock.model.multi_modal_projector(row[None])[0].detach(),
            adds=bool(has_class_token),
        )
    assert averages > 10
    # A batch equals its images, and a look the model's own pass.
    look = pair.pruned.look(inputs)
    features, kept = look.kept()
    assert all(map(torch.equal, kept, output.kept_indices))
    for ours, theirs in zip(features, output.pooler_output, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for image, size in enumerate(SIZES):
        single = pair.processor(images=photo(*size, image), text="<image>", return_tensors="pt")
        with torch.no_grad():
            alone = pair.pruned.get_image_features(**image_inputs(single))
        assert torch.equal(alone.kept_indices[0], output.kept_indices[image])
        torch.testing.assert_close(alone.pooler_output[0], output.pooler_output[image], atol=1e-5, rtol=1e-4)


def test_averages_behind_the_projector_would_be_others():
    """The projector is not linear, which is why averages are made of what enters it."""
    pair = twins(OWN)
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    evidence = pair.pruned.look(inputs).evidence()
    with torch.no_grad():
        kept, merged = choose_and_merge(evidence)
        (before,), (behind,) = (
            cut_and_merge_features(of, kept, merged) for of in (evidence, evidence._replace(projector=None))
        )
    is_average = merged[0].is_average
    assert torch.equal(before[~is_average], behind[~is_average])
    far = (before - behind)[is_average].norm(dim=1) / before[is_average].norm(dim=1)
    assert float(far.min()) > 0.05


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def test_a_packed_tower_by_hand(family):
    """Received attention of the last block, keys as they meet queries, the mean over merged patches; averages of features."""
    pair = qwen_twins(family, OWN)
    grids = [(8, 12), (24, 20), (4, 4)]
    images = images_of(grids, pair.pruned)
    with torch.no_grad():
        output = pair.pruned.get_image_features(**images)
        stock = pair.stock.get_image_features(**images)
        layouts = pair.pruned.look(images).layouts()
    model, averages = pair.stock.model, 0
    found = attention_inputs(model.visual, lambda: model.get_image_features(**images))
    last = [segment for segment in found if segment[0] is model.visual.blocks[-1].attn]
    for image, ((height, width), (_, query, key, scaling)) in enumerate(zip(grids, last, strict=True)):
        received = (query @ key.transpose(-1, -2) * scaling).softmax(-1)[0].mean((0, 1)).view(-1, 4).mean(1)
        keys = key[0].mean(0).unflatten(0, (-1, 4)).mean(1)
        if family == "qwen2_5_vl":  # the tower has cells in the order of its windows
            cells = [(row, column) for row in range(height // 2) for column in range(width // 2)]
            in_windows = sorted(cells, key=lambda cell: (cell[0] // 4, cell[1] // 4, *cell))
            in_raster = [in_windows.index(cell) for cell in cells]
            received, keys = received[in_raster], keys[in_raster]
        layout = layouts[image]
        features = stock.pooler_output[image]
        averages += hold_image_against_loops(
            output, image, layout, features, received, keys, lambda view, rows=features: rows, lambda row: row, adds=False
        )
    assert averages > 10
    if family == "qwen3_vl":  # streams are averaged alike
        ours, theirs = output.deepstack_features[0], stock.deepstack_features[0]
        is_average = output.is_average[1]
        kept = output.kept_indices[1]
        assert torch.equal(ours[1][~is_average], theirs[1][kept][~is_average])
        assert not torch.isclose(ours[1][is_average], theirs[1][kept][is_average]).all(1).any()
    single = {name: images[name][: 8 * 12 if name == "pixel_values" else 1] for name in images}
    with torch.no_grad():
        assert torch.equal(pair.pruned.get_image_features(**single).kept_indices[0], output.kept_indices[0])


def test_resampled_cells_by_hand():
    """Attention and keys of tiles, packed as stock packs and resamples features; averages are of the features."""
    pair = onevision_twins(OWN)
    size = (170, 165)
    inputs = pair.processor(images=[[photo(*size)]], text=["<image>"], return_tensors="pt")
    layout = pair.processor.token_layout(*size)
    assert layout.parts[1].resampled_from
    with torch.no_grad():
        output = pair.pruned.get_image_features(**image_inputs(inputs))
        (stock,) = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
    vision = pair.stock.model.vision_tower
    found = attention_inputs(vision, lambda: vision(inputs["pixel_values"][0]))
    _, query, key, scaling = found[pair.pruned.model.encoder_facts().feature_layer]
    received = (query @ key.transpose(-1, -2) * scaling).softmax(-1).mean((1, 2))
    of_tiles = torch.cat((received[..., None], key.mean(1)), dim=-1)
    (packed,), _ = pair.stock.model.pack_image_features(
        [of_tiles], [list(size)], image_newline=None, vision_aspect_ratio=pair.stock.config.vision_aspect_ratio
    )
    # Without newlines these are the cells in the order in which they are packed, which is that of views here.
    assert layout.cell_numbers(layout.cell_positions).tolist() == list(range(layout.num_cells))
    features = stock[layout.cell_positions].split([rows * columns for rows, columns in layout.view_shapes])
    averages = hold_image_against_loops(
        output, 0, layout, stock, packed[:, 0], packed[:, 1:], features.__getitem__, lambda row: row, adds=False
    )
    assert averages > 10


def test_stages_drop_averages_first():
    """Contextual tokens rank last: what a stage leaves is what stock's layers make of dominant ones."""
    pair = twins({**OWN, "stages": [[1, 0.5]]})
    inputs = pair.processor(images=photo(60, 100), text="<image> what is it?", return_tensors="pt")
    with torch.no_grad():
        output = pair.pruned.get_image_features(**image_inputs(inputs))
        placed = Placed(pair, inputs)
        expected = placed.logits(inputs["input_ids"], inputs["attention_mask"])
        found = pair.pruned(**inputs).logits
    # At a share of 0.3 that is contextual, half of the tokens leave no average.
    assert bool((output.stages_survived[0][output.is_average[0]] == 0).all())
    is_left = placed.stages_of_columns > 1
    torch.testing.assert_close(found[is_left], expected[is_left], atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_averages():
    """Of what holds averages, by one weight of the projector and one of the encoder: as the difference of two losses.

    Averages are summed in float32, so the step must not be too small.
    """
    pair = twins(OWN)
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    model = pair.pruned.double()
    images = {**image_inputs(inputs), "pixel_values": inputs["pixel_values"].double()}

    def loss():
        output = model.get_image_features(**images)
        return output.pooler_output[0][output.is_average[0]].sin().sum()

    loss().backward()
    vision = model.model.vision_tower
    for weight in (model.model.multi_modal_projector.linear_1.weight, find_layers(vision, 10)[0].mlp.fc1.weight):
        place = weight.grad.abs().flatten().argmax()
        step, of_weight = 1e-3, weight.data.view(-1)
        with torch.no_grad():
            of_weight[place] += step
            above = loss()
            of_weight[place] -= 2 * step
            below = loss()
            of_weight[place] += step
        torch.testing.assert_close(weight.grad.flatten()[place], (above - below) / (2 * step), atol=2e-3, rtol=1e-2)
