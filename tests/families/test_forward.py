"""`forward` on every kind of input, tower, language model and precision: the logits are the oracle's."""

import contextlib
import itertools

import pytest
import torch

from families import FAMILIES
from nightly import mostly_nightly
from oracle import oracle_inputs
from tiny_models import LOW_RATIO, SIGLIP, TOWERS, greedy, photo, twins

# Rows of mixed lengths, image sizes and numbers of images, one of them without any.
TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>"]
SIZES = [(60, 100), (112, 112), (200, 50), (20, 20)]
ROW_OF_IMAGE = [0, 2, 2, 3]

MODELS = {
    **TOWERS,
    "LLaVA-NeXT, CLIP and Mistral": {"text_type": "mistral"},
    "LLaVA-NeXT, CLIP and Qwen2": {"text_type": "qwen2"},
    "LLaVA-NeXT, SigLIP and Qwen2": {**SIGLIP, "text_type": "qwen2"},
    "LLaVA-1.5, SigLIP and Qwen2": {"family": "llava", **SIGLIP, "text_type": "qwen2"},
    "LLaVA-NeXT, CLIP, three feature layers": {"vision_feature_layer": [-2, -5, 3]},
    "LLaVA-NeXT, SigLIP, two feature layers": {**SIGLIP, "vision_feature_layer": [-1, 4]},
    "LLaVA-1.5, CLIP, full, three feature layers": {**TOWERS["LLaVA-1.5, CLIP, full"], "vision_feature_layer": [-2, -5, 3]},
    "LLaVA-1.5, SigLIP, default, two feature layers": {
        **TOWERS["LLaVA-1.5, SigLIP, default"],
        "vision_feature_layer": [-1, 4],
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


@pytest.fixture(scope="module", params=MODELS)
def any_pair(request):
    return twins(LOW_RATIO, **MODELS[request.param])


def batch(pair, padding_side="left", images=None, **arguments):
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)] if images is None else images
    return pair.processor(images=images, text=TEXTS, padding=True, padding_side=padding_side, return_tensors="pt", **arguments)


def single(pair, row):
    images = [photo(*size, seed) for seed, size in enumerate(SIZES) if ROW_OF_IMAGE[seed] == row]
    return pair.processor(images=images or None, text=TEXTS[row], return_tensors="pt")


def logits(model, inputs, **arguments):
    with torch.no_grad():
        return model(**inputs, **arguments).logits


def assert_oracles_logits(pair, inputs, tolerance=1e-4, **feature_arguments):
    """Compares where there is a token: what is computed at a padded position means nothing."""
    got = logits(pair.pruned, inputs, **feature_arguments)
    expected = logits(pair.stock, oracle_inputs(pair, inputs, **feature_arguments))
    assert got.shape == expected.shape == (*inputs["input_ids"].shape, pair.stock.config.text_config.vocab_size)
    assert got.dtype == expected.dtype
    is_token = inputs["attention_mask"].bool()
    assert torch.isfinite(got[is_token]).all()
    torch.testing.assert_close(got[is_token], expected[is_token], atol=tolerance, rtol=0)
    return got


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_mixed_batch_gives_the_oracles_logits(any_pair, padding_side):
    inputs = batch(any_pair, padding_side)
    padded_at = 0 if padding_side == "left" else -1
    assert not inputs["attention_mask"][:, padded_at].all()
    got = assert_oracles_logits(any_pair, inputs)
    for row in range(len(TEXTS)):
        alone = single(any_pair, row)
        is_token = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got[row, is_token], logits(any_pair.pruned, alone)[0], atol=1e-4, rtol=0)


@pytest.mark.releases
def test_every_model_generates_as_the_oracle(any_pair):
    inputs = batch(any_pair)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = any_pair.stock.generate(**oracle_inputs(any_pair, inputs), **arguments)
    assert torch.equal(greedy(any_pair.pruned, inputs), expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_oracle_itself_is_stock_where_nothing_is_pruned(tower):
    pair = twins({"retention_ratio": 1}, **TOWERS[tower])
    inputs = batch(pair)
    assert_oracles_logits(pair, inputs)
    is_token = inputs["attention_mask"].bool()
    expected = logits(pair.stock, inputs)[is_token]
    torch.testing.assert_close(logits(pair.stock, oracle_inputs(pair, inputs))[is_token], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_logits_depend_on_every_image_in_its_own_row(pair, padding_side):
    """Else equal logits would prove nothing."""
    inputs = batch(pair, padding_side)
    before = logits(pair.pruned, inputs)
    for image, row in enumerate(ROW_OF_IMAGE):
        pixel_values = inputs["pixel_values"].clone()
        pixel_values[image] = pixel_values[image].flip(-1)
        changed = (logits(pair.pruned, {**inputs, "pixel_values": pixel_values}) - before).abs().amax(dim=(1, 2)) > 0.1
        assert changed.tolist() == [other == row for other in range(len(TEXTS))]


@pytest.mark.parametrize("layers", [-3, 5, [-3]], ids=str)
def test_the_feature_layer_may_come_with_the_call(pair, layers):
    inputs = batch(pair)
    got = assert_oracles_logits(pair, inputs, vision_feature_layer=layers)
    is_token = inputs["attention_mask"].bool()
    assert (got - logits(pair.pruned, inputs))[is_token].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_several_feature_layers_may_come_with_the_call(family):
    pair = twins(LOW_RATIO, vision_feature_layer=[-2, -5], family=family)
    assert_oracles_logits(pair, batch(pair), vision_feature_layer=[4, -1])


@pytest.mark.parametrize(("tower", "strategy"), [("CLIP", "full"), ("CLIP, full", "default"), ("SigLIP", "default")])
def test_the_feature_strategy_may_come_with_the_call(tower, strategy):
    """With inputs of a processor of that strategy. LLaVA-1.5 alone, as LLaVA-NeXT knows one strategy for every tower."""
    pair = twins(LOW_RATIO, **TOWERS[f"LLaVA-1.5, {tower}"])
    pair.processor.vision_feature_select_strategy = strategy
    assert_oracles_logits(pair, batch(pair), vision_feature_select_strategy=strategy)


# The oracle computes the same numbers by the same kernels, so that even half precision agrees bit for bit on the machines
# that were tried. What a kernel may do differently for another layout in memory is a rounding step: logits lie between -8
# and 8, where a step is 0.03 in bfloat16 and 0.004 in float16. Two are allowed. One wrong token changes logits by more.
PRECISIONS = {
    "float32": (torch.float32, None, 1e-4),
    "bfloat16": (torch.bfloat16, None, 2 * 2**-5),
    "float16": (torch.float16, None, 2 * 2**-8),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, 2 * 2**-5),
    "autocast to float16": (torch.float32, torch.float16, 2 * 2**-8),
}


@pytest.mark.parametrize(
    ("precision", "tower"),
    mostly_nightly(
        itertools.product(PRECISIONS, TOWERS), lambda precision, tower: precision == "float32" or tower.endswith(", CLIP")
    ),
)
def test_logits_are_the_oracles_in_every_precision(precision, tower):
    dtype, autocast_dtype, tolerance = PRECISIONS[precision]
    pair = twins(LOW_RATIO, **TOWERS[tower])
    for model in (pair.stock, pair.pruned):
        model.to(dtype)
    surroundings = torch.autocast("cpu", dtype=autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    for padding_side in ("left", "right"):
        inputs = batch(pair, padding_side).to(dtype)
        with surroundings:
            got = assert_oracles_logits(pair, inputs, tolerance)
        assert got.dtype == (autocast_dtype or dtype)
        assert got.abs().max() < 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_wrong_token_shows_in_every_precision(precision, family):
    """The tolerances above are tight enough: a neighbour's feature in place of one token's exceeds them."""
    dtype, autocast_dtype, tolerance = PRECISIONS[precision]
    pair = twins(LOW_RATIO, family=family)
    pair.stock.to(dtype), pair.pruned.to(dtype)
    surroundings = torch.autocast("cpu", dtype=autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    inputs = single(pair, 0).to(dtype)
    with surroundings:
        right = oracle_inputs(pair, inputs)
        position = (inputs["input_ids"][0] == pair.stock.config.image_token_id).nonzero()[10].item()
        embeddings = right["inputs_embeds"].clone()
        embeddings[0, position] = embeddings[0, position + 1]
        wrong = {**right, "inputs_embeds": embeddings}
        assert (logits(pair.stock, wrong) - logits(pair.stock, right)).abs().max() > 4 * tolerance
