"""The ratio of one call on its way through `generate`, losses and outputs: the oracle's answers, for every image its ratio."""

import copy

import pytest
import torch

from families import FAMILIES
from oracle import oracle_inputs
from tiny_models import (
    COMMON,
    IMAGE_TOKEN,
    LOW_RATIO,
    NEW_TOKENS,
    image_features_of,
    image_inputs,
    photo,
    settings,
    twins,
)

# Texts, and height and width of the images in their order; a ratio for each.
PROMPTS = {
    "one image": (["USER: <image>\nWhat is shown? ASSISTANT:"], [(60, 100)]),
    "one image a row": (
        ["USER: <image>\nWhat? ASSISTANT:", "<image> and longer than the others.", "<image>"],
        [(60, 100), (20, 20), (200, 50)],
    ),
    "mixed rows": (
        ["USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>"],
        [(60, 100), (112, 112), (200, 50), (20, 20)],
    ),
    "no image": (["no image at all. ASSISTANT:", "nor here"], []),
}
RATIOS = [0.6, 0.35, 1.0, 0.1]

SETTINGS = {
    "greedy": {},
    "beams, two returns": {"num_beams": 4, "num_return_sequences": 2},
    "sampling, three returns": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


def processed(pair, name, ratios=None, **arguments):
    texts, sizes = PROMPTS[name]
    images = [photo(*size, seed) for seed, size in enumerate(sizes)] or None
    if images and ratios is not None:
        arguments["retention_ratio"] = ratios[: len(sizes)] if isinstance(ratios, list) else ratios
    return pair.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", **arguments)


def generate(model, inputs, **arguments):
    torch.manual_seed(0)
    return model.generate(**inputs, **{**COMMON, **arguments})


def new_tokens(sequences, inputs):
    return sequences[:, inputs["input_ids"].shape[1] :]


def logits(model, inputs, **arguments):
    with torch.no_grad():
        return model(**inputs, **arguments).logits


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_the_oracles(pair, setting):
    changes = SETTINGS[setting]
    inputs = processed(pair, "mixed rows", RATIOS)
    # Stock has no path for embeddings without a cache; what it answers does not depend on one.
    oracle_changes = {} if setting == "no cache" else changes
    expected = generate(pair.stock, oracle_inputs(pair, inputs), **oracle_changes)
    answers = new_tokens(generate(pair.pruned, inputs, **changes), inputs)
    assert answers.shape == (len(PROMPTS["mixed rows"][0]) * changes.get("num_return_sequences", 1), NEW_TOKENS)
    assert torch.equal(answers, expected)


def test_every_row_answers_as_it_does_alone_where_its_ratio_is_configured(pair):
    """Without the oracle, whose choice of tokens comes from the model: so no image was given another one's ratio."""
    inputs = processed(pair, "one image a row", RATIOS)
    answers = new_tokens(generate(pair.pruned, inputs), inputs)
    texts, sizes = PROMPTS["one image a row"]
    for row, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        with settings(pair, {"retention_ratio": RATIOS[row]}):
            alone = pair.processor(images=photo(*size, row), text=text, return_tensors="pt")
            assert torch.equal(new_tokens(generate(pair.pruned, alone), alone)[0], answers[row])


def test_a_text_only_call_ignores_a_ratio(pair):
    inputs = processed(pair, "no image")
    with_ratio = {**inputs, "retention_ratio": 0.6}
    assert torch.equal(logits(pair.pruned, with_ratio), logits(pair.pruned, inputs))
    assert torch.equal(generate(pair.pruned, with_ratio), generate(pair.pruned, inputs))


def test_embeddings_may_come_in_place_of_ids(pair):
    inputs = processed(pair, "mixed rows", RATIOS)
    with torch.no_grad():
        embeddings = pair.pruned.get_input_embeddings()(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    by_embeddings = {**rest, "inputs_embeds": embeddings}
    torch.testing.assert_close(logits(pair.pruned, by_embeddings), logits(pair.pruned, inputs), atol=1e-5, rtol=0)
    assert torch.equal(generate(pair.pruned, by_embeddings), new_tokens(generate(pair.pruned, inputs), inputs))


@pytest.mark.parametrize("given", [0.6, [0.6] * 3, torch.tensor([0.6] * 3, dtype=torch.float64)], ids=type)
def test_ratios_may_be_given_as_numbers(pair, given):
    inputs = processed(pair, "one image a row", 0.6)
    changed = {**inputs, "retention_ratio": given}
    assert torch.equal(logits(pair.pruned, changed), logits(pair.pruned, inputs))
    assert torch.equal(generate(pair.pruned, changed, num_beams=2), generate(pair.pruned, inputs, num_beams=2))


def test_an_assistant_and_prompt_lookup_leave_the_answers_as_they_are(pair):
    inputs = processed(pair, "one image", 0.6)
    expected = generate(pair.pruned, inputs)
    for assistant in (twins(LOW_RATIO, family=pair.family.name).pruned, copy.deepcopy(pair.stock)):
        assert torch.equal(generate(pair.pruned, inputs, assistant_model=assistant), expected)
    assert torch.equal(generate(pair.pruned, inputs, prompt_lookup_num_tokens=3), expected)


# The published selection, whose number of tokens depends on the content.

PUBLISHED = {"exact_count": False, **LOW_RATIO}
# High enough for placeholders to be left over, of one tile as well.
HIGH_RATIOS = [0.8, 1.0, 0.7]


def test_the_published_selection_takes_a_ratio_for_each_image(pair):
    texts, sizes = PROMPTS["one image a row"]
    with settings(pair, PUBLISHED):
        inputs = processed(pair, "one image a row", HIGH_RATIOS)
        answers, got = new_tokens(generate(pair.pruned, inputs), inputs), logits(pair.pruned, inputs)
        with torch.no_grad():
            kept = pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=HIGH_RATIOS).kept_indices
        assert sum(map(len, kept)) < int((inputs["input_ids"] == IMAGE_TOKEN).sum())
        with torch.no_grad():
            embeddings = pair.pruned.get_input_embeddings()(inputs["input_ids"])
        by_embeddings = {**{key: value for key, value in inputs.items() if key != "input_ids"}, "inputs_embeds": embeddings}
        assert torch.equal(generate(pair.pruned, by_embeddings), answers)
    for row, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        with settings(pair, {"exact_count": False, "retention_ratio": HIGH_RATIOS[row]}):
            alone = pair.processor(images=photo(*size, row), text=text, return_tensors="pt")
            assert torch.equal(new_tokens(generate(pair.pruned, alone), alone)[0], answers[row])
            expected = logits(pair.pruned, alone)[0, -1]
            torch.testing.assert_close(got[row, -1], expected, atol=1e-4, rtol=0)


# Losses and outputs.


def labels_of(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == IMAGE_TOKEN, -100)


@pytest.mark.parametrize("pruning", [LOW_RATIO, PUBLISHED], ids=["exact", "published"])
def test_loss_and_gradients_are_those_of_a_model_configured_so(pair, pruning):
    losses, gradients = [], []
    for configured, given in ((pruning, 0.8), ({**pruning, "retention_ratio": 0.8}, None), (pruning, None)):
        with settings(pair, configured):
            inputs = processed(pair, "mixed rows", given)
            losses.append(pair.pruned(**inputs, labels=labels_of(inputs)).loss)
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in pair.pruned.model.multi_modal_projector.parameters()])
        pair.pruned.zero_grad(set_to_none=True)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    assert abs(losses[0] - losses[2]) > 1e-3
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for got, expected in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["head", "base"])
def test_outputs_are_those_of_a_model_configured_so(pair, part):
    model = pair.pruned if part == "head" else pair.pruned.model
    inputs = processed(pair, "mixed rows", 0.6)
    with torch.no_grad():
        output, as_tuple = model(**inputs), model(**inputs, return_dict=False)
        features = pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=inputs["retention_ratio"])
        with settings(pair, {"retention_ratio": 0.6}):
            expected = model(**processed(pair, "mixed rows"))
    # What enters the language model, image by image.
    entered, entered_expected = (torch.cat(image_features_of(of)) for of in (output, expected))
    assert torch.equal(entered, torch.cat(features.pooler_output))
    torch.testing.assert_close(entered, entered_expected, atol=1e-5, rtol=0)
    assert output.keys() == expected.keys()
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(expected.to_tuple())
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(as_tuple[0][is_token], expected[0][is_token], atol=1e-4, rtol=0)
