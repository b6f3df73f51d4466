"""`token_weights` and `positions`: exact to a plain reference, and refused where they cannot be."""

import copy
import importlib
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils

import flash_stand_in
from families import FAMILIES
from flash_stand_in import FLASH, stand_in
from hivtp_hf.pruning import token_weights, weighted_attention
from hivtp_hf.pruning.compat import cache_of, prefills_images_in_chunks
from hivtp_hf.remote_code import bundle
from nightly import mostly_nightly
from places_reference import Placed, plain_cluster_sizes
from tiny_models import CACHE_NAMES, COMMON, IMAGE_TOKEN, LOW_RATIO, NEW_TOKENS, image_inputs, photo, settings, twins

BOTH = {**LOW_RATIO, "token_weights": "cluster_size", "positions": "original"}
TELLING = {
    "both": BOTH,
    "weights": {**LOW_RATIO, "token_weights": "cluster_size", "weight_strength": 0.5},
    "positions": {**LOW_RATIO, "positions": "original"},
    "inclusion": {**LOW_RATIO, "method": "uniform", "token_weights": "inclusion", "positions": "original"},
    "stages": {"retention_ratio": 0.6, "stages": [[1, 0.5], [2, 0.6]]},
    "stages and both": {**BOTH, "retention_ratio": 0.6, "stages": [[0.5, 0.4]]},
}
UNTOLD: dict[str, Any] = {"token_weights": "none", "positions": "packed", "stages": []}
SIZES = [(90, 60), (50, 100), (60, 60)]
TEXTS = ["a <image> b c", "<image><image> what is this?"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(BOTH, family=request.param, text_layers=3)


@pytest.fixture(scope="module", params=[(family, told) for family in FAMILIES for told in ("both", "stages")], ids=" ".join)
def told_pair(request):
    """A pair under settings that its tests do not change."""
    family, told = request.param
    return twins(TELLING[told], family=family, text_layers=3)


@pytest.fixture
def next_pair():
    return twins(BOTH, family="llava_next")


def processed(pair, texts=TEXTS, sizes=SIZES, side="left", first_seed=0, **arguments):
    images = [photo(*size, first_seed + seed) for seed, size in enumerate(sizes)]
    return pair.processor(images=images or None, text=texts, return_tensors="pt", padding=True, padding_side=side, **arguments)


def generated(model, inputs, **arguments):
    torch.manual_seed(0)
    return model.generate(**inputs, **{**COMMON, **arguments})


def expected_of(pair, inputs, **arguments):
    torch.manual_seed(0)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return Placed(pair, inputs).model().generate(**text, **{**COMMON, **arguments}, use_cache=False)


# Weights by themselves.


def features_with_ties():
    random = np.random.default_rng(3)
    features = random.standard_normal((60, 5)).astype(np.float32)
    features[[7, 20, 33]] = features[2]  # equal kept cells, and a dropped one that is equal to both
    features[40] = 0
    return torch.tensor(features)


@pytest.mark.parametrize("most", [2**22, 30], ids=["at once", "in parts"])
def test_cluster_sizes_are_those_of_plain_loops(monkeypatch, most):
    monkeypatch.setattr(token_weights, "_MOST_SIMILARITIES", most)
    features, kept = features_with_ties(), torch.tensor([2, 5, 7, 11, 50])
    sizes = token_weights.cluster_sizes(features, kept)
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == plain_cluster_sizes(features.numpy(), kept.numpy()).tolist()
    assert sizes.sum() == len(features)
    # 20 and 33 are as similar to 2 as to 7; so ties went to the lower one.
    assert sizes[0] >= 3


def test_what_is_kept_whole_or_not_at_all_has_no_weight():
    features = features_with_ties()
    assert token_weights.cluster_sizes(features, torch.arange(60)).tolist() == [1] * 60
    assert token_weights.cluster_sizes(features, torch.arange(0)).tolist() == []


# Forward and loss.


def labels_of(inputs):
    """Text alone, and of a padded row what a real token predicts."""
    mask = inputs["attention_mask"]
    is_predicted = (torch.nn.functional.pad(mask, (1, 0))[:, :-1] > 0) & (mask > 0) & (inputs["input_ids"] != IMAGE_TOKEN)
    return inputs["input_ids"].masked_fill(~is_predicted, -100)


def assert_forward_is_the_references(pair, inputs):
    labels = labels_of(inputs)
    with torch.no_grad():
        got = pair.pruned(**inputs, labels=labels)
        expected = Placed(pair, inputs).logits(inputs["input_ids"], inputs["attention_mask"])
        with settings(pair, pair.pruned.config.pruning_config.replace(**UNTOLD)):
            untold = pair.pruned(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[seen], expected[seen], atol=3e-4, rtol=0)
    assert (expected - untold)[seen].abs().max() > 0.1
    shifted = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got.loss, shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("told", TELLING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_and_loss_are_the_references(pair, told, side):
    with settings(pair, TELLING[told]):
        assert_forward_is_the_references(pair, processed(pair, side=side))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", FLASH])
def test_forward_under_other_implementations(pair, implementation):
    pair = copy.deepcopy(pair)
    pair.pruned.set_attn_implementation({"text_config": implementation})
    with torch.compiler.set_stance("force_eager"):  # torch's compiler fails on a CPU, stock's batches included
        assert_forward_is_the_references(pair, processed(pair))


@pytest.mark.parametrize("told", TELLING)
@pytest.mark.parametrize("side", ["left", "right", "no padding"])
def test_flash_attention_is_told_by_further_dimensions(pair, told, side):
    pair = copy.deepcopy(pair)
    pair.processor.pruning_config = pair.pruned.config.pruning_config = TELLING[told]
    pair.pruned.set_attn_implementation({"text_config": FLASH})
    inputs = processed(pair, TEXTS[:1], SIZES[:1]) if side == "no padding" else processed(pair, side=side)
    flash_stand_in.calls.clear()
    assert_forward_is_the_references(pair, inputs)
    head = pair.pruned.config.text_config.head_dim
    # The last is that without weights and places. Gaps in positions are no ends of packed sequences; padding is left out.
    (told_width, is_packed), *_, (untold_width, _) = flash_stand_in.calls
    assert (told_width, untold_width, is_packed) == (head + 8, head, side != "no padding")


def test_flash_attention_in_bfloat16_knows_weights_exactly():
    """What bfloat16 drops of a weight's logarithm is in a dimension of its own."""
    random = torch.Generator().manual_seed(2)
    heads = torch.randn(3, 1, 2, 40, 24, generator=random).bfloat16()
    log_weights = torch.rand(1, 40, generator=random) * 6
    module = nn.Linear(1, 1, dtype=torch.bfloat16)
    module.is_causal, module.config = True, types.SimpleNamespace(_attn_implementation=FLASH)
    planes = weighted_attention.mask_with_weights(None, log_weights, None, 0, 40, torch.bfloat16, module.config, False)
    output, _ = weighted_attention._flash_attention(stand_in, module, *heads, planes, scaling=0.3)
    query, key, value = heads.double()
    logits = query @ key.mT * 0.3 + log_weights.double()[:, None, None]
    expected = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1) @ value
    # The output alone is rounded.
    torch.testing.assert_close(output.transpose(1, 2), expected.bfloat16(), atol=1e-3, rtol=2**-7)
    apart = (output.transpose(1, 2).double() - expected).abs().mean()
    rounded = log_weights.bfloat16().double()[:, None, None] + query @ key.mT * 0.3
    by_mask = (rounded.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1) @ value).bfloat16()
    assert apart < (by_mask.double() - expected).abs().mean() * 0.9


def test_ratios_of_a_call_have_weights_of_their_own(told_pair):
    assert_forward_is_the_references(told_pair, processed(told_pair, retention_ratio=[0.6, 0.1, 1.0]))


def test_a_class_token_weighs_1_and_has_a_place():
    pair = twins(BOTH, family="llava", vision_feature_select_strategy="full")
    assert_forward_is_the_references(pair, processed(pair))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_of_1_is_stock_bit_for_bit(family):
    pair = twins({**BOTH, "retention_ratio": 1.0}, family=family)
    inputs = processed(pair)
    with torch.no_grad():
        assert torch.equal(pair.pruned(**inputs).logits, pair.stock(**inputs).logits)
    assert torch.equal(generated(pair.pruned, inputs), generated(pair.stock, inputs))


def test_no_mask_of_queries_by_keys(monkeypatch, pair):
    shapes, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **arguments):
        shapes.append((query.shape[2], attn_mask.shape[2], arguments["is_causal"]))
        return plain(query, key, value, attn_mask=attn_mask, **arguments)

    inputs = processed(pair)
    encoded = pair.pruned.get_image_features(**image_inputs(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for implementation in (None, "static"):
        shapes.clear()
        generated(pair.pruned, {**text, "mm_encoder_outputs": {"image": encoded}}, cache_implementation=implementation)
        length = text["input_ids"].shape[1]
        # A step may pack heads that share a key into its queries.
        assert {queries for queries, _, is_causal in shapes if is_causal} == {length}
        assert {queries for queries, _, is_causal in shapes if not is_causal} <= {1, 2}
        assert {rows for _, rows, _ in shapes} == {1}


def test_a_kernel_that_takes_one_mask_alone_gets_a_dense_one(pair):
    with sdpa_kernel(SDPBackend.MATH):
        assert_forward_is_the_references(pair, processed(pair))


def test_dropout_runs_and_no_gradient_is_lost(next_pair):
    inputs = processed(next_pair)
    labels = labels_of(inputs)
    reference = Placed(next_pair, inputs)
    next_pair.pruned(**inputs, labels=labels).loss.backward()
    logits = reference.logits(inputs["input_ids"], inputs["attention_mask"])
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        of_ours, of_stock = (
            model.model.language_model.layers[0].self_attn.get_submodule(name).weight.grad
            for model in (next_pair.pruned, next_pair.stock)
        )
        assert of_stock.abs().max() > 1e-4
        torch.testing.assert_close(of_ours, of_stock, atol=1e-4, rtol=1e-3)
    next_pair.pruned.train()
    for layer in next_pair.pruned.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    assert next_pair.pruned(**inputs, labels=labels).loss.isfinite()


# Generation.

GENERATE = {
    "greedy": ({}, {}),
    "eager": ({}, {}),
    "flex_attention": ({}, {}),
    "flash": ({}, {}),
    "flash, beams": ({"num_beams": 3}, None),
    "flash, static cache": ({"cache_implementation": "static"}, {}),
    "flash, no cache": ({"use_cache": False}, {}),
    "flash, chunks": ({"prefill_chunk_size": 16}, {}),
    "flash, look-up": ({"prompt_lookup_num_tokens": 3}, {}),
    "beams": ({"num_beams": 3}, None),
    "beams with returns": ({"num_beams": 3, "num_return_sequences": 2}, None),
    "sampling": ({"do_sample": True, "top_k": 5, "num_return_sequences": 3}, None),
    "static cache": ({"cache_implementation": "static"}, {}),
    "static cache, beams": ({"cache_implementation": "static", "num_beams": 2}, {"num_beams": 2}),
    "no cache": ({"use_cache": False}, {}),
    "chunks": ({"prefill_chunk_size": 16}, {}),
    "look-up": ({"prompt_lookup_num_tokens": 3}, {}),
    "text-only assistant": ({}, {}),
    "stock assistant": ({}, {}),
    "pruned assistant": ({}, {}),
    "packed assistant": ({}, {}),
}
EVERY = [(how, told) for how in GENERATE for told in TELLING]


@pytest.mark.parametrize(("how", "told"), mostly_nightly(EVERY, lambda how, told: told == "both" or how == "greedy"))
def test_answers_are_the_references(pair, how, told):
    changes, for_reference = GENERATE[how]
    for_reference = changes if for_reference is None else for_reference
    pair = copy.deepcopy(pair)
    pair.processor.pruning_config = pair.pruned.config.pruning_config = TELLING[told]
    alone = "assistant" in how or "look-up" in how  # stock takes one prompt there
    inputs = processed(pair, TEXTS[1:], SIZES[1:]) if alone else processed(pair)
    if how in ("eager", "flex_attention"):
        pair.pruned.set_attn_implementation({"text_config": how})
    elif "flash" in how:
        pair.pruned.set_attn_implementation({"text_config": FLASH})
    if "chunks" in how and not prefills_images_in_chunks():
        pytest.skip("this release drops images from a prefill in chunks")
    expected = expected_of(pair, inputs, **for_reference)
    assistants = {}
    if "assistant" in how:
        torch.manual_seed(5)
        text_only = AutoModelForCausalLM.from_config(copy.deepcopy(pair.stock.config.text_config)).eval()
        packed = copy.deepcopy(pair.pruned)
        packed.config.pruning_config = packed.config.pruning_config.replace(token_weights="none", positions="packed")
        drafting = {"text-only": text_only, "stock": copy.deepcopy(pair.stock), "pruned": copy.deepcopy(pair.pruned)}
        assistants = {"assistant_model": {**drafting, "packed": packed}[how.split()[0]]}
    with torch.compiler.set_stance("force_eager"):
        answers = generated(pair.pruned, inputs, **changes, **assistants)
    assert torch.equal(answers, expected)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this release has no fp8 cache")
def test_a_quantised_cache_has_weights_and_places_in_every_step(told_pair):
    """Its keys differ from the reference's, by far less than weights and places make out."""
    inputs = processed(told_pair)
    arguments = {"output_logits": True, "return_dict_in_generate": True}
    quantised = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected, got = expected_of(told_pair, inputs, **arguments), generated(told_pair.pruned, inputs, **arguments, **quantised)
    with settings(told_pair, told_pair.pruned.config.pruning_config.replace(**UNTOLD)):
        untold = expected_of(told_pair, inputs, **arguments)
    for step in range(2):  # from where answers part, they go on differently
        apart = (untold.logits[step] - expected.logits[step]).abs().max()
        assert (got.logits[step] - expected.logits[step]).abs().max() < apart / 5


class NothingToWaitFor:
    """What an offloaded cache takes for a stream of CUDA, where all is in order anyway."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        return None


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_has_weights_and_places_in_every_step(monkeypatch, pair, kind):
    """transformers' own code around the streams, which a CPU does not have."""
    monkeypatch.setattr(torch, "Stream", NothingToWaitFor)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NothingToWaitFor())
    inputs = processed(pair)
    with torch.compiler.set_stance("force_eager"):
        answers = generated(pair.pruned, inputs, cache_implementation=kind)
    assert torch.equal(answers, expected_of(pair, inputs))


# Conversations.


def a_second_turn(pair, first, answered, with_image):
    """The ids and images of two turns together, and the inputs of the second."""
    texts = [" and <image> this? d", " <image><image> no e"] if with_image else [" and now? d", " so what e"]
    sizes = [(56, 90), (60, 30), (80, 80)] if with_image else []
    second = processed(pair, texts, sizes, first_seed=20)
    sequences = torch.cat((answered, second["input_ids"]), dim=1)
    new = answered.shape[1] - first["input_ids"].shape[1]
    mask = torch.nn.functional.pad(first["attention_mask"], (0, new), value=1)
    mask = torch.cat((mask, second["attention_mask"]), dim=1)
    whole = {"input_ids": sequences, "attention_mask": mask}
    if with_image:
        rows = [images_of_rows(turn, pair) for turn in (first, second)]
        order = [image for row in zip(*rows, strict=True) for turn in row for image in turn]
        whole |= {name: torch.stack([image[name] for image in order]) for name in order[0]}
    else:
        whole |= image_inputs(first)
    return whole, second


def images_of_rows(inputs, pair):
    """The image inputs of every row of a batch of `TEXTS`: the first has one image, the second two."""
    given = image_inputs(inputs)
    if pair.family.name == "llava_next":
        given["pixel_values"] = torch.nn.functional.pad(given["pixel_values"], (0,) * 7 + (5 - given["pixel_values"].shape[1],))
    images = [dict(zip(given, image, strict=True)) for image in zip(*given.values(), strict=True)]
    return [images[:1], images[1:]]


@pytest.mark.parametrize("sends", ["whole", "new part"])
@pytest.mark.parametrize("with_image", [True, False], ids=["second image", "text"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cache_name", mostly_nightly(CACHE_NAMES, lambda name: name == "cache"))
def test_a_second_turn_goes_on_from_the_cache(told_pair, sends, with_image, kind, cache_name):
    config = told_pair.pruned.config.get_text_config()
    first = processed(told_pair)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=700)
    answered = generated(told_pair.pruned, first, **{cache_name: cache})
    whole, second = a_second_turn(told_pair, first, answered, with_image)
    expected = expected_of(told_pair, whole)
    cached = int(cache.get_seq_length())
    ids = whole["input_ids"] if sends == "whole" else whole["input_ids"][:, cached:]
    inputs = {**image_inputs(second), "input_ids": ids, "attention_mask": whole["attention_mask"]}
    answers = generated(told_pair.pruned, inputs, **{cache_name: cache})
    assert torch.equal(answers[:, -NEW_TOKENS:], expected[:, -NEW_TOKENS:])


@pytest.mark.parametrize("cache_name", CACHE_NAMES)
@pytest.mark.parametrize("told", ["both", "positions", "stages"])
def test_loops_by_hand(pair, cache_name, told):
    """Of single tokens and of several, with a cache that is cropped, with a text first and an image later."""
    with settings(pair, TELLING[told]), torch.no_grad():
        text = processed(pair, ["some text", "more of it"], [])["input_ids"]
        images = processed(pair)
        more = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))
        ids = torch.cat((text, images["input_ids"], more), dim=1)
        mask = torch.cat((torch.ones_like(text), images["attention_mask"], torch.ones_like(more)), dim=1)
        reference = Placed(pair, {**images, "input_ids": ids})
        expected = reference.logits(ids, mask)
        # What a stage drops shows a column before it, which an earlier call may have had.
        is_left = reference.stages_of_columns == torch.inf
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, done = None, 0
        steps = [text.shape[1], images["input_ids"].shape[1], 1, 1, 4, -2, 1, 1, 1]
        for number, step in enumerate(steps):
            if step < 0:
                cache.crop(step)
                done += step
                continue
            new = slice(done, done + step)
            given = {"input_ids": ids[:, new], "attention_mask": mask[:, : done + step], "position_ids": positions[:, new]}
            given |= image_inputs(images) if number == 1 else {}
            output = pair.pruned(**given, **{cache_name: cache}, use_cache=True)
            cache, seen = cache_of(output), mask[:, new].bool() & is_left[:, new]
            torch.testing.assert_close(output.logits[seen], expected[:, new][seen], atol=3e-4, rtol=0)
            done += step


# Training.


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_lora_has_the_references_gradients(told_pair, checkpointing):
    inputs = processed(told_pair, side="right")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False)
    found = []
    for model in (copy.deepcopy(told_pair.pruned), copy.deepcopy(told_pair.stock)):
        torch.manual_seed(3)
        found.append(get_peft_model(model, lora).train())
    ours, stock = found
    if checkpointing:
        ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = labels_of(inputs)
    ours(**inputs, labels=labels, use_cache=False).loss.backward()
    reference = Placed(told_pair, inputs)
    reference.stock = stock.base_model.model
    logits = reference.logits(inputs["input_ids"], inputs["attention_mask"])
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    of_stock = {name: parameter.grad for name, parameter in stock.named_parameters() if "language_model" in name}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and "language_model" in name:
            assert of_stock[name].abs().max() > 1e-5
            torch.testing.assert_close(parameter.grad, of_stock[name], atol=2e-4, rtol=1e-2)
            compared += 1
    assert compared >= 8


# Surroundings.


def test_a_compiled_model_answers_alike(next_pair):
    inputs = processed(next_pair)
    with torch.no_grad():
        expected = next_pair.pruned(**inputs).logits
        torch.compiler.reset()
        got = torch.compile(next_pair.pruned, backend="aot_eager")(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=3e-4, rtol=0)


def test_threads_and_copies_keep_apart(told_pair):
    prompts = [processed(told_pair, TEXTS[:1], SIZES[:1]), processed(told_pair, TEXTS[1:], SIZES[1:], first_seed=7)]
    expected = [generated(told_pair.pruned, inputs) for inputs in prompts]
    copied, answers = copy.deepcopy(told_pair.pruned), {}

    def ask(number):
        for _ in range(3):
            answers.setdefault(number, []).append(generated(told_pair.pruned, prompts[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(answer, expected[number]) for answer in answers[number])
        assert torch.equal(generated(copied, prompts[number]), expected[number])
    if not told_pair.pruned.config.pruning_config.weighs_tokens:
        return
    copied.set_attn_implementation({"text_config": "eager"})
    of_layers = [model.model.language_model.layers[0].self_attn.config for model in (copied, told_pair.pruned)]
    assert [config._hivtp_config._attn_implementation for config in of_layers] == ["eager", "sdpa"]


def test_a_model_that_has_run_is_saved_and_loaded(told_pair, tmp_path):
    inputs = processed(told_pair)
    expected = generated(told_pair.pruned, inputs)
    told_pair.pruned.save_pretrained(tmp_path)
    assert torch.equal(generated(told_pair.family.model.from_pretrained(tmp_path), inputs), expected)


def test_autocast(next_pair):
    inputs = processed(next_pair)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = next_pair.pruned(**inputs).logits
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


# Refusals.


def test_what_cannot_be_right_is_refused_before_anything_runs(monkeypatch, next_pair):
    model, inputs = next_pair.pruned, processed(next_pair)
    monkeypatch.setattr(type(model.model.language_model), "forward", lambda *_, **__: pytest.fail("the language model ran"))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def refused(message, **given):
        with pytest.raises(ValueError, match=message):
            model(**given)

    def both_refuse(message, **given):
        refused(message, **given)
        with pytest.raises(ValueError, match=message):
            model.generate(**given, max_new_tokens=2)

    config = model.config.text_config
    for implementation in ("flash_attention_4", "another"):
        with monkeypatch.context() as patch:
            patch.setattr(config, "_attn_implementation_internal", implementation)
            both_refuse(rf"{implementation}.*neither a weight .*set_attn_implementation\('sdpa'\)", **inputs)
    with monkeypatch.context() as patch:
        patch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        patch.setattr(config, "head_dim", 256)
        both_refuse(
            "under 'flash_attention_2', and heads of 256 dimensions.*they have 264, and flash attention takes 256", **inputs
        )
        patch.setattr(config, "head_dim", 128)
        patch.setattr(config, "attn_logit_softcapping", 50.0, raising=False)
        both_refuse(r"capped at 50.0: flash attention would cap them with their weights.*\('eager'\)", **inputs)
        patch.undo()
        patch.setattr(config, "_attn_implementation_internal", FLASH)
        refused("has 4 axes; .* under flash attention", **{**inputs, "attention_mask": torch.ones(2, 1, 3, 3)})
    with monkeypatch.context() as patch:
        patch.setattr(config, "sliding_window", 64, raising=False)
        both_refuse("`sliding_window` of 64, which would be counted in kept tokens", **inputs)
    embeddings = model.get_input_embeddings()(text["input_ids"])
    refused("came as embeddings without its images", inputs_embeds=embeddings, attention_mask=text["attention_mask"])
    encoded = next_pair.stock.get_image_features(**image_inputs(inputs))
    kept = model.get_image_features(**image_inputs(inputs))
    encoded.pooler_output = kept.pooler_output
    both_refuse("without `kept_indices` and `num_stock` and `log_weights`", **text, mm_encoder_outputs={"image": encoded})
    packed = torch.arange(text["input_ids"].shape[1]).remainder(50).expand(2, -1)
    images = image_inputs(inputs)
    refused("do not go on by 1", input_ids=text["input_ids"], **images, position_ids=packed, use_cache=False)
    refused("has 3 columns", input_ids=text["input_ids"], **images, attention_mask=torch.ones(2, 3, dtype=torch.int64))
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8), 0)
    refused("holds 9 positions, but not where", input_ids=torch.full((2, 1), 9), past_key_values=cache)


def test_an_image_of_which_nothing_is_kept_has_no_place():
    pair = twins({"retention_ratio": 0.001, "positions": "original"}, family="llava")
    inputs = processed(pair, TEXTS[:1], SIZES[:1])
    for call in (pair.pruned, pair.pruned.generate):
        with pytest.raises(ValueError, match="nothing is kept of an image, so its place"):
            call(**inputs)


def test_another_batch_on_the_same_cache_is_refused(told_pair):
    output = told_pair.pruned(**processed(told_pair), use_cache=True)
    with pytest.raises(ValueError, match="filled with 2 rows, and the call has 3"):
        told_pair.pruned(input_ids=torch.full((3, 1), 9), **{CACHE_NAMES[0]: cache_of(output)})


def test_shifts_and_weights_are_for_models_that_use_them(pair):
    with settings(pair, LOW_RATIO):
        given = {**processed(pair), "visual_position_shifts": torch.zeros(2, 1), "visual_log_weights": torch.zeros(2, 0)}
        for call in (pair.pruned, pair.pruned.generate):
            with pytest.raises(ValueError, match="`visual_position_shifts` was given, but the settings have"):
                call(**given)


@pytest.mark.parametrize(
    "setting", [{"token_weights": "cluster_size"}, {"positions": "original"}, {"stages": [[1, 0.5]]}], ids=str
)
def test_serving_engines_are_refused(pair, setting):
    processor = copy.copy(pair.processor)
    processor.pruning_config = {**LOW_RATIO, **setting}
    with pytest.raises(ValueError, match=r"serving engines decide by themselves where tokens stand.*`hivtp serve`"):
        processor._get_num_multimodal_tokens([(60, 60)])


def test_remote_code_answers_alike(told_pair, tmp_path, monkeypatch):
    """The one file of a checkpoint, beside the package in this process."""
    name = f"hivtp_{told_pair.family.name}_of_a_test"
    (tmp_path / f"{name}.py").write_text(bundle(told_pair.family.name))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    model = getattr(module, told_pair.family.model.__name__)(
        getattr(module, told_pair.family.config.__name__)(**stored(told_pair))
    )
    model.load_state_dict(told_pair.pruned.state_dict())
    inputs = processed(told_pair)
    assert torch.equal(generated(model.eval(), inputs), generated(told_pair.pruned, inputs))


def stored(pair):
    values = pair.pruned.config.to_dict()
    assert values["pruning_config"]["positions"] == "original" or values["pruning_config"]["stages"]
    return {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
