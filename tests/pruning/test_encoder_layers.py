"""Encoder layers behind all that is read do not run in `forward` and `generate`, and nobody but a clock notices."""

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hivtp_hf.pruning.encoder_layers import EncoderLayers, without_unread_layers
from tiny_models import TOWERS, greedy, image_inputs, photo, settings, twins

PROMPT = "USER: <image>\nWhat is shown?"
NUM_LAYERS = 10  # of the tiny tower
MIDDLE = {"importance_start_layer": 2, "importance_num_layers": 2}


def layers_of(model) -> EncoderLayers:
    (found,) = [module for module in model.modules() if isinstance(module, EncoderLayers)]
    return found


@contextlib.contextmanager
def watched(model):
    """The indices of the encoder layers that run, in their order."""
    ran = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
        for index, layer in enumerate(layers_of(model))
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(pair, size=(60, 100)):
    return pair.processor(images=photo(*size), text=PROMPT, return_tensors="pt")


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    return twins({"retention_ratio": 0.4, **MIDDLE}, vision_feature_layer=-2, **TOWERS[request.param])


@torch.no_grad()
def first_layers_that_run(pair, number, **arguments):
    """Checks that only so many run, and that the model answers as on features that every layer ran for."""
    inputs = {**inputs_of(pair), **arguments}
    with watched(pair.pruned) as ran:
        logits = pair.pruned(**inputs).logits
    assert ran == list(range(number))
    features = pair.pruned.get_image_features(**image_inputs(inputs), **arguments).pooler_output
    embeddings = pair.pruned.get_input_embeddings()(inputs["input_ids"])
    is_image = (inputs["input_ids"] == pair.pruned.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(is_image, torch.cat(list(features)))
    mask = inputs["attention_mask"]
    assert torch.equal(logits, pair.pruned(inputs_embeds=embeddings, attention_mask=mask).logits)


# The feature is the output of layer 8; the tower's depth is 10.
@pytest.mark.parametrize(
    "pruning",
    [
        {"retention_ratio": 0.4, **MIDDLE},
        {"method": "random", "retention_ratio": 0.4},
        {"method": "none"},
        {"retention_ratio": 1, **MIDDLE},
        {"retention_ratio": 0.4, "exact_count": False, **MIDDLE},
    ],
    ids=str,
)
def test_forward_ends_behind_the_feature(pair, pruning):
    with settings(pair, pruning):
        if pruning.get("exact_count", True):
            first_layers_that_run(pair, 9)
        else:
            with watched(pair.pruned) as ran, torch.no_grad():
                pair.pruned(**inputs_of(pair))
            assert ran == list(range(9))


@pytest.mark.parametrize(("given", "number"), [(-1, 10), (3, 4), (-2, 9), ([-2, 2], 9), ([1, -4], 7), (10, 10)], ids=str)
def test_features_may_come_from_any_layer(pair, given, number):
    if isinstance(given, list):  # the projector of a model is made for so many layers
        family = next(geometry for geometry in TOWERS.values() if geometry["family"] == pair.family.name)
        pair = twins({"retention_ratio": 0.4, **MIDDLE}, vision_feature_layer=given, **family)
        first_layers_that_run(pair, number)
    else:
        first_layers_that_run(pair, number, vision_feature_layer=given)


def test_scored_layers_run_as_well(pair):
    scored = {"importance_start_layer": 7, "importance_num_layers": 2}
    with settings(pair, {"retention_ratio": 0.4, **scored}):
        first_layers_that_run(pair, 9, vision_feature_layer=2)


def test_generate_ends_there_too_and_answers_as_stock(pair):
    inputs = inputs_of(pair)
    with watched(pair.pruned) as ran:
        greedy(pair.pruned, inputs)
    assert ran == list(range(9))
    with settings(pair, {"method": "none"}):
        inputs = inputs_of(pair)
        assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, inputs))


def test_a_ratio_per_call_ends_there_too(pair):
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt", retention_ratio=0.6)
    with watched(pair.pruned) as ran, torch.no_grad():
        pair.pruned(**inputs)
        greedy(pair.pruned, inputs)
    assert ran == [*range(9), *range(9)]


def test_get_image_features_runs_every_layer_and_returns_stocks_output(pair):
    inputs = inputs_of(pair)
    asked = {**image_inputs(inputs), "output_hidden_states": True}
    with torch.no_grad():
        pair.pruned(**inputs)  # leaves nothing behind
        with watched(pair.pruned) as ran:
            got = pair.pruned.get_image_features(**asked)
        expected = pair.stock.get_image_features(**asked)
    assert ran == list(range(NUM_LAYERS))
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert len(got.hidden_states) == NUM_LAYERS + 1
    assert all(torch.equal(*states) for states in zip(got.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("index", [11, -12])
def test_a_state_that_is_not_there_is_stocks_error(pair, index):
    with settings(pair, {"method": "random", "retention_ratio": 0.4}), pytest.raises(IndexError):
        pair.pruned(**inputs_of(pair), vision_feature_layer=index)


def test_an_error_on_the_way_leaves_nothing_behind(pair):
    inputs = inputs_of(pair)

    def fail(*args):
        raise RuntimeError("on purpose")

    hook = layers_of(pair.pruned)[4].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        pair.pruned(**inputs)
    hook.remove()
    with watched(pair.pruned) as ran, torch.no_grad():
        pair.pruned.get_image_features(**image_inputs(inputs))
    assert ran == list(range(NUM_LAYERS))


def test_copies_pickles_and_replicas_end_early_too(pair):
    inputs = inputs_of(pair)
    # Once a model has run, hooks of transformers keep it from being pickled.
    fresh = pair.family.model(pair.pruned.config).eval()
    fresh.load_state_dict(pair.pruned.state_dict())
    with torch.no_grad():
        expected = pair.pruned(**inputs).logits
    for other in (pickle.loads(pickle.dumps(fresh)), copy.deepcopy(pair.pruned)):
        with watched(other) as ran, watched(pair.pruned) as ran_here, torch.no_grad():
            assert torch.equal(other(**inputs).logits, expected)
        assert (ran, ran_here) == (list(range(9)), [])
    # As nn.DataParallel makes them: attributes are shared, and parameters and submodules put in.
    layers = layers_of(pair.pruned)
    replica = layers._replicate_for_data_parallel()
    replica._modules = {name: nn.Identity() for name in layers._modules}
    assert all(isinstance(layer, nn.Identity) for layer in replica)
    assert not any(isinstance(layer, nn.Identity) for layer in layers)


def test_a_thread_does_not_shorten_anothers_pass(pair):
    inputs, inside, done = inputs_of(pair), threading.Event(), threading.Event()

    def wait(*args):
        if threading.current_thread().name == "forward":
            inside.set()
            done.wait(60)

    hook = layers_of(pair.pruned)[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: pair.pruned(**inputs), name="forward")
    thread.start()
    assert inside.wait(60)
    ran = []
    last = layers_of(pair.pruned)[-1].register_forward_hook(lambda *args: ran.append(threading.current_thread().name))
    try:
        with torch.no_grad():
            pair.pruned.get_image_features(**image_inputs(inputs))
    finally:
        done.set()
        thread.join()
        hook.remove()
        last.remove()
    assert ran == ["MainThread"]


def test_training_gets_the_same_gradients(pair):
    inputs = inputs_of(pair)
    labels = inputs["input_ids"]

    def gradients(model, forward):
        model.zero_grad()
        forward(**inputs, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    with settings(pair, {"method": "none"}):
        inputs = inputs_of(pair)
        labels = inputs["input_ids"]
        ours = gradients(pair.pruned, pair.pruned)
        stocks = gradients(pair.stock, pair.stock)
    assert ours.keys() == {name for name, gradient in stocks.items() if name in ours or gradient.any()}
    assert all(torch.equal(ours[name], stocks[name]) for name in ours)
    pair.pruned.zero_grad(), pair.stock.zero_grad()


@pytest.mark.parametrize(("model_type", "ends_early"), [("clip_vision_model", True), ("dinov2", False)])
def test_only_towers_that_are_known_end_early(model_type, ends_early):
    """Of another one nobody knows what transformers does to the last state."""

    def stock(**keywords):
        return keywords

    config = SimpleNamespace(model_type=model_type, num_hidden_layers=10)
    given = without_unread_layers(stock, config, -2, ())
    assert given(more=1) == ({"more": 1, "vision_feature_layer": 9} if ends_early else {"more": 1})
