"""`generate` in every mode that stock LLaVA has: the same answers as the oracle, or an error that names the fix."""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    cache_utils,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from families import FAMILIES
from hivtp_hf.pruning import generation as pruned_generation
from hivtp_hf.pruning.compat import prefills_images_in_chunks
from oracle import oracle_inputs
from tiny_models import CACHE_NAMES, COMMON, LOW_RATIO, NEW_TOKENS, greedy, photo, twins

INSTALLED = Version(transformers.__version__)
CHUNKED_PREFILL = "5.23.0"  # the first release that does not drop images there


@dataclass(frozen=True)
class Prompts:
    """One prompt or a batch, padded on the left.

    Attributes:
        name: how tests call it.
        texts: one per row.
        sizes: height and width of the images of each row, in pixels.
    """

    name: str
    texts: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def has_images(self):
        return any(self.sizes)


PROMPTS = [
    Prompts("no image", ("no image at all, and some more text. ASSISTANT:",), ((),)),
    Prompts("one image", ("USER: <image>\nWhat is shown? ASSISTANT:",), (((60, 100),),)),
    Prompts("two images", ("USER: <image> and <image>",), (((112, 112), (37, 300)),)),
    Prompts(
        "one image a row",
        ("USER: <image>\nWhat is shown? ASSISTANT:", "<image> and a longer text than the others have. ASSISTANT:", "<image>"),
        (((60, 100),), ((20, 20),), ((200, 50),)),
    ),
    Prompts(
        "mixed rows",
        ("USER: <image>\nWhat is shown? ASSISTANT:", "no image at all. ASSISTANT:", "<image> and <image>", "<image>"),
        (((60, 100),), (), ((112, 112), (200, 50)), ((20, 20),)),
    ),
]


@dataclass(frozen=True)
class Setting:
    """One way to generate.

    Attributes:
        name: how tests call it.
        changes: what it adds to the arguments that all share.
        oracle_changes: what it adds for the oracle, where stock's path for embeddings lacks this way and another one must
            give the same answers.
        assistant: the kind of assistant model, or None.
        one_prompt: whether stock takes no batches here.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    oracle_changes: dict[str, Any] | None = None
    assistant: str | None = None
    one_prompt: bool = False

    def first_release(self, prompts):
        """The first transformers release that does it right, or None where all do."""
        return CHUNKED_PREFILL if "prefill_chunk_size" in self.changes and prompts.has_images else None


# Small, so that a short prompt reaches the quantised part of a cache.
SMALL_GROUPS = {"nbits": 4, "q_group_size": 16, "residual_length": 16}
SETTINGS = [
    Setting("greedy"),
    Setting("beams", {"num_beams": 3}),
    Setting("beams, two returns", {"num_beams": 4, "num_return_sequences": 2}),
    Setting("sampling", {"do_sample": True}),
    Setting("sampling, three returns", {"do_sample": True, "num_return_sequences": 3}),
    Setting("static cache", {"cache_implementation": "static"}),
    *(
        Setting(f"quantised cache of {config['backend']}", {"cache_implementation": "quantized", "cache_config": config})
        for config in ({"backend": "quanto", **SMALL_GROUPS}, {"backend": "hqq", **SMALL_GROUPS}, {"backend": "fp8"})
    ),
    Setting("no cache", {"use_cache": False}, oracle_changes={}),
    Setting("prompt look-up", {"prompt_lookup_num_tokens": 3}, oracle_changes={}, one_prompt=True),
    Setting("text-only assistant", oracle_changes={}, assistant="text-only", one_prompt=True),
    Setting("stock assistant", oracle_changes={}, assistant="stock", one_prompt=True),
    Setting("pruned assistant", oracle_changes={}, assistant="pruned", one_prompt=True),
    Setting("prefill in chunks", {"prefill_chunk_size": 16}, oracle_changes={}),
    Setting("prefill in one chunk", {"prefill_chunk_size": 4096}, oracle_changes={}),
]
BY_NAME = {item.name: item for item in (*PROMPTS, *SETTINGS)}
CASES = [(setting, prompts) for setting in SETTINGS for prompts in PROMPTS if len(prompts.texts) == 1 or not setting.one_prompt]


def named(cases):
    # quanto compiles a library before its first cache, for a minute on a fresh machine; fp8 is the quantised cache of a commit.
    return [
        pytest.param(
            *case, id=" / ".join(part.name for part in case), marks=pytest.mark.nightly if "quanto" in case[0].name else ()
        )
        for case in cases
    ]


def skip_where_stock_is_wrong(setting, prompts):
    first_release = setting.first_release(prompts)
    if first_release and Version(first_release) > INSTALLED:
        pytest.skip(f"{setting.name}, {prompts.name}: stock itself is wrong before transformers {first_release}")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


@pytest.fixture(scope="module")
def assistants(pair):
    torch.manual_seed(5)
    text_config = copy.deepcopy(pair.stock.config.text_config)
    return {
        None: {},
        "text-only": {"assistant_model": AutoModelForCausalLM.from_config(text_config).eval()},
        # Copies, as transformers writes the state of its schedule into the assistant's configuration.
        "stock": {"assistant_model": copy.deepcopy(pair.stock)},
        "pruned": {"assistant_model": copy.deepcopy(pair.pruned)},
    }


def images_of(prompts):
    return [photo(*size, seed) for seed, size in enumerate(size for row in prompts.sizes for size in row)]


def processed(pair, prompts, **arguments):
    return pair.processor(
        images=images_of(prompts) or None,
        text=list(prompts.texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        **arguments,
    )


@pytest.fixture(scope="module")
def inputs_of(pair):
    """By prompts: what the pruned model and what the oracle is given."""
    return {prompts: (inputs := processed(pair, prompts), oracle_inputs(pair, inputs)) for prompts in PROMPTS}


def generate(model, inputs, **arguments):
    torch.manual_seed(0)
    return model.generate(**inputs, **{**COMMON, **arguments})


def new_tokens(sequences, inputs):
    return sequences[:, inputs["input_ids"].shape[1] :]


def skip_without_cache_backend(setting):
    available = {
        "quanto": (is_optimum_quanto_available(), "optimum-quanto is not installed"),
        "hqq": (is_hqq_available(), "hqq is not installed"),
        "fp8": (hasattr(cache_utils, "Fp8QuantizedLayer"), f"transformers {INSTALLED} has no fp8 cache"),
    }
    backend = setting.changes.get("cache_config", {}).get("backend")
    if backend and not available[backend][0]:
        pytest.skip(f"{setting.name}: {available[backend][1]}")


@pytest.mark.parametrize(("setting", "prompts"), named(CASES))
def test_answers_are_the_oracles(pair, inputs_of, assistants, setting, prompts):
    skip_where_stock_is_wrong(setting, prompts)
    skip_without_cache_backend(setting)
    inputs, for_oracle = inputs_of[prompts]
    oracle_changes = setting.changes if setting.oracle_changes is None else setting.oracle_changes
    # Copied, as transformers may take the backend out of the cache's configuration.
    expected = generate(pair.stock, for_oracle, **copy.deepcopy(oracle_changes))
    sequences = generate(pair.pruned, inputs, **copy.deepcopy(setting.changes), **assistants[setting.assistant])
    returns = setting.changes.get("num_return_sequences", 1)
    assert expected.shape == (len(prompts.texts) * returns, NEW_TOKENS)
    assert torch.equal(new_tokens(sequences, inputs), expected)
    assert torch.equal(sequences[:, : -expected.shape[1]], inputs["input_ids"].repeat_interleave(returns, dim=0))


def test_the_answers_depend_on_every_image(pair, inputs_of):
    """Else the equality above would prove nothing: other pictures of the same sizes give other answers."""
    prompts = BY_NAME["mixed rows"]
    inputs, _ = inputs_of[prompts]
    answers = generate(pair.pruned, inputs)
    row_of_image = [row for row, sizes in enumerate(prompts.sizes) for _ in sizes]
    for image, row in enumerate(row_of_image):
        pixel_values = inputs["pixel_values"].clone()
        pixel_values[image] = pixel_values[image].flip(-1)
        changed = generate(pair.pruned, {**inputs, "pixel_values": pixel_values})
        assert [bool(same.all()) for same in changed == answers] == [other != row for other in range(len(answers))]


def assert_same_steps(steps, expected_steps, tolerance):
    """Nested tuples of tensors, as `generate` returns scores (steps) and states (steps, layers)."""
    assert len(steps) == len(expected_steps)
    for got, expected in zip(steps, expected_steps, strict=True):
        if isinstance(expected, tuple):
            assert_same_steps(got, expected, tolerance)
        else:
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def eager_pair(pair):
    pair = copy.deepcopy(pair)
    for model in (pair.stock, pair.pruned):
        model.set_attn_implementation("eager")
    return pair


@pytest.mark.parametrize("setting", ["greedy", "beams"])
def test_scores_states_and_attentions_are_the_oracles(eager_pair, setting):
    setting, prompts = BY_NAME[setting], BY_NAME["mixed rows"]
    inputs = processed(eager_pair, prompts)
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
        **setting.changes,
    }
    expected = generate(eager_pair.stock, oracle_inputs(eager_pair, inputs), **wanted)
    got = generate(eager_pair.pruned, inputs, **wanted)
    assert torch.equal(new_tokens(got.sequences, inputs), expected.sequences)
    assert len(expected.scores) == NEW_TOKENS
    layers = eager_pair.stock.config.text_config.num_hidden_layers
    rows, length = len(prompts.texts) * setting.changes.get("num_beams", 1), inputs["input_ids"].shape[1]
    assert [states.shape[:2] for states in got.hidden_states[0]] == [(rows, length)] * (layers + 1)
    assert [maps.shape[2:] for maps in got.attentions[0]] == [(length, length)] * layers
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert_same_steps(got[name], expected[name], tolerance=1e-4)
    if "num_beams" in setting.changes:
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


def test_rows_end_by_themselves_at_an_end_token(pair, inputs_of):
    inputs, for_oracle = inputs_of[BY_NAME["mixed rows"]]
    ends = generate(pair.stock, for_oracle)[:, 1].unique().tolist()
    arguments = {"eos_token_id": ends, "pad_token_id": 0, "min_new_tokens": 0}
    expected = generate(pair.stock, for_oracle, **arguments)
    assert expected.shape[1] < NEW_TOKENS
    assert torch.equal(new_tokens(generate(pair.pruned, inputs, **arguments), inputs), expected)


def test_a_streamer_gets_the_oracles_text(pair, inputs_of):
    texts = []
    for model, inputs in zip((pair.pruned, pair.stock), inputs_of[BY_NAME["one image"]], strict=True):
        streamer = TextIteratorStreamer(pair.processor.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=generate, args=(model, inputs), kwargs={"streamer": streamer})
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert "".join(texts[0])
    assert texts[0] == texts[1]


def test_a_prompt_may_come_as_embeddings_beside_its_images(pair, inputs_of):
    inputs, for_oracle = inputs_of[BY_NAME["mixed rows"]]
    with torch.no_grad():
        embeddings = pair.pruned.get_input_embeddings()(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    answers = generate(pair.pruned, {**rest, "inputs_embeds": embeddings})
    assert torch.equal(answers, generate(pair.stock, for_oracle))
    # The oracle's may come without images.
    assert torch.equal(generate(pair.pruned, for_oracle), answers)


@pytest.mark.parametrize("cache_name", CACHE_NAMES)
@pytest.mark.parametrize(
    ("ratios", "sends"),
    [
        ((None, None), "whole conversation"),
        ((None, None), "new part"),
        ((0.6, 0.1), "whole conversation"),
        ((None, 0.6), "new part"),
        ((0.6, None), "new part"),
    ],
    ids=str,
)
def test_a_second_turn_with_a_second_image_goes_on_from_the_cache(pair, ratios, sends, cache_name):
    first = processed(pair, BY_NAME["mixed rows"], retention_ratio=ratios[0])
    cache = DynamicCache(config=pair.pruned.config.get_text_config())
    answered = generate(pair.pruned, first, return_dict_in_generate=True, **{cache_name: cache})
    assert cache.get_seq_length() == answered.sequences.shape[1] - 1

    texts = [" USER: <image> and this? ASSISTANT:", " an image, at last: <image>", " and no other image.", "<image>"]
    images = [photo(90, 60, 20), photo(112, 30, 21), photo(50, 50, 22)]
    second = pair.processor(images=images, text=texts, return_tensors="pt", padding=True, retention_ratio=ratios[1])
    sequences = torch.cat((answered.sequences, second["input_ids"]), dim=1)
    answer_mask = torch.ones_like(new_tokens(answered.sequences, first))
    mask = torch.cat((first["attention_mask"], answer_mask, second["attention_mask"]), dim=1)

    # The oracle reads the whole conversation at once, its images in the order of their rows.
    expected = generate(pair.stock, conversation_for_oracle(pair, first, second, sequences, mask))
    sent = sequences if sends == "whole conversation" else sequences[:, cache.get_seq_length() :]
    inputs = {**second, "input_ids": sent, "attention_mask": mask}
    answers = generate(pair.pruned, inputs, **{cache_name: cache})
    assert torch.equal(answers[:, sent.shape[1] :], expected)


def conversation_for_oracle(pair, first, second, sequences, mask):
    """The oracle's embeddings of two turns: those of each turn, joined by the tokens that answered the first."""
    between = sequences[:, first["input_ids"].shape[1] : -second["input_ids"].shape[1]]
    with torch.no_grad():
        answer = pair.stock.get_input_embeddings()(between)
    parts = (oracle_inputs(pair, first)["inputs_embeds"], answer, oracle_inputs(pair, second)["inputs_embeds"])
    return {"inputs_embeds": torch.cat(parts, dim=1), "attention_mask": mask}


def test_continuous_batching_refuses_images_by_every_way_in(pair, inputs_of):
    model = copy.deepcopy(pair.pruned)  # which it gives another attention implementation
    text, image = (inputs_of[BY_NAME[name]][0]["input_ids"][0].tolist() for name in ("no image", "one image"))
    settings = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)}
    message = f"a prompt has {image.count(model.config.image_token_id)} image placeholders, but continuous batching"
    with pytest.raises(ValueError, match=message):
        model.generate_batch([text, image], max_new_tokens=NEW_TOKENS, **settings)
    with model.continuous_batching_context_manager(**settings) as manager:
        for add in (manager.add_request, lambda ids: manager.add_requests([text, ids])):
            with pytest.raises(ValueError, match=message):
                add(image)
    expected = greedy(pair.pruned, {"input_ids": torch.tensor([text])}, tokens=NEW_TOKENS)
    for pruning in (LOW_RATIO, {"exact_count": False}, {"token_weights": "cluster_size", "positions": "original"}):
        model.config.pruning_config = pruning
        (answer,) = model.generate_batch([text], max_new_tokens=NEW_TOKENS, **settings).values()
        assert answer.generated_tokens == expected[0].tolist()


def test_prefill_in_chunks_is_seen_in_the_releases_that_can():
    assert prefills_images_in_chunks() is (Version(CHUNKED_PREFILL) <= INSTALLED)


@pytest.fixture
def an_older_release(monkeypatch):
    """What 5.19.0 can do, on any release."""
    monkeypatch.setattr(pruned_generation, "prefills_images_in_chunks", lambda: False)


@pytest.mark.usefixtures("an_older_release")
@pytest.mark.parametrize(("setting", "prompts"), [("greedy", "mixed rows"), ("prefill in chunks", "no image")])
def test_what_older_releases_do_right_is_not_refused(pair, inputs_of, assistants, setting, prompts):
    setting, prompts = BY_NAME[setting], BY_NAME[prompts]
    assert setting.first_release(prompts) is None
    test_answers_are_the_oracles(pair, inputs_of, assistants, setting, prompts)


@pytest.mark.usefixtures("an_older_release")
@pytest.mark.parametrize("source", ["keyword", "generation_config", "the model's generation_config"])
def test_a_limit_applies_wherever_the_setting_comes_from(pair, inputs_of, source):
    inputs, _ = inputs_of[BY_NAME["two images"]]
    model, arguments = pair.pruned, {"prefill_chunk_size": 16}
    if source == "generation_config":
        arguments = {"generation_config": GenerationConfig(**arguments)}
    elif source == "the model's generation_config":
        model = copy.deepcopy(pair.pruned)
        model.generation_config.update(**arguments)
        arguments = {"generation_config": GenerationConfig(num_beams=1)}  # which says nothing of chunks
    message = f"`prefill_chunk_size` is 16, with images: transformers {INSTALLED} .*works is {CHUNKED_PREFILL} \\(`pip install"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, **arguments)


@pytest.mark.usefixtures("an_older_release")
def test_a_keyword_lifts_a_limit_that_the_models_configuration_runs_into(pair, inputs_of):
    inputs, for_oracle = inputs_of[BY_NAME["two images"]]
    model = copy.deepcopy(pair.pruned)
    model.generation_config.update(prefill_chunk_size=16)
    answers = generate(model, inputs, prefill_chunk_size=None)
    assert torch.equal(new_tokens(answers, inputs), generate(pair.stock, for_oracle))


@pytest.mark.usefixtures("an_older_release")
def test_the_first_argument_may_be_the_prompt(pair, inputs_of):
    inputs, _ = inputs_of[BY_NAME["two images"]]
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with pytest.raises(ValueError, match="`prefill_chunk_size` is 16, with images"):
        pair.pruned.generate(inputs["input_ids"], **rest, prefill_chunk_size=16, max_new_tokens=2)
