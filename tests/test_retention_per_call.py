"""`retention_ratio` and `token_budget` of one call: the processor writes by them, the model follows, nothing stays."""

import copy
import functools
import inspect
import itertools
import logging
import re
import sys
import threading

import numpy as np
import pytest
import torch
import torch._dynamo
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.retention_bits import bits_of_ratio, ratio_of_bits, ratios_of_images
from nightly import mostly_nightly
from oracle import oracle_inputs
from tiny_checkpoint import tiny_config, tiny_processor
from tiny_models import LOW_RATIO, greedy, image_inputs, photo, pruned_processor, settings, twins

IMAGE_TOKEN = 3
RATIO = 0.6
# Rows of mixed lengths, image sizes and numbers of images, one of them without any; a ratio for each image.
TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>"]
SIZES = [(60, 100), (112, 112), (200, 50), (20, 20)]
RATIOS = [0.1, 0.35, 1.0, 0.6]
BUDGETS = [60, 37, 100, 64]
PROMPT = TEXTS[0]
NESTED = ["images_kwargs", "text_kwargs", "common_kwargs"]
METHOD_NAMES = [name for name, method in METHODS.items() if not method.keeps_everything]


@pytest.fixture(scope="module", params=FAMILIES)
def shared_pair(request):
    return twins(LOW_RATIO, family=request.param)


def stored_settings(pair):
    """All that a call could have left behind, but for tensors."""
    processor = pair.processor
    parts = (processor, processor.tokenizer, processor.image_processor, pair.pruned, pair.pruned.model)
    return {
        "processor": copy.deepcopy(processor.to_dict()),
        "model": copy.deepcopy(pair.pruned.config.to_dict()),
        "generation": copy.deepcopy(pair.pruned.generation_config.to_dict()),
        "attributes": [sorted(vars(part)) for part in parts],
        "pruning": (processor.pruning_config, pair.pruned.config.pruning_config),
    }


@pytest.fixture
def pair(shared_pair):
    """The models of a family; whatever a test calls, they must look the same afterwards."""
    before = stored_settings(shared_pair)
    yield shared_pair
    assert stored_settings(shared_pair) == before


def photos(sizes=SIZES):
    return [photo(*size, seed) for seed, size in enumerate(sizes)]


def batch(pair, **arguments):
    return pair.processor(images=photos(), text=TEXTS, padding=True, return_tensors="pt", **arguments)


def single(pair, **arguments):
    return pair.processor(images=photo(*SIZES[0]), text=PROMPT, return_tensors="pt", **arguments)


def placeholders(inputs):
    """The number of placeholders of every image, in order; texts part them."""
    rows = [row if isinstance(row, list) else row.tolist() for row in inputs["input_ids"]]
    runs = (itertools.groupby(row, lambda token: token == IMAGE_TOKEN) for row in rows)
    return [len(list(group)) for row in runs for is_image, group in row if is_image]


def expected_counts(pair, budgets, name="retention_ratio", sizes=SIZES):
    return [
        pair.processor.token_layout(*size, **{name: budget}).num_retained for size, budget in zip(sizes, budgets, strict=True)
    ]


def logits(model, inputs, **arguments):
    with torch.no_grad():
        return model(**inputs, **arguments).logits


def kept_indices(pair, inputs, **arguments):
    ratio = {"retention_ratio": inputs["retention_ratio"]} if "retention_ratio" in inputs else {}
    with torch.no_grad():
        return pair.pruned.get_image_features(**image_inputs(inputs), **{**ratio, **arguments}).kept_indices


def assert_same_inputs(inputs, expected):
    assert list(inputs) == list(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def assert_model_follows(pair, inputs, counts, ratios, tolerance=1e-4):
    """Placeholders, features, and logits are those of the ratios, as a model that is configured so has them."""
    assert placeholders(inputs) == counts
    kept = kept_indices(pair, inputs)
    assert [len(indices) for indices in kept] == counts
    images = image_inputs(inputs)
    for image, ratio in enumerate(ratios):
        one = {name: value[image : image + 1] for name, value in images.items()}
        with settings(pair, pair.pruned.config.pruning_config.for_call(ratio)):
            (alone,) = kept_indices(pair, one)
        assert torch.equal(kept[image], alone)
    got, expected = logits(pair.pruned, inputs), logits(pair.stock, oracle_inputs(pair, inputs))
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[is_token], expected[is_token], atol=tolerance, rtol=0)


# What a call takes.

FORMS = {
    "list": RATIOS,
    "tuple": tuple(RATIOS),
    "NumPy array": np.array(RATIOS),
    "tensor": torch.tensor(RATIOS, dtype=torch.float64),
    "list of NumPy scalars": [np.float64(ratio) for ratio in RATIOS],
}
ONE_FOR_ALL = {
    "float": RATIO,
    "NumPy scalar": np.float64(RATIO),
    "array without dimensions": np.array(RATIO),
    "tensor without dimensions": torch.tensor(RATIO, dtype=torch.float64),
}


def test_one_ratio_rules_the_whole_batch(pair):
    counts = expected_counts(pair, [RATIO] * len(SIZES))
    assert counts != expected_counts(pair, [LOW_RATIO["retention_ratio"]] * len(SIZES))
    inputs = batch(pair, retention_ratio=RATIO)
    assert_model_follows(pair, inputs, counts, [RATIO] * len(SIZES))
    for ratio in ONE_FOR_ALL.values():
        assert_same_inputs(batch(pair, retention_ratio=ratio), inputs)


def test_one_ratio_for_each_image(pair):
    inputs = batch(pair, retention_ratio=RATIOS)
    assert_model_follows(pair, inputs, expected_counts(pair, RATIOS), RATIOS)
    for ratios in FORMS.values():
        assert_same_inputs(batch(pair, retention_ratio=ratios), inputs)


def test_the_order_of_the_ratios_matters(pair):
    inputs = batch(pair, retention_ratio=RATIOS[::-1])
    assert_model_follows(pair, inputs, expected_counts(pair, RATIOS[::-1]), RATIOS[::-1])


def test_images_grouped_by_row_are_counted_through(pair):
    first, *pair_of_second, third = photos()
    texts = [text for text in TEXTS if "<image>" in text]
    inputs = pair.processor(
        images=[[first], pair_of_second, [third]], text=texts, padding=True, return_tensors="pt", retention_ratio=RATIOS
    )
    assert_model_follows(pair, inputs, expected_counts(pair, RATIOS), RATIOS)
    with pytest.raises(ValueError, match="`retention_ratio` is "):
        pair.processor(
            images=[[first], pair_of_second, [third]], text=texts, padding=True, retention_ratio=[[0.1], [0.35, 1], [0.6]]
        )


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_takes_it(pair, method):
    with settings(pair, {"method": method, **LOW_RATIO}):
        inputs = batch(pair, retention_ratio=RATIO)
        got = logits(pair.pruned, inputs)
        per_image = batch(pair, retention_ratio=RATIOS)
        assert_model_follows(pair, per_image, expected_counts(pair, RATIOS), RATIOS)
    with settings(pair, {"method": method, "retention_ratio": RATIO}):
        expected_inputs = batch(pair)
        assert torch.equal(inputs["input_ids"], expected_inputs["input_ids"])
        torch.testing.assert_close(got, logits(pair.pruned, expected_inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", [1e-300, 1e-30, 1e-10, 1, 1.0], ids=str)
def test_the_ends_of_the_range(pair, ratio):
    inputs = batch(pair, retention_ratio=ratio)
    counts = expected_counts(pair, [ratio] * len(SIZES))
    assert placeholders(inputs) == [count for count in counts if count]
    assert [len(kept) for kept in kept_indices(pair, inputs)] == counts
    is_token = inputs["attention_mask"].bool()
    expected = logits(pair.stock, oracle_inputs(pair, inputs))
    torch.testing.assert_close(logits(pair.pruned, inputs)[is_token], expected[is_token], atol=1e-4, rtol=0)


def test_a_later_plain_call_is_as_before(pair):
    before, logits_before = batch(pair), logits(pair.pruned, batch(pair))
    for budget in ({"retention_ratio": RATIO}, {"retention_ratio": RATIOS}, {"token_budget": 50}):
        logits(pair.pruned, batch(pair, **budget))
        assert_same_inputs(batch(pair), before)
        assert torch.equal(logits(pair.pruned, before), logits_before)


def test_after_an_error_a_plain_call_is_as_before(pair):
    before = batch(pair)
    for bad in ({"retention_ratio": RATIOS[:2]}, {"retention_ratio": 2}, {"token_budget": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            batch(pair, **bad)
        assert_same_inputs(batch(pair), before)


@pytest.mark.parametrize("returned", ["pt", "np", None])
@pytest.mark.parametrize("given", [{}, {"retention_ratio": None}, {"token_budget": None}], ids=str)
def test_without_a_budget_inputs_have_stocks_keys_in_stocks_order(pair, given, returned):
    arguments = {"images": photos(), "text": TEXTS, "padding": True, "return_tensors": returned}
    stock = list(pair.stock_processor(**arguments))
    assert list(pair.processor(**arguments, **given)) == stock
    assert list(pair.processor(**arguments, retention_ratio=RATIO)) == [*stock, "retention_ratio"]


@pytest.mark.parametrize("text", ["no image", ["no image", "nor here"]], ids=str)
def test_a_call_without_images(pair, text):
    plain = pair.processor(text=text, return_tensors="pt", padding=True)
    for budget in ({"retention_ratio": RATIO}, {"token_budget": 50}, {"retention_ratio": []}):
        assert_same_inputs(pair.processor(text=text, return_tensors="pt", padding=True, **budget), plain)
    with pytest.raises(ValueError, match=r"`retention_ratio` has 1 values, and the call has 0 images"):
        pair.processor(text=text, return_tensors="pt", padding=True, retention_ratio=[RATIO])


# Pipelines and chats.


def message(images, text):
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


CHAT_BUDGETS = [{"retention_ratio": RATIO}, {"retention_ratio": [0.1, 1.0]}, {"token_budget": 40}]


@pytest.mark.parametrize("budget", CHAT_BUDGETS, ids=str)
def test_a_chat_template_hands_it_on(pair, budget):
    images = photos(SIZES[:2])
    inputs = pair.processor.apply_chat_template(
        [message(images, "What is shown?")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(budget),
    )
    text = "USER: <image>\n<image>\nWhat is shown? ASSISTANT:"
    assert_same_inputs(inputs, pair.processor(images=images, text=text, return_tensors="pt", **budget))
    ((name, values),) = budget.items()
    values = values if isinstance(values, list) else [values] * 2
    counts = expected_counts(pair, values, name, SIZES[:2])
    # A newline parts the images of one message.
    assert_model_follows(pair, inputs, counts, ratios_of_images(inputs["retention_ratio"], 2))


@pytest.mark.parametrize("nested", NESTED)
def test_a_chat_template_does_not_hide_a_nested_ratio(pair, nested):
    with pytest.raises(ValueError, match=f"`retention_ratio` was given inside `{nested}`"):
        pair.processor.apply_chat_template(
            [message(photos(SIZES[:1]), "What?")],
            tokenize=True,
            return_dict=True,
            processor_kwargs={nested: {"retention_ratio": RATIO}},
        )


def answer(pair, inputs):
    return pair.processor.decode(greedy(pair.pruned, inputs)[0], skip_special_tokens=True)


def piped(pipe, budget=None, **prompt):
    """The pipeline's answers; every argument is new, as transformers writes into what it is given."""
    arguments = {"max_new_tokens": 6, "generate_kwargs": {"min_new_tokens": 6, "do_sample": False}, "return_full_text": False}
    return pipe(**prompt, **arguments, **({"processor_kwargs": dict(budget)} if budget else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pipelines_hand_it_on(pair, dtype, monkeypatch):
    cast = copy.copy(pair)
    cast.pruned = copy.deepcopy(pair.pruned).to(dtype)
    pipe = pipeline("image-text-to-text", model=cast.pruned, processor=pair.processor)
    given, generate = [], pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs))
    images = photos(SIZES[:2])
    chat = [message(images, "What is shown?")]
    text = "USER: <image>\n<image>\nWhat is shown? ASSISTANT:"

    def answers(budget=None):
        given.clear()
        (of_chat,) = piped(pipe, budget, text=chat)
        (plain,) = piped(pipe, budget, images=images, text=text)
        assert of_chat["generated_text"] == plain["generated_text"]
        assert len(given) == 2
        return plain["generated_text"]

    before = answers()
    for budget in CHAT_BUDGETS:
        got = answers(budget)
        expected = pair.processor(images=images, text=text, return_tensors="pt", **budget)
        for inputs in given:
            assert torch.equal(inputs["input_ids"], expected["input_ids"])
            assert torch.equal(inputs["retention_ratio"], expected["retention_ratio"])
            assert inputs["pixel_values"].dtype == dtype
        assert got == answer(cast, expected.to(dtype))
    assert answers() == before
    assert all("retention_ratio" not in inputs for inputs in given)


def test_a_pipeline_takes_a_list_of_chats_and_a_batch(pair):
    pipe = pipeline("image-text-to-text", model=copy.deepcopy(pair.pruned), processor=pair.processor)
    budget = {"retention_ratio": RATIO}

    def answers_one_by_one(**arguments):
        calls = [pair.processor(images=image, text=PROMPT, return_tensors="pt", **arguments) for image in photos()]
        return [answer(pair, inputs) for inputs in calls]

    expected = answers_one_by_one(**budget)
    chats = [[message([image], "What is shown?")] for image in photos()]
    assert [got[0]["generated_text"] for got in piped(pipe, budget, text=chats)] == expected
    of_batch = piped(pipe, budget, images=photos(), text=[PROMPT] * len(SIZES))
    assert [got["generated_text"] for got in of_batch] == expected
    with settings(pair, {"retention_ratio": RATIO}):
        assert answers_one_by_one() == expected
    assert answers_one_by_one() != expected


# name: (height and width of the images of each chat, families in which transformers cannot join them)
PIPELINE_BATCHES = {
    "one image each": ([[(60, 100)], [(80, 100)]], ()),
    "no image": ([[], []], ()),
    "one image and two": ([[(60, 100)], [(80, 100), (50, 50)]], ()),
    "other numbers of tiles": ([[(60, 100)], [(200, 50)]], ("llava_next",)),
    "one without an image": ([[(60, 100)], []], tuple(FAMILIES)),
}


@pytest.mark.parametrize("name", PIPELINE_BATCHES)
def test_a_pipeline_batches_chats_of_equal_tiles_and_refuses_others(pair, name):
    """It joins the inputs of chats that were processed one by one, and asks no class of ours."""
    sizes, refused = PIPELINE_BATCHES[name]
    pipe = pipeline("image-text-to-text", model=copy.deepcopy(pair.pruned), processor=pair.processor)
    questions = ["What is shown?", "How many people?"]
    chats = [[message(photos(of_chat), question)] for of_chat, question in zip(sizes, questions, strict=True)]
    if pair.family.name in refused:
        with pytest.raises((RuntimeError, ValueError), match=r"Cannot batch them|Sizes of tensors must match"):
            piped(pipe, text=chats, batch_size=2)
    else:
        assert piped(pipe, text=chats, batch_size=2) == piped(pipe, text=chats)


# With the marks by which a tokenizer tells which tokens an assistant said.
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
)


@pytest.mark.parametrize("budget", [None, {"retention_ratio": [0.5, 0.1]}], ids=str)
def test_assistant_masks_fit_two_images_over_two_turns(pair, budget):
    images = photos(SIZES[:2])
    said = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("a cat", "two cups")]
    chat = [message(images[:1], "What is shown?"), said[0], message(images[1:], "And here?"), said[1]]
    inputs = pair.processor.apply_chat_template(
        chat,
        chat_template=MARKED_TEMPLATE,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=dict(budget or {}),
    )
    mask = inputs.pop("assistant_masks").bool()
    runs = torch.nn.functional.pad(mask[0].int(), (1, 1)).diff().nonzero().view(-1, 2)
    spoken = [pair.processor.decode(inputs["input_ids"][0, start:end]).strip() for start, end in runs.tolist()]
    assert spoken == ["a cat", "two cups"]
    logits(pair.pruned, inputs)  # or the placeholders were not as many as the model keeps


# No place for it among the arguments of a part.


@pytest.mark.parametrize("name", ["retention_ratio", "token_budget"])
@pytest.mark.parametrize("nested", NESTED)
def test_nested_budgets_are_refused_with_the_right_form(pair, nested, name):
    for top_level in ({}, {name: 1}):
        with pytest.raises(ValueError, match=f"`{name}` was given inside `{nested}`.* top level") as error:
            batch(pair, **{nested: {name: 1}}, **top_level)
        assert f"processor(..., {name}=...)" in str(error.value)
        assert f"processor_kwargs={{'{name}': ...}}" in str(error.value)


def test_other_nested_arguments_stay_possible(pair):
    expected = batch(pair, retention_ratio=RATIOS)
    inputs = pair.processor(
        images=photos(),
        text=TEXTS,
        text_kwargs={"padding": True},
        images_kwargs={},
        common_kwargs={"return_tensors": "pt"},
        retention_ratio=RATIOS,
    )
    assert_same_inputs(inputs, expected)


def test_whole_settings_in_a_call_are_refused(pair):
    with pytest.raises(ValueError, match=r"`pruning_config` was given to a call.*`retention_ratio` or `token_budget`"):
        batch(pair, pruning_config={"retention_ratio": RATIO})


# How it travels.


@pytest.mark.parametrize(("returned", "kind"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_it_travels_as_the_bits_of_float64(pair, returned, kind):
    arguments = {"images": photos(), "text": TEXTS, "padding": True, "return_tensors": returned}
    for given, ratios in ((RATIOS, RATIOS), (RATIO, [RATIO] * len(SIZES))):
        travels = pair.processor(**arguments, retention_ratio=given)["retention_ratio"]
        assert isinstance(travels, kind)
        assert list(map(int, travels)) == np.array(ratios, dtype=np.float64).view(np.int64).tolist()
        if kind is list:
            assert {type(bits) for bits in travels} == {int}
        else:
            assert travels.shape == (len(SIZES),)
            assert travels.dtype in (torch.int64, np.dtype(np.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_to_half_precision_keeps_the_counts(family):
    """Full-size tiles, no model; many of these ratios would keep another number after rounding to bfloat16."""
    config = tiny_config(family=family)
    processor = pruned_processor(tiny_processor(config), LOW_RATIO)
    sizes = [(336, 336), (300, 900), (480, 640), (50, 20)]
    images = photos(sizes)
    random = np.random.default_rng(0)
    changed = 0
    for ratios in ([0.35] * 4, *random.uniform(0.01, 1, (5, 4)).tolist(), [0.1, 0.2, 0.3, 0.7]):
        inputs = processor(
            images=images,
            text=["<image> and <image>", "<image> or <image>"],
            padding=True,
            return_tensors="pt",
            retention_ratio=ratios,
        )
        for dtype in (torch.bfloat16, torch.float16):
            cast = copy.deepcopy(inputs).to(dtype)
            assert cast["pixel_values"].dtype == dtype
            assert cast["retention_ratio"].dtype == torch.int64
            read = ratios_of_images(cast["retention_ratio"], len(sizes))
            assert read == ratios
            layouts = [processor.token_layout(*size, retention_ratio=ratio) for size, ratio in zip(sizes, read, strict=True)]
            assert [layout.num_retained for layout in layouts] == placeholders(inputs)
            rounded = [
                processor.token_layout(*size, retention_ratio=torch.tensor(ratio).to(dtype).item()).num_retained
                for size, ratio in zip(sizes, ratios, strict=True)
            ]
            changed += rounded != placeholders(inputs)
    assert changed >= 7


def test_a_model_in_half_precision_keeps_the_processors_counts(pair):
    ratio = 0.3515  # of 64 cells 22, but 23 of the nearest bfloat16
    half = copy.copy(pair)
    half.stock, half.pruned = copy.deepcopy(pair.stock).bfloat16(), copy.deepcopy(pair.pruned).bfloat16()
    rounded = torch.tensor(ratio).bfloat16().item()
    counts = expected_counts(pair, [ratio] * len(SIZES))
    assert counts != expected_counts(pair, [rounded] * len(SIZES))
    inputs = batch(pair, retention_ratio=ratio).to(torch.bfloat16)
    assert_model_follows(half, inputs, counts, [ratio] * len(SIZES), tolerance=2 * 2**-5)


def test_bits_there_and_back():
    for ratio in (*RATIOS, 5e-324, 1 / 3, 2.0**-64):
        assert ratio_of_bits(bits_of_ratio(ratio)) == ratio
        assert torch.tensor(bits_of_ratio(ratio), dtype=torch.int64).view(torch.float64).item() == ratio


def test_it_is_a_named_parameter(pair):
    family = pair.family
    for pruned, stock in ((family.base, family.stock_base), (family.model, family.stock_model)):
        for name in ("forward", "get_image_features"):
            parameters = dict(inspect.signature(getattr(pruned, name)).parameters)
            assert parameters["retention_ratio"].default is None
            assert [parameter.name for parameter in parameters.values() if parameter.kind is parameter.VAR_KEYWORD]
            if name == "forward":
                parameter = parameters.pop("retention_ratio")
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
                assert list(parameters) == list(inspect.signature(stock.forward).parameters)


@pytest.fixture
def warnings_of_transformers(caplog):
    """What transformers logs; what it says but once in a process it says again."""
    caplog.set_level(logging.DEBUG, logger="transformers")
    transformers_logging.enable_propagation()

    def logged(call):
        transformers_logging.warning_once.cache_clear()
        caplog.clear()
        call()
        return [record.getMessage() for record in caplog.records]

    yield logged
    transformers_logging.disable_propagation()


def test_transformers_warns_of_no_unknown_argument(pair, warnings_of_transformers, recwarn):
    pipe = pipeline("image-text-to-text", model=copy.deepcopy(pair.pruned), processor=pair.processor)

    def calls(**budget):
        inputs = batch(pair, **budget)
        logits(pair.pruned, inputs)
        with torch.no_grad():
            pair.pruned.model(**inputs)
        greedy(pair.pruned, inputs, tokens=2)
        piped(pipe, budget, text=[message(photos(SIZES[:1]), "What is shown?")])
        piped(pipe, budget, images=photos(SIZES[:1]), text=PROMPT)

    # The ear hears: this is what stock says of an argument that it does not know.
    stock = {"images": photo(60, 100), "text": PROMPT, "return_tensors": "pt"}
    heard = warnings_of_transformers(lambda: pair.stock_processor(**stock, retention_ratio=RATIO))
    assert any("retention_ratio" in warning for warning in heard)
    plain = warnings_of_transformers(calls)
    for budget in ({"retention_ratio": RATIO}, {"token_budget": 50}):
        assert warnings_of_transformers(functools.partial(calls, **budget)) == plain
    assert not [warning for warning in recwarn if "retention_ratio" in str(warning.message)]


# What the model itself takes, and what it refuses.


@pytest.fixture(scope="module")
def made_by_ratios(shared_pair):
    """The inputs of two images at two ratios, and the logits."""
    inputs = shared_pair.processor(
        images=photos(SIZES[:2]), text=["<image> and <image>"], return_tensors="pt", retention_ratio=[0.6, 0.35]
    )
    return inputs, logits(shared_pair.pruned, inputs)


@pytest.mark.parametrize(
    "given",
    [[0.6, 0.35], (0.6, 0.35), torch.tensor([0.6, 0.35], dtype=torch.float64), [np.float64(0.6), np.float64(0.35)]],
    ids=["list", "tuple", "float64 tensor", "NumPy scalars"],
)
def test_a_model_takes_ratios_as_numbers(pair, made_by_ratios, given):
    inputs, expected = made_by_ratios
    changed = {**inputs, "retention_ratio": given}
    assert torch.equal(logits(pair.pruned, changed), expected)
    assert torch.equal(greedy(pair.pruned, changed), greedy(pair.pruned, inputs))
    kept = kept_indices(pair, changed)
    assert all(torch.equal(*both) for both in zip(kept, kept_indices(pair, inputs), strict=True))


@pytest.mark.parametrize("given", [RATIO, np.float64(RATIO)], ids=["float", "NumPy scalar"])
def test_a_model_takes_one_number_for_all(pair, given):
    inputs = batch(pair, retention_ratio=RATIO)
    changed = {**inputs, "retention_ratio": given}
    assert torch.equal(logits(pair.pruned, changed), logits(pair.pruned, inputs))
    assert torch.equal(greedy(pair.pruned, changed), greedy(pair.pruned, inputs))
    everything = {**batch(pair, retention_ratio=1), "retention_ratio": 1}
    assert torch.equal(logits(pair.pruned, everything), logits(pair.pruned, batch(pair, retention_ratio=1)))


# By what is given: what the message says was given, and what it allows.
NOT_FOR_A_MODEL = {
    "float32": (torch.tensor([0.6, 0.35]), r"a tensor of torch.float32; it must be int64, as the processor.* or float64"),
    "bfloat16": (torch.tensor([0.6, 0.35]).bfloat16(), r"torch.bfloat16; it must be int64, as the processor.* or float64"),
    "bool tensor": (torch.tensor([True, True]), r"torch.bool; it must be int64, as the processor.* or float64"),
    "int32": (torch.tensor([1, 1], dtype=torch.int32), r"torch.int32; it must be int64, as the processor.* or float64"),
    "no bits": (torch.tensor([1, 1]), r"holds \[1, 1\].*bits of float64 values.*as the processor returned it, or as a plain"),
    "negative": (torch.tensor([-1, 5]), r"holds \[-1, 5\].*bits of float64 values.*as the processor returned it"),
    "bits of 1.5": (torch.tensor([bits_of_ratio(1.5)] * 2), r"read as \[1\.5, 1\.5\].*above 0 and at most 1"),
    "bits of NaN": (torch.tensor([bits_of_ratio(float("nan"))] * 2), r"read as \[nan, nan\].*above 0 and at most 1"),
    "NaN tensor": (
        torch.full((2,), float("nan"), dtype=torch.float64),
        r"is nan \(float\); it must be a number above 0 and at most 1",
    ),
    "one too few": ([0.6], r"holds \[0.6\].* 1 values, and there are 2 images; give one for each image, or a single number"),
    "one too many": ([0.6] * 3, r"3 values, and there are 2 images; give one for each image"),
    "bits too many": (torch.tensor([bits_of_ratio(0.6)] * 3), r"3 values, and there are 2 images; give one for each image"),
    "tensor without dimensions": (torch.tensor(0.6, dtype=torch.float64), r"1 values, and there are 2 images"),
    "zero": (0, r"is 0 \(int\); it must be a number above 0 and at most 1"),
    "below zero": (-0.1, r"is -0\.1 \(float\); it must be a number above 0 and at most 1"),
    "above one": (1.5, r"is 1\.5 \(float\); it must be a number above 0 and at most 1"),
    "percent": (
        35,
        r"is 35 \(int\); it must be a number above 0 and at most 1.* write 0\.35; for 35 tokens use `token_budget`",
    ),
    "NaN": (float("nan"), r"is nan \(float\); it must be a number above 0 and at most 1"),
    "infinite": (float("inf"), r"is inf \(float\); it must be a number above 0 and at most 1"),
    "string": ("0.5", r"is '0\.5' \(str\); it must be a number above 0 and at most 1"),
    "True": (True, r"is True \(bool\); it must be a number above 0 and at most 1"),
    "string in a list": ([0.5, "0.5"], r"is '0\.5' \(str\); it must be a number above 0 and at most 1"),
    "None in a list": ([0.5, None], r"is None \(NoneType\); it must be a number above 0 and at most 1"),
    "zero in a list": ([0.5, 0], r"is 0 \(int\); it must be a number above 0 and at most 1"),
    "lists in a list": ([[0.6], [0.35]], r"is \[0\.6\] \(list\); it must be a number above 0 and at most 1"),
    "mapping": ({"image": 0.5}, r"is \{'image': 0\.5\} \(dict\); it must be a number above 0 and at most 1"),
}


@pytest.mark.parametrize(("given", "message"), NOT_FOR_A_MODEL.values(), ids=NOT_FOR_A_MODEL)
def test_a_model_refuses_what_is_no_ratio(pair, made_by_ratios, monkeypatch, given, message):
    inputs = {**made_by_ratios[0], "retention_ratio": given}
    monkeypatch.setattr(pair.pruned.model.language_model, "forward", None)  # nothing has run by then
    calls = [
        lambda: pair.pruned(**inputs),
        lambda: pair.pruned.model(**inputs),
        lambda: pair.pruned.generate(**inputs, max_new_tokens=2),
        lambda: pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=given),
        lambda: pair.pruned.model.get_image_features(**image_inputs(inputs), retention_ratio=given),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`retention_ratio` .*" + message):
            call()


def test_inputs_without_the_ratio_that_they_were_made_by(pair):
    inputs = batch(pair, retention_ratio=RATIO)
    del inputs["retention_ratio"]
    written = sum(expected_counts(pair, [RATIO] * len(SIZES)))
    kept = sum(expected_counts(pair, [LOW_RATIO["retention_ratio"]] * len(SIZES)))
    for call in (pair.pruned, pair.pruned.model, lambda **given: pair.pruned.generate(**given, max_new_tokens=2)):
        with pytest.raises(ValueError, match="the prompt has") as error:
            call(**inputs)
        assert f"{written} image placeholders, but the model keeps {kept} visual tokens" in str(error.value)
        assert "pass the model all that the processor returned" in str(error.value)


def test_inputs_with_another_ratio_than_they_were_made_by(pair):
    inputs = {**single(pair, retention_ratio=RATIO), "retention_ratio": 0.5}
    written, kept = (expected_counts(pair, [ratio], sizes=SIZES[:1])[0] for ratio in (RATIO, 0.5))
    with pytest.raises(ValueError, match=f"{written} image placeholders, but the model keeps {kept} visual tokens"):
        pair.pruned(**inputs)


# What the processor refuses.

OUT_OF_RANGE = [0, -0.1, float("nan"), "0.5", True, {"a": 1}]
NOT_FOR_A_PROCESSOR = {
    # By what is given: the one value of it that is wrong.
    "retention_ratio": [*((value, value) for value in (*OUT_OF_RANGE, 1.5, 35, float("inf"))), ([0.5, 1, "x", 1], "x")],
    "token_budget": [*((value, value) for value in (*OUT_OF_RANGE, 2.5, -1)), ([64, 64, 64, 0], 0), ([64, 0.5, 64, 1], 0.5)],
}


@pytest.mark.parametrize(
    ("name", "value", "wrong"), [(name, *case) for name, cases in NOT_FOR_A_PROCESSOR.items() for case in cases], ids=str
)
def test_bad_values_are_refused_before_anything_runs(pair, monkeypatch, name, value, wrong):
    def never(*args, **kwargs):
        raise AssertionError("a part ran")

    for part in (pair.processor.tokenizer, pair.processor.image_processor):
        monkeypatch.setattr(type(part), "__call__", never)
    with pytest.raises(AssertionError, match="a part ran"):
        batch(pair, retention_ratio=RATIO)
    allowed = "a number above 0 and at most 1" if name == "retention_ratio" else "a whole number from 1"
    with pytest.raises(ValueError, match=rf"`{name}` is {re.escape(repr(wrong))} .*it must be {allowed}"):
        batch(pair, **{name: value})


@pytest.mark.parametrize("name", ["retention_ratio", "token_budget"])
@pytest.mark.parametrize("number", [0, 1, 3, 5, 40])
def test_another_number_of_values_than_images_is_refused(pair, name, number):
    value = {"retention_ratio": 0.5, "token_budget": 64}[name]
    with pytest.raises(ValueError, match=rf"`{name}` has {number} values, and the call has 4 images\. .*one value for each"):
        batch(pair, **{name: [value] * number})
    with pytest.raises(ValueError, match=rf"`{name}` has {number} values, and the call has 4 images"):
        pair.processor._get_num_multimodal_tokens(image_sizes=SIZES, **{name: [value] * number})


# Serving engines ask for numbers ahead.


@pytest.mark.parametrize(
    "budget",
    [{"retention_ratio": RATIO}, {"retention_ratio": RATIOS}, {"token_budget": 64}, {"token_budget": BUDGETS}],
    ids=str,
)
def test_the_number_asked_for_ahead_is_the_number_written(pair, budget):
    ahead = pair.processor._get_num_multimodal_tokens(image_sizes=SIZES, **budget)
    assert list(ahead["num_image_tokens"]) == placeholders(batch(pair, **budget))
    assert list(ahead["num_image_patches"]) == [1] * len(SIZES)
    plain = pair.processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert list(plain["num_image_tokens"]) == placeholders(batch(pair)) != list(ahead["num_image_tokens"])


# A budget of tokens.


@pytest.mark.parametrize("budget", [37, 64, 101, 10**6, BUDGETS, np.array(BUDGETS), torch.tensor(BUDGETS)], ids=str)
def test_a_token_budget_bounds_every_image(pair, budget):
    inputs = batch(pair, token_budget=budget)
    budgets = [budget] * len(SIZES) if isinstance(budget, int) else list(map(int, budget))
    written = placeholders(inputs)
    assert all(0 < count <= limit for count, limit in zip(written, budgets, strict=True))
    assert written == expected_counts(pair, budgets, "token_budget")
    ratios = ratios_of_images(inputs["retention_ratio"], len(SIZES))
    assert inputs["retention_ratio"].dtype == torch.int64
    assert_model_follows(pair, inputs, written, ratios)
    if pair.family.name == "llava":  # a single tile reaches every number
        assert written == [min(limit, 64) for limit in budgets]


def test_a_budget_that_newlines_use_up(pair):
    if pair.family.name == "llava":
        assert placeholders(single(pair, token_budget=1)) == [1]  # no newlines: every budget can be met
        return
    layout = pair.processor.token_layout(*SIZES[0])
    below = layout.num_newlines - 1
    message = rf"`token_budget` is {below}.* {layout.num_newlines} newline tokens.*`keep_newlines` to False"
    for ask in (
        lambda: single(pair, token_budget=below),
        lambda: pair.processor.token_layout(*SIZES[0], token_budget=below),
        lambda: pair.processor._get_num_multimodal_tokens(image_sizes=SIZES[:1], token_budget=below),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert placeholders(single(pair, token_budget=layout.num_newlines)) == [layout.num_newlines]
    with settings(pair, {**LOW_RATIO, "keep_newlines": False}):
        inputs = single(pair, token_budget=below)
        (written,) = placeholders(inputs)
        assert 0 < written <= below
        assert_model_follows(pair, inputs, [written], ratios_of_images(inputs["retention_ratio"], 1))


# Two budgets, and what rules.


def test_a_ratio_and_a_budget_together_are_refused(pair):
    both = {"retention_ratio": RATIO, "token_budget": 64}
    message = r"`retention_ratio` is 0\.6 .*`token_budget` 64 .*give one of them"
    for ask in (
        lambda: batch(pair, **both),
        lambda: pair.processor.token_layout(60, 100, **both),
        lambda: pair.processor._get_num_multimodal_tokens(image_sizes=SIZES, **both),
        lambda: VisualTokenPruningConfig(**both),
        lambda: pair.family.config(pruning_config=both),
        lambda: setattr(pair.processor, "pruning_config", both),
        lambda: setattr(pair.pruned.config, "pruning_config", both),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


CONFIGURED = {
    "a ratio": {"retention_ratio": 0.25},
    "a budget": {"token_budget": 50},
    "published settings": {"global_ratio": 0.4, "local_window": 3},
    "no newlines": {"token_budget": 50, "keep_newlines": False},
    "nothing": {},
}


@pytest.mark.parametrize("configured", CONFIGURED)
@pytest.mark.parametrize("budget", [{"retention_ratio": RATIO}, {"token_budget": 64}], ids=str)
def test_a_call_rules_over_every_configuration(pair, configured, budget):
    given = CONFIGURED[configured]
    with settings(pair, given):
        inputs = batch(pair, **budget)
        assert placeholders(inputs) != placeholders(batch(pair))
        got, kept = logits(pair.pruned, inputs), kept_indices(pair, inputs)
    shared = {name: value for name, value in given.items() if name not in ("retention_ratio", "token_budget")}
    with settings(pair, {**shared, **budget}):
        expected_inputs = batch(pair)
        assert torch.equal(inputs["input_ids"], expected_inputs["input_ids"])
        assert all(torch.equal(*both) for both in zip(kept, kept_indices(pair, expected_inputs), strict=True))
        torch.testing.assert_close(got, logits(pair.pruned, expected_inputs), atol=1e-5, rtol=0)


def test_the_method_none_takes_no_ratio_below_one(pair):
    with settings(pair, {"method": "none"}):
        plain, whole = batch(pair), batch(pair, retention_ratio=1)
        assert torch.equal(plain["input_ids"], whole["input_ids"])
        assert placeholders(whole) == [pair.processor.token_layout(*size).num_stock for size in SIZES]
        assert torch.equal(logits(pair.pruned, whole), logits(pair.pruned, plain))
        assert torch.equal(logits(pair.pruned, {**plain, "retention_ratio": 1.0}), logits(pair.pruned, plain))
        below = [0.5, [1, 1, 1, 0.5]]
        for ratio in below:
            with pytest.raises(ValueError, match=r"`retention_ratio` is 0\.5; the method 'none' keeps every token"):
                batch(pair, retention_ratio=ratio)
            with pytest.raises(ValueError, match=r"`retention_ratio` is 0\.5; the method 'none' keeps every token"):
                pair.pruned(**{**plain, "retention_ratio": ratio})
        with pytest.raises(ValueError, match=r"`token_budget` is 64; the method 'none' keeps every token"):
            batch(pair, token_budget=64)


# Loading.


@pytest.fixture(scope="module")
def folder(shared_pair, tmp_path_factory):
    path = tmp_path_factory.mktemp(shared_pair.family.name)
    shared_pair.processor.save_pretrained(path)
    shared_pair.pruned.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["processor", "model", "base"])
def test_settings_beside_pruning_config_are_refused_at_loading(pair, folder, kind):
    loaded_by = getattr(pair.family, kind).from_pretrained
    for name, value in {"retention_ratio": 0.2, "token_budget": 64, "method": "none", "keep_newlines": False}.items():
        with pytest.raises(ValueError, match=rf"`{name}` is a pruning setting.*`pruning_config={{'{name}': \.\.\.}}`"):
            loaded_by(folder, **{name: value})
    for name in ("prunning_config", "pruning_conf", "Pruning_config"):
        with pytest.raises(ValueError, match=f"`{name}` is no argument. Did you mean `pruning_config`"):
            loaded_by(folder, **{name: {}})
    loaded = loaded_by(folder, pruning_config={"retention_ratio": 0.2})
    assert getattr(loaded, "config", loaded).pruning_config == VisualTokenPruningConfig(retention_ratio=0.2)
    loaded = loaded_by(folder)
    assert getattr(loaded, "config", loaded).pruning_config == VisualTokenPruningConfig(**LOW_RATIO)


def test_a_loaded_processor_and_model_take_it(pair, folder):
    loaded = copy.copy(pair)
    loaded.processor, loaded.pruned = pair.family.processor.from_pretrained(folder), pair.family.model.from_pretrained(folder)
    inputs = batch(loaded, retention_ratio=RATIOS)
    assert_same_inputs(inputs, batch(pair, retention_ratio=RATIOS))
    assert torch.equal(logits(loaded.pruned, inputs), logits(pair.pruned, inputs))


# Threads and compilers.


def test_threads_do_not_disturb_each_other(pair):
    budgets = [{"retention_ratio": RATIOS}, {"retention_ratio": RATIO}, {}, {"token_budget": 50}]
    expected = [batch(pair, **budget) for budget in budgets]
    assert len({tuple(placeholders(inputs)) for inputs in expected}) == len(budgets)
    got, errors, start = [[] for _ in budgets], [], threading.Barrier(len(budgets), timeout=60)

    def work(thread):
        try:
            start.wait()
            for _ in range(4):
                got[thread].append(batch(pair, **budgets[thread]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(len(budgets))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
    for calls, inputs in zip(got, expected, strict=True):
        assert len(calls) == 4
        for call in calls:
            assert_same_inputs(call, inputs)


# LLaVA-NeXT is compiled with every commit in test_compile.py.
@pytest.mark.parametrize("family", mostly_nightly(FAMILIES, lambda family: family == "llava"))
def test_a_compiled_model_follows(family):
    settings = {**LOW_RATIO, "importance_start_layer": 0, "importance_num_layers": 1}
    pair = twins(settings, family=family, vision_layers=2, text_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(pair.pruned, backend="eager")
    try:
        inputs = single(pair, retention_ratio=RATIO)
        torch.testing.assert_close(logits(compiled, inputs), logits(pair.pruned, inputs), atol=1e-5, rtol=0)
    finally:
        torch._dynamo.reset()
