"""`stages`: what every layer sees, against layouts, published outputs and plain rules; and what is refused.

Logits, answers and gradients are held against a plain loop over stock's layers in test_weights_and_positions.py and
test_qwen_vl_weights_and_stages.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints.language_model_cost import kv_cache_bytes, prefill_flops
from hivtp_hf.pruning.compat import cache_argument, cache_of
from hivtp_hf.pruning.layout import StitchedViews, TokenLayout
from hivtp_hf.pruning.prompt_columns import SURVIVES_ALL, PromptColumns
from hivtp_hf.pruning.staged_language_model import StagedLanguageModel
from hivtp_hf.pruning.stages import left_after_stages, stages_of_language_model, stages_survived, tokens_of_layers
from places_reference import Placed
from tiny_models import CACHE_NAMES, IMAGE_TOKEN, photo, twins

GOLDEN = Path(__file__).parents[1] / "data" / "vflowopt.npz"
STAGES = {"retention_ratio": 0.6, "stages": [[1, 0.5], [3, 0.4]]}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(STAGES, family=request.param, text_layers=4)


def inputs_of(pair, texts=("a <image> b c",), sizes=((90, 60),), **arguments):
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    return pair.processor(images=images, text=list(texts), return_tensors="pt", padding=True, **arguments)


# Settings.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ([[8, 0.5], [16, 0.25]], ((8, 0.5), (16, 0.25))),
        ("8:0.5+16:0.25", ((8, 0.5), (16, 0.25))),
        ("0.25:0.5+20:1", ((0.25, 0.5), (20, 1.0))),
        (((3, 1),), ((3, 1.0),)),
        ([], ()),
        ("", ()),
        (None, ()),
    ],
    ids=repr,
)
def test_how_stages_are_written(written, meant):
    pruning = VisualTokenPruningConfig(stages=written)
    assert pruning.stages == meant
    assert VisualTokenPruningConfig.from_dict(pruning.to_dict()) == pruning
    assert pruning.to_dict()["stages"] == [list(stage) for stage in meant]
    assert pruning.drops_in_stages == any(ratio < 1 for _, ratio in meant)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stages": [8]}, r"`stages` is \[8\] \(list\); it must be pairs of a decoder layer and the share"),
        ({"stages": "8"}, "must be pairs"),
        ({"stages": "eight:0.5"}, "must be pairs"),
        ({"stages": [[0, 0.5]]}, "A layer is a whole number from 1"),
        ({"stages": [[1.5, 0.5]]}, "above 0 and below 1"),
        ({"stages": [[8, 0]]}, "a share is above 0 and at most 1"),
        ({"stages": [[8, 1.5]]}, "a share is above 0 and at most 1"),
        ({"stages": [[8, True]]}, "must be pairs"),
        ({"stages": [[8, 0.5], [8, 0.5]]}, "their layers must ascend, each once"),
        ({"stages": [[0.5, 0.5], [0.25, 0.5]]}, "their layers must ascend, each once"),
        ({"stages": [[8, 0.5]], "exact_count": False}, "and `exact_count` False; how many tokens a stage leaves"),
        ({"stages": [[8, 0.5]], "method": "uniform"}, "'uniform' does not rank tokens.*'hivtp', 'hiprune'"),
        ({"stages": [[8, 0.5]], "method": "none"}, "'none' does not rank tokens"),
    ],
    ids=str,
)
def test_stages_that_cannot_be(settings, named):
    with pytest.raises(ValueError, match=named):
        VisualTokenPruningConfig(**settings)


@pytest.mark.parametrize("stages", [[[4, 0.5]], [[0.1, 0.5]], [[0.9, 0.5], [3, 0.5]]], ids=repr)
def test_stages_must_lie_inside_the_language_model(stages):
    with pytest.raises(ValueError, match=r"the language model has 4 layers, so they must ascend from 1 to 3\. Change `stages`"):
        twins({"stages": stages}, text_layers=4)


# Ranks and counts.


@given(st.integers(0, 60), st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(0, 2**16))
def test_what_survives_is_what_plain_sorting_leaves(number, ratios, seed):
    random = np.random.default_rng(seed)
    importance = random.integers(0, 6, number).astype(np.float32)  # with ties
    importance[random.random(number) < 0.1] = np.nan
    is_ranked = random.random(number) < 0.8
    found = stages_survived(torch.tensor(importance), torch.tensor(is_ranked), ratios).tolist()
    left = sorted(
        np.flatnonzero(is_ranked), key=lambda token: (np.inf if np.isnan(importance[token]) else -importance[token], token)
    )
    expected = [SURVIVES_ALL] * number
    for stage, stays in enumerate(left_after_stages(len(left), ratios)):
        for token in left[stays:]:
            expected[token] = stage
        left = left[:stays]
    assert found == expected


def test_halves_are_rounded_to_even():
    assert left_after_stages(5, [0.5, 0.5]) == [3, 1]  # 5 - round(2.5), then 3 - round(1.5)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 1), st.floats(0.05, 1), st.sampled_from(["none", "rows", "end"]))
def test_counts_of_layers(rows, columns, first, second, newlines):
    pruning = VisualTokenPruningConfig("hiprune", retention_ratio=0.7, stages=[[2, first], [0.5, second]])
    layout = TokenLayout(None, pruning, [StitchedViews(rows, columns, newlines=newlines)])
    cells = layout.num_retained - layout.num_newlines
    tokens = tokens_of_layers(layout, 8)
    lengths = [cells, *left_after_stages(cells, [first, second])]
    assert tokens == [layout.num_newlines + lengths[number] for number in (0, 0, 1, 1, 2, 2, 2, 2)]


def test_layers_hold_what_layouts_count(pair):
    """In the cache, in hidden states and in attention maps; at every ratio of a call."""
    pair.pruned.set_attn_implementation("eager")
    for ratio in (None, 0.3, 1.0):
        inputs = inputs_of(pair, retention_ratio=ratio)
        with torch.no_grad():
            output = pair.pruned(**inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
        pruning = pair.pruned.config.pruning_config.for_call(ratio)
        layout = pair.pruned.model.token_layout(90, 60, pruning)
        text = inputs["input_ids"].shape[1] - layout.num_retained
        expected = [text + tokens for tokens in tokens_of_layers(layout, 4)]
        assert [layer.keys.shape[2] for layer in cache_of(output).layers] == expected
        # What enters the first layer, and what each layer returns.
        assert [state.shape[1] for state in output.hidden_states] == [expected[0], *expected]
        assert [attention.shape[-1] for attention in output.attentions] == expected
        assert output.logits.shape[1] == inputs["input_ids"].shape[1]
    pair.pruned.set_attn_implementation("sdpa")


def test_costs_are_those_of_a_run(pair):
    """What torch counts in a pass over an image's tokens alone, and the bytes of its cache."""
    inputs = inputs_of(pair)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    encoded = pair.pruned.get_image_features(**images)
    ids = torch.full((1, len(encoded.pooler_output[0])), IMAGE_TOKEN)
    text_config = pair.pruned.config.get_text_config()
    pair.pruned.set_attn_implementation("eager")  # all pairs of tokens, as matrix products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        given = {"input_ids": ids, "mm_encoder_outputs": {"image": encoded}}
        output = pair.pruned(**given, use_cache=True, logits_to_keep=1)
    pair.pruned.set_attn_implementation("sdpa")
    tokens = tokens_of_layers(pair.pruned.model.token_layout(90, 60), 4)
    angles = [length * text_config.head_dim for length in (tokens[0], tokens[1], tokens[3])]  # a product in older releases
    assert counter.get_total_flops() - prefill_flops(text_config, tokens) in (0, sum(angles))
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(output).layers)
    assert cached == kv_cache_bytes(text_config, tokens, torch.float32)


def test_what_comes_later_changes_nothing_before(pair):
    inputs = inputs_of(pair)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -1] += 1
    with torch.no_grad():
        logits = [pair.pruned(**given).logits for given in (inputs, changed)]
    assert torch.equal(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])


def test_what_is_dropped_shows_the_last_one_before_it(pair):
    inputs = inputs_of(pair)
    with torch.no_grad():
        survived = pair.pruned.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        ).stages_survived[0]
        states = pair.pruned.model(**inputs).last_hidden_state[0]
    first = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    assert (survived < SURVIVES_ALL).any()
    for token, stages in enumerate(survived.tolist(), start=first):
        assert torch.equal(states[token], states[token - 1]) == (stages < SURVIVES_ALL)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no published outputs here")
def test_published_stages_of_vflowopt():
    """What the released loop returns where it is causal: last states, lengths of layers and of their caches, and decoding."""
    golden = np.load(GOLDEN)
    weights = {name[4:]: torch.tensor(golden[name]) for name in golden.files if name.startswith("E_w.")}
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = Qwen2Model(config).eval()
    model.load_state_dict(weights)
    importance, (start, length) = torch.tensor(golden["E_map"]), golden["E_start_len"].tolist()
    embeddings = torch.tensor(golden["E_inputs_embeds"])
    columns = PromptColumns(
        torch.zeros(1, embeddings.shape[1] + 1, dtype=torch.int64),
        torch.zeros(1, embeddings.shape[1]),
        torch.full((1, embeddings.shape[1]), SURVIVES_ALL),
    )
    is_ranked = torch.ones(length, dtype=torch.bool)
    columns.stages_survived[0, start : start + length] = stages_survived(importance, is_ranked, golden["E_ratios"].tolist())
    staged = StagedLanguageModel(model, golden["E_layers_k"].tolist(), columns, weighs=False)
    cache = DynamicCache(config=config)
    name = cache_argument(Qwen2Model.forward)
    with torch.no_grad():
        output = staged(inputs_embeds=embeddings, **{name: cache}, use_cache=True, output_hidden_states=True)
        assert [layer.keys.shape[2] for layer in cache.layers] == golden["E_causal_kvlens"].tolist()
        assert [state.shape[1] for state in output.hidden_states] == golden["E_causal_seqlens"].tolist()
        states = output.hidden_states[-1]
        torch.testing.assert_close(states, torch.tensor(golden["E_causal_last"]), atol=1e-5, rtol=1e-5)
        for step, token in enumerate(golden["E_next_embeds"]):
            got = staged(inputs_embeds=torch.tensor(token)[None], **{name: cache}, use_cache=True).last_hidden_state
            torch.testing.assert_close(got, torch.tensor(golden[f"E_causal_dec{step}"]), atol=1e-5, rtol=1e-5)


def test_placeholders_without_a_token_take_no_part():
    """VFlowOpt's published rule keeps a number that the content decides; then a prompt without the surplus answers alike."""
    settings = {"method": "vflowopt", "retention_ratio": 0.4, "recycling_cell_side": 2.0, "exact_count": False}
    pair = twins(settings, family="llava_next", text_layers=4)
    inputs = inputs_of(pair, ("a <image> b c", "<image> d"), ((90, 60), (56, 110)))
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    encoded = pair.pruned.get_image_features(**images)
    missing = [len(features) - len(kept) for features, kept in zip(encoded.pooler_output, encoded.kept_indices, strict=True)]
    assert max(missing) > 0
    for name in ("pooler_output", "stages_survived"):
        values = [value[surplus:] for value, surplus in zip(encoded[name], missing, strict=True)]
        setattr(encoded, name, values)
    rows = []
    for ids, mask, surplus in zip(inputs["input_ids"], inputs["attention_mask"], missing, strict=True):
        first = int((ids == IMAGE_TOKEN).nonzero()[0])
        rows.append(torch.cat((ids[:first], ids[first + surplus :]))[mask.logical_not().sum() :])
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    answers = pair.pruned.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = pair.pruned(**inputs).logits[:, -1]
    pair.pruned.config.pruning_config = pair.pruned.config.pruning_config.replace(exact_count=True)
    without = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": encoded}}
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        torch.testing.assert_close(logits, pair.pruned(**without, position_ids=positions).logits[:, -1], atol=2e-4, rtol=0)
    assert torch.equal(answers, pair.pruned.generate(**without, max_new_tokens=5, do_sample=False)[:, longest:])


# Refusals.


def test_what_cannot_be_right_is_refused(pair):
    inputs = inputs_of(pair)
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(1, 1, 3, 3\); with `stages` it must be None or"):
        pair.pruned(**{**inputs, "attention_mask": torch.ones(1, 1, 3, 3)})
    other = twins({**STAGES, "stages": [[1, 0.5]]}, family=pair.family.name, text_layers=4).pruned
    with torch.no_grad():
        cache = cache_of(other(**inputs, use_cache=True))
        with pytest.raises(ValueError, match="was filled under 1 stages"):
            pair.pruned(input_ids=torch.full((1, 1), 9), **{CACHE_NAMES[0]: cache})


def test_a_cache_cropped_inside_an_image():
    """Of one row that is right; rows that have lost unequal numbers by then are refused."""
    pair = twins(STAGES, family="llava", text_layers=4)
    for texts, sizes in ((["<image> b c d"], [(90, 60)]), (["<image> b c d", "e <image> f g"], [(90, 60), (60, 60)])):
        inputs = inputs_of(pair, texts, sizes)
        with torch.no_grad():
            output = pair.pruned(**inputs, use_cache=True)
            cache, length = cache_of(output), inputs["input_ids"].shape[1]
            cropped = length - 12
            if len(texts) == 1:
                for layer in cache.layers:  # as a cache that is cropped to an absolute length
                    surplus = layer.keys.shape[2] - cropped
                    if surplus > 0:
                        layer.crop(-surplus)
                more = torch.tensor([[9, 12, 30]])
                again = pair.pruned(input_ids=more, **{CACHE_NAMES[0]: cache})
                expected = Placed(pair, inputs).logits(torch.cat((inputs["input_ids"][:, :cropped], more), dim=1))
                torch.testing.assert_close(again.logits, expected[:, -3:], atol=3e-4, rtol=0)
            else:
                cache.crop(-12)
                with pytest.raises(ValueError, match="rows of the batch have lost unequal numbers of visual tokens"):
                    pair.pruned(
                        input_ids=torch.full((2, 1), 9),
                        attention_mask=torch.ones(2, cropped + 1, dtype=torch.int64),
                        **{CACHE_NAMES[0]: cache},
                    )


def test_language_models_that_were_not_tried_are_refused(monkeypatch):
    pair = twins(STAGES, family="llava", text_layers=4)
    monkeypatch.setattr(pair.pruned.config.text_config, "model_type", "gemma")
    inputs = inputs_of(pair)
    for call in (pair.pruned, pair.pruned.generate):
        with pytest.raises(ValueError, match=r"the language model's type 'gemma'\. Its layers were not tried in segments"):
            call(**inputs)


def test_stages_of_a_depth():
    pruning = VisualTokenPruningConfig(stages=[[0.33, 0.5], [0.66, 0.5]])
    assert stages_of_language_model(pruning, 32) == ((10, 0.5), (21, 0.5))
    assert stages_of_language_model(pruning.replace(stages=[[2, 1.0]]), 32) == ()
