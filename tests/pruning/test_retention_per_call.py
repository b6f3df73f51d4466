"""`retention_ratio` and `token_budget` of one call: the processor writes by them, the model follows, nothing stays."""

import copy
import dataclasses
import itertools
import logging
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch._dynamo
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.pruning.call_budget import CallBudget
from hivtp_hf.pruning.retention_bits import bits_of_ratio, ratio_of_bits, ratios_of_images
from oracle import oracle_inputs
from tiny_models import LOW_RATIO, greedy, image_inputs, photo, settings, twins

IMAGE_TOKEN = 3
RATIO = 0.6
# Rows of mixed lengths, image sizes and numbers of images, one of them without any; a ratio for each image.
TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>"]
SIZES = [(60, 100), (112, 112), (200, 50), (20, 20)]
RATIOS = [0.1, 0.35, 1.0, 0.6]
BUDGETS = [60, 37, 100, 64]
PROMPT = TEXTS[0]


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
    "float": RATIO,
    "NumPy scalar": np.float64(RATIO),
    "array without dimensions": np.array(RATIO),
    "tensor without dimensions": torch.tensor(RATIO, dtype=torch.float64),
}


@pytest.mark.parametrize("form", FORMS)
def test_ratios_in_every_form(form):
    ratios = [RATIO] * len(SIZES) if np.ndim(FORMS[form]) == 0 else RATIOS
    budget = CallBudget(VisualTokenPruningConfig(), retention_ratio=FORMS[form])
    assert [budget.of_image(image).retention_ratio for image in range(len(SIZES))] == ratios
    if "without dimensions" not in form:  # a model reads tensors image by image
        assert ratios_of_images(FORMS[form], len(SIZES)) == ratios


@pytest.mark.parametrize("given", [RATIO, RATIOS], ids=["one for all", "one for each image"])
def test_the_model_follows(pair, given):
    ratios = given if isinstance(given, list) else [given] * len(SIZES)
    counts = expected_counts(pair, ratios)
    assert counts != expected_counts(pair, [LOW_RATIO["retention_ratio"]] * len(SIZES))
    assert_model_follows(pair, batch(pair, retention_ratio=given), counts, ratios)
    # Images that are grouped by row are counted through.
    first, *of_second, third = photos()
    grouped = pair.processor(
        images=[[first], of_second, [third]],
        text=[text for text in TEXTS if "<image>" in text],
        text_kwargs={"padding": True},
        retention_ratio=given,
    )
    assert placeholders(grouped) == counts


@pytest.mark.parametrize("ratio", [1e-300, 1], ids=str)
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
    for budget in ({"retention_ratio": RATIOS}, {"token_budget": 50}):
        logits(pair.pruned, batch(pair, **budget))
        assert_same_inputs(batch(pair), before)
        assert torch.equal(logits(pair.pruned, before), logits_before)
    for bad in ({"retention_ratio": RATIOS[:2]}, {"token_budget": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            batch(pair, **bad)
        assert_same_inputs(batch(pair), before)


def test_a_call_without_images(pair):
    asked = {"text": ["no image", "nor here"], "return_tensors": "pt", "padding": True}
    plain = pair.processor(**asked)
    for budget in ({"retention_ratio": RATIO}, {"token_budget": 50}, {"retention_ratio": []}):
        assert_same_inputs(pair.processor(**asked, **budget), plain)
    with pytest.raises(ValueError, match=r"`retention_ratio` has 1 values, and the call has 0 images"):
        pair.processor(**asked, retention_ratio=[RATIO])


# Pipelines and chats.


def message(images, text):
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


CHAT_BUDGETS = [{"retention_ratio": RATIO}, {"retention_ratio": [0.1, 1.0]}, {"token_budget": 40}]


def answer(pair, inputs):
    return pair.processor.decode(greedy(pair.pruned, inputs)[0], skip_special_tokens=True)


def piped(pipe, budget=None, **prompt):
    """The pipeline's answers; every argument is new, as transformers writes into what it is given."""
    arguments = {"max_new_tokens": 6, "generate_kwargs": {"min_new_tokens": 6, "do_sample": False}, "return_full_text": False}
    return pipe(**prompt, **arguments, **({"processor_kwargs": dict(budget)} if budget else {}))


def test_pipelines_and_chats_hand_it_on(pair, monkeypatch):
    cast = copy.copy(pair)
    cast.pruned = copy.deepcopy(pair.pruned).bfloat16()
    pipe = pipeline("image-text-to-text", model=cast.pruned, processor=pair.processor)
    given, generate = [], pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs))
    images = photos(SIZES[:2])
    text = "USER: <image>\n<image>\nWhat is shown? ASSISTANT:"
    plain = pair.processor(images=images, text=text, return_tensors="pt")
    for budget in (*CHAT_BUDGETS, {}):
        given.clear()
        (of_chat,) = piped(pipe, budget, text=[message(images, "What is shown?")])
        (of_text,) = piped(pipe, budget, images=images, text=text)
        expected = pair.processor(images=images, text=text, return_tensors="pt", **budget)
        assert len(given) == 2
        assert (len(expected["input_ids"][0]) == len(plain["input_ids"][0])) == (not budget)
        expected = expected.to(torch.bfloat16)
        for inputs in given:
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)
            assert ("retention_ratio" in inputs) == bool(budget)
        assert of_chat["generated_text"] == of_text["generated_text"] == answer(cast, expected)


def test_a_pipeline_takes_a_list_of_chats(pair):
    pipe = pipeline("image-text-to-text", model=copy.deepcopy(pair.pruned), processor=pair.processor)
    calls = [pair.processor(images=image, text=PROMPT, return_tensors="pt", retention_ratio=RATIO) for image in photos()]
    chats = [[message([image], "What is shown?")] for image in photos()]
    answers = [got[0]["generated_text"] for got in piped(pipe, {"retention_ratio": RATIO}, text=chats)]
    assert answers == [answer(pair, inputs) for inputs in calls]


# name: (height and width of the images of each chat, families in which transformers cannot join them)
PIPELINE_BATCHES = {
    "one image each": ([[(60, 100)], [(80, 100)]], ()),
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


def test_assistant_masks_fit_two_images_over_two_turns(pair):
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
        processor_kwargs={"retention_ratio": [0.5, 0.1]},
    )
    mask = inputs.pop("assistant_masks").bool()
    runs = torch.nn.functional.pad(mask[0].int(), (1, 1)).diff().nonzero().view(-1, 2)
    spoken = [pair.processor.decode(inputs["input_ids"][0, start:end]).strip() for start, end in runs.tolist()]
    assert spoken == ["a cat", "two cups"]
    logits(pair.pruned, inputs)  # or the placeholders were not as many as the model keeps


# How it travels.


@pytest.mark.parametrize(("returned", "kind"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_it_travels_as_the_bits_of_float64(pair, returned, kind):
    arguments = {"images": photos(), "text": TEXTS, "padding": True, "return_tensors": returned}
    stock = list(pair.stock_processor(**arguments))
    assert list(pair.processor(**arguments, retention_ratio=None)) == stock
    assert list(pair.processor(**arguments, retention_ratio=RATIO)) == [*stock, "retention_ratio"]
    for given, ratios in ((RATIOS, RATIOS), (RATIO, [RATIO] * len(SIZES))):
        travels = pair.processor(**arguments, retention_ratio=given)["retention_ratio"]
        assert isinstance(travels, kind)
        assert list(map(int, travels)) == np.array(ratios, dtype=np.float64).view(np.int64).tolist()
        if kind is list:
            assert {type(bits) for bits in travels} == {int}
        else:
            assert travels.shape == (len(SIZES),)
            assert travels.dtype in (torch.int64, np.dtype(np.int64))


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


def test_transformers_warns_of_no_unknown_argument(pair, caplog, monkeypatch, recwarn):
    caplog.set_level(logging.DEBUG, logger="transformers")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipe = pipeline("image-text-to-text", model=copy.deepcopy(pair.pruned), processor=pair.processor)

    def logged(call):
        transformers_logging.warning_once.cache_clear()  # what it says but once in a process it says again
        caplog.clear()
        call()
        return [record.getMessage() for record in caplog.records]

    def calls(**budget):
        inputs = batch(pair, **budget)
        logits(pair.pruned, inputs)
        greedy(pair.pruned, inputs, tokens=2)
        piped(pipe, budget, images=photos(SIZES[:1]), text=PROMPT)

    # The ear hears: this is what stock says of an argument that it does not know.
    stock = {"images": photo(60, 100), "text": PROMPT, "return_tensors": "pt"}
    heard = logged(lambda: pair.stock_processor(**stock, retention_ratio=RATIO))
    assert any("retention_ratio" in warning for warning in heard)
    assert logged(lambda: calls(retention_ratio=RATIO)) == logged(calls)
    assert not [warning for warning in recwarn if "retention_ratio" in str(warning.message)]


# What a model refuses, by what is given: what the message says was given, and what it allows.
NO_INT64 = r"it must be int64, as the processor.* or float64"
NO_RATIO = r"it must be a number above 0 and at most 1"
NOT_FOR_A_MODEL = {
    "float32": (torch.tensor([0.6, 0.35]), rf"a tensor of torch.float32; {NO_INT64}"),
    "int32": (torch.tensor([1, 1], dtype=torch.int32), rf"torch.int32; {NO_INT64}"),
    "no bits": (torch.tensor([1, 1]), r"holds \[1, 1\].*bits of float64 values.*as the processor returned it, or as a plain"),
    "negative": (torch.tensor([-1, 5]), r"holds \[-1, 5\].*bits of float64 values.*as the processor returned it"),
    "bits of 1.5": (torch.tensor([bits_of_ratio(1.5)] * 2), r"read as \[1\.5, 1\.5\].*above 0 and at most 1"),
    "bits of NaN": (torch.tensor([bits_of_ratio(float("nan"))] * 2), r"read as \[nan, nan\].*above 0 and at most 1"),
    "NaN tensor": (torch.full((2,), float("nan"), dtype=torch.float64), rf"is nan \(float\); {NO_RATIO}"),
    "one too few": ([0.6], r"holds \[0.6\].* 1 values, and there are 2 images; give one for each image, or a single number"),
    "bits too many": (torch.tensor([bits_of_ratio(0.6)] * 3), r"3 values, and there are 2 images; give one for each image"),
    "tensor without dimensions": (torch.tensor(0.6, dtype=torch.float64), r"1 values, and there are 2 images"),
    "percent": (35, rf"is 35 \(int\); {NO_RATIO}.* write 0\.35; for 35 tokens use `token_budget`"),
    "string": ("0.5", rf"is '0\.5' \(str\); {NO_RATIO}"),
    "None in a list": ([0.5, None], rf"is None \(NoneType\); {NO_RATIO}"),
    "lists in a list": ([[0.6], [0.35]], rf"is \[0\.6\] \(list\); {NO_RATIO}"),
    "mapping": ({"image": 0.5}, rf"is \{{'image': 0\.5\}} \(dict\); {NO_RATIO}"),
}


@pytest.mark.parametrize(("given", "message"), NOT_FOR_A_MODEL.values(), ids=NOT_FOR_A_MODEL)
def test_what_is_no_ratio_for_a_model(given, message):
    with pytest.raises(ValueError, match="`retention_ratio` .*" + message):
        ratios_of_images(given, 2)


def test_a_model_refuses_a_ratio_before_anything_runs(pair, monkeypatch):
    inputs = {**batch(pair, retention_ratio=RATIO), "retention_ratio": 35}
    monkeypatch.setattr(pair.pruned.model.language_model, "forward", None)
    calls = [
        lambda: pair.pruned(**inputs),
        lambda: pair.pruned.model(**inputs),
        lambda: pair.pruned.generate(**inputs, max_new_tokens=2),
        lambda: pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=35),
        lambda: pair.pruned.model.get_image_features(**image_inputs(inputs), retention_ratio=35),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`retention_ratio` is 35"):
            call()


def test_inputs_without_the_ratio_that_they_were_made_by(pair):
    inputs = batch(pair, retention_ratio=RATIO)
    del inputs["retention_ratio"]
    written = sum(expected_counts(pair, [RATIO] * len(SIZES)))
    kept = sum(expected_counts(pair, [LOW_RATIO["retention_ratio"]] * len(SIZES)))
    message = f"{written} image placeholders, but the model keeps {kept} visual tokens.*pass the model all that the processor"
    with pytest.raises(ValueError, match=message):
        pair.pruned(**inputs)


# What the processor refuses.


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("retention_ratio", 35, 35),
        ("retention_ratio", {"a": 1}, {"a": 1}),
        ("retention_ratio", [0.5, 1, "x", 1], "x"),
        ("retention_ratio", [[0.5], [0.5, 1], [0.5]], [0.5]),
        ("token_budget", 2.5, 2.5),
        ("token_budget", [64, 0.5, 64, 1], 0.5),
    ],
    ids=str,
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


@pytest.mark.parametrize(("name", "value"), [("retention_ratio", 0.5), ("token_budget", 64)])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_another_number_of_values_than_images_is_refused(pair, name, value, number):
    with pytest.raises(ValueError, match=rf"`{name}` has {number} values, and the call has 4 images\. .*one value for each"):
        batch(pair, **{name: [value] * number})
    with pytest.raises(ValueError, match=rf"`{name}` has {number} values, and the call has 4 images"):
        pair.processor._get_num_multimodal_tokens(image_sizes=SIZES, **{name: [value] * number})


# Serving engines ask for numbers ahead.


@pytest.mark.parametrize("budget", [{"retention_ratio": RATIO}, {"token_budget": BUDGETS}], ids=str)
def test_the_number_asked_for_ahead_is_the_number_written(pair, budget):
    ahead = pair.processor._get_num_multimodal_tokens(image_sizes=SIZES, **budget)
    assert list(ahead["num_image_tokens"]) == placeholders(batch(pair, **budget))
    assert list(ahead["num_image_patches"]) == [1] * len(SIZES)
    plain = pair.processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert list(plain["num_image_tokens"]) == placeholders(batch(pair)) != list(ahead["num_image_tokens"])


def test_a_budget_at_loading_is_that_of_every_call(pair, tmp_path):
    """Engines give what a request asks for to the processor's loading, and some to its calls as well."""
    pair.processor.save_pretrained(tmp_path)
    loaded = type(pair.processor).from_pretrained(tmp_path, retention_ratio=RATIO)
    own = dataclasses.replace(pair, processor=loaded)
    for call, expected in (({}, {"retention_ratio": RATIO}), ({"token_budget": 50}, {"token_budget": 50})):
        inputs, of_calls = batch(own, **call), batch(pair, **expected)
        assert inputs.keys() == of_calls.keys() >= {"retention_ratio"}
        assert all(torch.equal(inputs[name], of_calls[name]) for name in inputs)
        ahead = loaded._get_num_multimodal_tokens(image_sizes=SIZES, **call)
        assert list(ahead["num_image_tokens"]) == placeholders(of_calls)
    assert loaded.token_layout(60, 100).num_retained == pair.processor.token_layout(60, 100, RATIO).num_retained
    assert loaded.pruning_config == pair.processor.pruning_config
    # Nothing of it is saved.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (tmp_path / "processor_config.json").read_text()
    for wrong, message in (
        ({"retention_ratio": 1.5}, "above 0 and at most 1"),
        ({"token_budget": 5, "retention_ratio": 0.5}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            type(pair.processor).from_pretrained(tmp_path, **wrong)


# A budget of tokens.


@pytest.mark.parametrize("budget", [37, 10**6, torch.tensor(BUDGETS)], ids=str)
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


CONFIGURED = [
    ({"token_budget": 50, "keep_newlines": False}, {"retention_ratio": RATIO}),
    ({"retention_ratio": 0.25}, {"token_budget": 64}),
    ({"global_ratio": 0.4, "local_window": 3}, {"retention_ratio": RATIO}),
]


@pytest.mark.parametrize(("configured", "budget"), CONFIGURED, ids=str)
def test_a_call_rules_over_every_configuration(pair, configured, budget):
    with settings(pair, configured):
        inputs = batch(pair, **budget)
        assert placeholders(inputs) != placeholders(batch(pair))
        got = logits(pair.pruned, inputs)
    shared = {name: value for name, value in configured.items() if name not in ("retention_ratio", "token_budget")}
    with settings(pair, {**shared, **budget}):
        expected_inputs = batch(pair)
        assert torch.equal(inputs["input_ids"], expected_inputs["input_ids"])
        torch.testing.assert_close(got, logits(pair.pruned, expected_inputs), atol=1e-5, rtol=0)


# Threads and compilers.


def test_threads_do_not_disturb_each_other(pair):
    budgets = [{"retention_ratio": RATIOS}, {"retention_ratio": RATIO}, {}, {"token_budget": 50}]
    expected = [batch(pair, **budget) for budget in budgets]
    assert len({tuple(placeholders(inputs)) for inputs in expected}) == len(budgets)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(budgets)) as threads:
            got = list(threads.map(lambda budget: batch(pair, **budget), budgets * 4))
    finally:
        sys.setswitchinterval(before)
    for inputs, wanted in zip(got, expected * 4, strict=True):
        assert_same_inputs(inputs, wanted)


def test_a_compiled_model_follows():
    """LLaVA-1.5, as LLaVA-NeXT is compiled in test_compile.py."""
    pruning = {**LOW_RATIO, "importance_start_layer": 0, "importance_num_layers": 1}
    pair = twins(pruning, family="llava", vision_layers=2, text_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(pair.pruned, backend="eager")
    try:
        inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt", retention_ratio=RATIO)
        torch.testing.assert_close(logits(compiled, inputs), logits(pair.pruned, inputs), atol=1e-5, rtol=0)
    finally:
        torch._dynamo.reset()
