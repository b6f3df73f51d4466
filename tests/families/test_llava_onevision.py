"""LLaVA-OneVision's images: counts against stock's processor and model, resampled scores, several images in a prompt, and
answers against stock given the pruned sequence."""

import copy
import random
import threading

import numpy as np
import pytest
import torch

from examples.tiny_onevision_checkpoint import onevision_config
from hivtp_hf import StitchedViews, VisualTokenPruningConfig
from hivtp_hf.families.llava_onevision_layout import llava_onevision_layout, most_tiles_of
from hivtp_hf.methods.vflowopt import merge_vflowopt
from hivtp_hf.pruning.compat import cache_argument, cache_of, prefills_images_in_chunks
from hivtp_hf.pruning.evidence import methods_of
from hivtp_hf.pruning.registry import METHODS
from nightly import mostly_nightly
from oracle import oracle_inputs
from tiny_models import image_inputs, photo
from tiny_onevision import ENTRY, FAMILY, SMALL, StockWithoutVideos, onevision_parts, onevision_twins

METHODS_THAT_CAN = methods_of(ENTRY.provides)
# Of these every kept token is one of stock's, and the language model sees all of them in all layers.
WITHOUT_AVERAGES = [method for method in METHODS_THAT_CAN if not METHODS[method].merges]
RATIO = {"retention_ratio": 0.4}
# Sizes of images by prompt: alone with few and with many (resampled) crops, narrow, several in a prompt, and a batch of all.
PROMPTS = {
    "few crops": [[(60, 110)]],
    "resampled": [[(170, 165)]],
    "narrow": [[(9, 170)]],
    "several": [[(60, 110), (170, 165)]],
    "batch": [[(60, 110)], [(170, 165), (50, 90)], [], [(120, 100)]],
}


@pytest.fixture(scope="module")
def pair():
    return onevision_twins()


@pytest.fixture(autouse=True)
def start_over(request):
    """Settings are changed on the models that tests share."""
    if "pair" in request.fixturenames:
        use(request.getfixturevalue("pair"), RATIO)


def use(pair, pruning):
    pair.processor.pruning_config = pair.pruned.config.pruning_config = pruning


def own_settings(method, ratio=0.4):
    budget = {} if METHODS[method].keeps_everything else {"retention_ratio": ratio}
    return {"method": method, **budget}


def prepared(processor, prompts, **options):
    """Inputs for a batch of prompts of images of some sizes; images are nested, prompt by prompt."""
    images = [[photo(*size, seed=7 * row + number) for number, size in enumerate(sizes)] for row, sizes in enumerate(prompts)]
    text = ["USER: " + "<image>\n" * len(sizes) + "What is this? ASSISTANT:" for sizes in prompts]
    return processor(images=images, text=text, padding=True, return_tensors="pt", **options)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model, inputs, number=5, **options):
    given = inputs.get("input_ids")
    output = model.generate(**inputs, **{"max_new_tokens": number, "do_sample": False, **options})
    return output if given is None else output[:, given.shape[1] :]


# Counts.


def test_counts_over_random_sizes_equal_stocks():
    """Of true geometry: our layout, our processor's placeholders, stock's processor, and what stock's model packs."""
    config = onevision_config()
    parts = onevision_parts(config)
    stock = StockWithoutVideos(**{**parts, "video_processor": None})
    ours = FAMILY.processor(**parts, pruning_config={"method": "none"})
    with torch.device("meta"):
        model = FAMILY.stock_base(config)
    draw = random.Random(0)
    sizes = [(draw.randint(1, 40), draw.randint(1, 5000)) for _ in range(300)]
    sizes += [(draw.randint(1, 5000), draw.randint(1, 40)) for _ in range(300)]
    sizes += [(draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(1400)]
    resampled = 0
    for number, (height, width) in enumerate(sizes):
        layout = ours.token_layout(height, width)
        tile = np.broadcast_to(np.float32(0), (1, 3, 384, 384))
        inputs = {"pixel_values": [tile], "image_sizes": [[height, width]], "batch_num_images": [1]}
        placeholders = len(stock.replace_image_token(inputs, 0)) // len("<image>")
        assert layout.num_stock == placeholders, (height, width)
        assert ours.replace_image_token(inputs, 0) == "<image>" * layout.num_retained
        resampled += bool(layout.parts[1].resampled_from)
        if number % 4 == 0:  # half of a second for all
            tiles = torch.empty(layout.num_tiles, 729, 1, device="meta")
            (packed,), _ = model.pack_image_features(
                [tiles], [[height, width]], image_newline=torch.empty(1, device="meta"), vision_aspect_ratio="anyres_max_9"
            )
            assert len(packed) == layout.num_stock, (height, width)
    assert 100 < resampled < 1900


@pytest.mark.parametrize("method", METHODS_THAT_CAN)
def test_placeholders_are_features(pair, method):
    """Under every method, for images alone, resampled, narrow, and several in a prompt."""
    use(pair, own_settings(method))
    for prompts in PROMPTS.values():
        inputs = prepared(pair.processor, prompts)
        features = pair.pruned.get_image_features(**image_inputs(inputs)).pooler_output
        found = (inputs["input_ids"] == pair.pruned.config.image_token_id).sum(1).tolist()
        of_images = iter(map(len, features))
        assert found == [sum(next(of_images) for _ in sizes) for sizes in prompts]


def test_several_images_in_a_prompt_get_no_crops(pair):
    use(pair, {"method": "none"})
    inputs = prepared(pair.processor, PROMPTS["batch"])
    counts = [len(features) for features in pair.pruned.get_image_features(**image_inputs(inputs)).pooler_output]
    alone = [pair.processor.token_layout(*size).num_stock for size in ((60, 110), (120, 100))]
    assert counts == [alone[0], 65, 65, alone[1]]
    assert inputs["batch_num_images"].tolist() == [1, 2, 1]


def test_inputs_at_a_ratio_of_one_are_stocks(pair):
    use(pair, {"retention_ratio": 1})
    for prompts in PROMPTS.values():
        ours, stocks = (prepared(processor, prompts) for processor in (pair.processor, pair.stock_processor))
        assert list(ours) == list(stocks)
        assert all(torch.equal(ours[name], stocks[name]) for name in stocks)


def test_a_rest_of_six_pixels_lies_beyond_the_cells():
    config = onevision_config()
    processor = FAMILY.processor(**onevision_parts(config), pruning_config={"method": "none"})
    layout = processor.token_layout(768, 1152)  # tiles are shown pixel by pixel
    assert layout.view_shapes == ((27, 27),) * 7
    boxes = layout.pixel_boxes(layout.cell_positions)[729:].view(54, 81, 4)
    assert boxes[0, 0].tolist() == [0, 0, 14, 14]
    assert boxes[26, 26].tolist() == [364, 364, 378, 378]
    assert boxes[27, 27].tolist() == [384, 384, 398, 398]
    beside_others = processor.family.processor_layout(processor, 384, 768, processor.pruning_config, alone=False)
    # Padded to 768 x 768, so that 27 cells see 756 of these pixels, the first 192 above the image.
    assert (beside_others.num_stock, beside_others.num_newlines) == (730, 1)
    assert beside_others.pixel_boxes(torch.tensor([7 * 27])).tolist() == [[0, 4, 28, 32]]


# Scores.


def test_scores_are_packed_as_stock_packs_a_map(pair):
    """One channel through stock's packing is what stock's un-padding and resampling make of it."""
    generator = torch.Generator().manual_seed(0)
    config = pair.stock.config
    for height, width in ((170, 165), (60, 110), (9, 170), (174, 174)):
        layout = pair.pruned.model.token_layout(height, width)
        tiles = torch.rand(layout.num_tiles, 64, generator=generator)
        cells = ENTRY.cell_scores(pair.pruned.model, [tiles], [layout])
        (packed,), _ = pair.stock.model.pack_image_features(
            [tiles[..., None]], [[height, width]], image_newline=None, vision_aspect_ratio=config.vision_aspect_ratio
        )
        unpacked = layout.packed(cells, -1, -1)[layout.cell_positions]
        torch.testing.assert_close(unpacked, packed[:, 0], atol=0, rtol=0)


def test_cells_of_resampled_crops_are_those_of_the_result(pair):
    layout = pair.processor.token_layout(174, 174)
    assert layout.view_shapes == ((8, 8), (16, 16))
    assert layout.num_tiles == 10
    assert layout.num_stock == 64 + 16 * 17
    # 24 x 24 cells of three tiles a side become 16 x 16: one of them shows an eleventh of the image, less the rest of a tile.
    (box,) = layout.pixel_boxes(torch.tensor([64])).tolist()
    assert box == pytest.approx([0, 0, (116 + 56) / 16, (116 + 56) / 16])


def test_each_piece_is_resampled_by_itself():
    seen = StitchedViews(3, 3)
    pooled = StitchedViews(4, 2, resampled_from=(seen, seen))
    values = torch.arange(18.0)
    first, second = pooled.from_tower(values).split(4)
    expected = torch.nn.functional.interpolate(values[:9].view(1, 1, 3, 3), (2, 2), mode="bilinear").flatten()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected + 9)


# Answers.


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("method", mostly_nightly(WITHOUT_AVERAGES, lambda method: method in ("hivtp", "gprune")))
def test_logits_equal_the_oracle(pair, method, name):
    use(pair, own_settings(method))
    inputs = prepared(pair.processor, PROMPTS[name])
    is_token = inputs["attention_mask"].bool()
    expected = logits(pair.stock, oracle_inputs(pair, inputs))[is_token]
    torch.testing.assert_close(logits(pair.pruned, inputs)[is_token], expected, atol=2e-5, rtol=2e-5)


def test_a_ratio_of_one_is_stock(pair):
    use(pair, {"retention_ratio": 1})
    inputs = prepared(pair.processor, PROMPTS["batch"])
    assert torch.equal(logits(pair.pruned, inputs), logits(pair.stock, inputs))
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        assert torch.equal(greedy(pair.pruned, inputs, **options), greedy(pair.stock, inputs, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=["greedy", "beams", "static", "no cache", "look-up"],
)
@pytest.mark.parametrize("name", ["several", "batch"])
def test_generation_equals_the_oracle(pair, name, options):
    if "prompt_lookup_num_tokens" in options:
        name = "resampled"  # it takes one row
    inputs = prepared(pair.processor, PROMPTS[name])
    # Look-up proposes image tokens of the ids, which stock's oracle has none of.
    expected = {key: value for key, value in options.items() if key != "prompt_lookup_num_tokens"}
    assert torch.equal(greedy(pair.pruned, inputs, **options), greedy(pair.stock, oracle_inputs(pair, inputs), **expected))


@pytest.mark.skipif(not prefills_images_in_chunks(), reason="this release drops images from a prefill in chunks")
def test_prefill_in_chunks(pair):
    inputs = prepared(pair.processor, PROMPTS["several"])
    assert torch.equal(greedy(pair.pruned, inputs, prefill_chunk_size=50), greedy(pair.pruned, inputs))


def test_a_batch_equals_single_runs(pair):
    prompts = PROMPTS["batch"]
    images = [[photo(*size, seed=7 * row + number) for number, size in enumerate(sizes)] for row, sizes in enumerate(prompts)]
    together = greedy(pair.pruned, prepared(pair.processor, prompts))
    for row, (of_row, sizes) in enumerate(zip(images, prompts, strict=True)):
        text = "USER: " + "<image>\n" * len(sizes) + "What is this? ASSISTANT:"
        alone = pair.processor(images=[of_row] if of_row else None, text=text, return_tensors="pt")
        assert torch.equal(greedy(pair.pruned, alone)[0], together[row])


def test_ratios_of_images_and_budgets(pair):
    prompts = PROMPTS["batch"]
    inputs = prepared(pair.processor, prompts, retention_ratio=[0.5, 0.2, 1.0, 0.3])
    counts = [
        len(features)
        for features in pair.pruned.get_image_features(
            **image_inputs(inputs), retention_ratio=inputs["retention_ratio"]
        ).pooler_output
    ]
    family, processor = ENTRY, pair.processor
    wanted = [
        family.processor_layout(processor, *size, processor.pruning_config.replace(retention_ratio=ratio), alone=alone)
        for size, ratio, alone in (
            ((60, 110), 0.5, True),
            ((170, 165), 0.2, False),
            ((50, 90), 1.0, False),
            ((120, 100), 0.3, True),
        )
    ]
    assert counts == [layout.num_retained for layout in wanted]
    assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, oracle_inputs(pair, inputs)))
    for budget in (40, 70, 200):
        inputs = prepared(pair.processor, prompts, token_budget=budget)
        kept = pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=inputs["retention_ratio"])
        assert max(map(len, kept.pooler_output)) <= budget
        logits(pair.pruned, inputs)


def test_a_later_turn_with_another_image(pair):
    first = prepared(pair.processor, [[(60, 110)]])
    second = prepared(pair.processor, [[(170, 165)]])
    returned = pair.pruned.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat((returned.sequences, second["input_ids"]), dim=1)
    given = {**image_inputs(second), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = cache_argument(FAMILY.stock_model.forward)
    continued = pair.pruned.generate(**given, **{name: cache_of(returned)}, max_new_tokens=4, do_sample=False)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{key: torch.cat((padded(first[key], second[key]), second[key])) for key in image_inputs(second)},
    }
    assert torch.equal(continued, pair.pruned.generate(**whole, max_new_tokens=4, do_sample=False))


def padded(pixels, like):
    """Pixels with as many tiles as others."""
    return pixels if pixels.ndim < 5 else torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, like.shape[1] - pixels.shape[1]))


def test_training_gets_the_oracles_gradients(pair):
    inputs = prepared(pair.processor, PROMPTS["several"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    given = oracle_inputs(pair, inputs)
    losses = []
    for model, arguments in ((pair.pruned, inputs), (pair.stock, given)):
        model.zero_grad()
        loss = model(**arguments, labels=labels).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    parameters = [dict(model.model.language_model.named_parameters()) for model in (pair.pruned, pair.stock)]
    for name, parameter in parameters[0].items():
        if "embed_tokens" not in name:
            torch.testing.assert_close(parameter.grad, parameters[1][name].grad, atol=1e-5, rtol=1e-4)
    assert next(pair.pruned.model.vision_tower.parameters()).grad.abs().sum() > 0
    assert pair.pruned.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    for model in (pair.pruned, pair.stock):
        model.zero_grad()


def test_copies_threads_and_bfloat16(pair):
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    expected = greedy(pair.pruned, inputs)
    assert torch.equal(greedy(copy.deepcopy(pair.pruned), inputs), expected)
    found: dict[int, torch.Tensor] = {}
    others = [prepared(pair.processor, PROMPTS[name]) for name in ("resampled", "several")]
    alone = [greedy(pair.pruned, other) for other in others]

    def run(number):
        found[number] = greedy(pair.pruned, others[number % 2])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number % 2]) for number in range(4))
    half = copy.deepcopy(pair.pruned).to(torch.bfloat16)
    assert torch.isfinite(logits(half, inputs.to(torch.bfloat16)).float()).all()


@pytest.mark.nightly
def test_compiled(pair):
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    compiled = torch.compile(pair.pruned, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(pair.pruned, inputs), atol=1e-5, rtol=1e-5)


def test_dispatched_over_devices_with_hooks(pair):
    from accelerate import dispatch_model

    model = copy.deepcopy(pair.pruned)
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(greedy(dispatched, inputs), greedy(pair.pruned, inputs))


# What every family gets from the mixins.


def test_scores_equal_stocks_own_maps(pair):
    """Received attention is the mean over heads and queries of eager's maps, resampled where stock resamples features."""
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    look = pair.pruned.look(inputs, layers=[2, 7])
    eager = copy.deepcopy(pair.stock)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager.model.vision_tower(inputs["pixel_values"][0], output_attentions=True).attentions
    layout = pair.processor.token_layout(170, 165)
    for layer in (2, 7):
        received = maps[layer].mean(1).mean(1) * maps[layer].shape[-1]
        (packed,), _ = pair.stock.model.pack_image_features(
            [received[..., None]], [[170, 165]], image_newline=None, vision_aspect_ratio="anyres_max_4"
        )
        found = layout.packed(look.received[layer], -1, -1)[layout.cell_positions]
        torch.testing.assert_close(found / found.sum(), packed[:, 0] / packed.sum(), atol=1e-6, rtol=1e-4)


def test_vflowopt_ranks_by_rows_packed_as_stock_packs_a_map(pair):
    """What the sinks of every tile attend to, tile by tile, through stock's packing; averages of what is dropped."""
    use(pair, {"method": "vflowopt", "retention_ratio": 0.25, "sink_threshold": 1.2, "recycling_cell_side": 3})
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    look = pair.pruned.look(inputs)
    eager = copy.deepcopy(pair.stock)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attention = eager.model.vision_tower(inputs["pixel_values"][0], output_attentions=True).attentions[-1].mean(1)
        output = pair.pruned.get_image_features(**image_inputs(inputs))
        (stock,) = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
    received = attention.mean(1)
    sinks = received > 1.2 * received.mean(1, keepdim=True)
    assert sinks.any(1).all()
    importance = torch.stack([of_tile[chosen].mean(0) for of_tile, chosen in zip(attention, sinks, strict=True)])
    (packed,), _ = pair.stock.model.pack_image_features(
        [importance[..., None]], [[170, 165]], image_newline=None, vision_aspect_ratio="anyres_max_4"
    )
    layout = pair.processor.token_layout(170, 165)
    found = layout.packed(look.importance(), -1, -1)[layout.cell_positions]
    torch.testing.assert_close(found, packed[:, 0], atol=1e-6, rtol=1e-4)
    merged = merge_vflowopt(look.importance(), layout, layout.pruning)
    assert torch.equal(output.kept_indices[0], merged.kept_indices)
    assert len(merged.kept_indices) == layout.num_retained
    assert merged.is_average.any()
    (features,) = output.pooler_output
    assert torch.equal(features[~merged.is_average], stock[merged.kept_indices][~merged.is_average])
    assert not torch.equal(features[merged.is_average], stock[merged.kept_indices][merged.is_average])
    with pytest.raises(ValueError, match=r"reads .* the vision tower has no"):
        onevision_twins({"method": "vflowopt", "entropy_weight": 0.5})


@pytest.mark.parametrize("name", ["batch", "several"])
def test_vflowopt_generates_with_its_stages(pair, name):
    use(pair, {"method": "vflowopt", "retention_ratio": 0.3})
    together = greedy(pair.pruned, prepared(pair.processor, PROMPTS[name]))
    alone = prepared(pair.processor, PROMPTS[name][:1])
    assert torch.equal(greedy(pair.pruned, alone)[0], together[0])


def test_stages_weights_and_positions_run_and_matter(pair):
    inputs = prepared(pair.processor, PROMPTS["batch"])
    plain = logits(pair.pruned, inputs)
    for extra in ({"token_weights": "cluster_size"}, {"positions": "original"}, {"stages": [[1, 0.5]]}):
        use(pair, {**RATIO, **extra})
        marked = logits(pair.pruned, inputs)
        assert torch.isfinite(marked).all()
        assert not torch.allclose(marked, plain, atol=1e-3)
        # A batch still equals single runs.
        generated = greedy(pair.pruned, inputs)
        alone = prepared(pair.processor, PROMPTS["batch"][:1])
        assert torch.equal(greedy(pair.pruned, alone)[0], generated[0])


def test_original_positions_are_those_of_the_unpruned_prompt(pair):
    use(pair, {**RATIO, "positions": "original"})
    inputs = prepared(pair.processor, PROMPTS["resampled"])
    given = oracle_inputs(pair, inputs)
    (kept,) = pair.pruned.get_image_features(**image_inputs(inputs)).kept_indices
    stock = pair.processor.token_layout(170, 165).num_stock
    first, last = (inputs["input_ids"][0] == 3).nonzero()[[0, -1], 0].tolist()
    behind = inputs["input_ids"].shape[1] - last - 1
    positions = torch.cat((torch.arange(first), first + kept, first + stock + torch.arange(behind)))
    expected = logits(pair.stock, {**given, "position_ids": positions[None]})
    torch.testing.assert_close(logits(pair.pruned, inputs), expected, atol=2e-5, rtol=2e-5)


def test_a_published_selection_with_surplus_placeholders(pair):
    use(pair, {"method": "hivtp", "exact_count": False})
    inputs = prepared(pair.processor, PROMPTS["batch"])
    features = pair.pruned.get_image_features(**image_inputs(inputs))
    assert any(len(kept) < len(of_image) for kept, of_image in zip(features.kept_indices, features.pooler_output, strict=True))
    together = greedy(pair.pruned, inputs)
    assert torch.equal(greedy(pair.pruned, prepared(pair.processor, PROMPTS["batch"][:1]))[0], together[0])


def test_another_limit_of_tiles_in_a_call(pair):
    use(pair, {"retention_ratio": 1})
    inputs = image_inputs(prepared(pair.processor, PROMPTS["resampled"]))
    for limit in ("anyres_max_1", "anyres_max_9"):
        (ours,), (stocks,) = (
            model.get_image_features(**inputs, vision_aspect_ratio=limit).pooler_output for model in (pair.pruned, pair.stock)
        )
        assert torch.equal(ours, stocks)


def test_a_tower_with_a_class_token():
    pair = onevision_twins({"method": "cls_attention", "retention_ratio": 0.4}, vision_type="clip_vision_model")
    for name in ("resampled", "several"):
        inputs = prepared(pair.processor, PROMPTS[name])
        expected = logits(pair.stock, oracle_inputs(pair, inputs))
        torch.testing.assert_close(logits(pair.pruned, inputs), expected, atol=2e-5, rtol=2e-5)


def test_engines_count_what_the_processor_writes(pair):
    sizes = [(60, 110), (170, 165), (9, 170)]
    counted = pair.processor._get_num_multimodal_tokens(image_sizes=sizes)
    written = [int((prepared(pair.processor, [[size]])["input_ids"] == 3).sum()) for size in sizes]
    assert counted.num_image_tokens == written
    assert counted.num_image_patches == [1, 1, 1]


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_num_images": torch.tensor([1])}, r"`batch_num_images` is \[1\] .* 1 images in all, and there are 2"),
        ({"batch_num_images": torch.tensor([1, 1])}, "`pixel_values` holds 2 images of 1 tiles"),
        ({"image_sizes": None}, "without `image_sizes`"),
        ({"vision_aspect_ratio": "anyres", "batch_num_images": None}, "`vision_aspect_ratio` is 'anyres'"),
        ({"vision_feature_select_strategy": "default"}, "has no class token to drop"),
    ],
)
def test_inputs_that_do_not_fit(pair, change, message):
    inputs = prepared(pair.processor, PROMPTS["several"])
    with pytest.raises(ValueError, match=message):
        pair.pruned(**{**inputs, **change})


def test_settings_that_do_not_fit(pair):
    with pytest.raises(ValueError, match=r"`num_image_tokens` is 60 .* no square"):
        FAMILY.processor(**{**onevision_parts(pair.stock.config), "num_image_tokens": 60}).token_layout(60, 60)
    for wrong in ("anyres_max_0", "anyres_max_", "pad", 9, None):
        with pytest.raises(ValueError, match="must be 'anyres_max_' and a number"):
            most_tiles_of(wrong)
    settings = VisualTokenPruningConfig("none")
    with pytest.raises(ValueError, match="would resample to none"):
        llava_onevision_layout(1, 900, True, settings, 10, 10, ((10, 900),), "anyres_max_9")
    with pytest.raises(ValueError, match="has no class token"):
        onevision_twins({"method": "cls_attention"})
    inputs = prepared(pair.stock_processor, PROMPTS["few crops"])
    with pytest.raises(ValueError, match="as many placeholders as the unpruned model takes"):
        pair.pruned(**inputs)


def test_tiles_are_small(pair):
    """What the other tests rely on: tiles with a rest, some images resampled, some not."""
    assert SMALL["tile_size"] % SMALL["patch_size"] == 2
    few, many = (pair.processor.token_layout(*size) for size in ((60, 110), (170, 165)))
    assert not few.parts[1].resampled_from
    assert many.parts[1].resampled_from
