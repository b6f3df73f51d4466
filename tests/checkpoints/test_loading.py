"""However a model is loaded, placed, cast or copied: it keeps the same tokens and gives the same answers."""

import copy
import json
import pickle

import accelerate
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForImageTextToText,
    QuantoConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checkpoints import build_pruned_checkpoint
from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig, select_hivtp
from hivtp_hf.pruning import layout as token_layout
from oracle import oracle_inputs
from tiny_models import LOW_RATIO, Twins, greedy, image_inputs, photo

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("checkpoint"), LOW_RATIO, family.name)


@pytest.fixture(scope="module")
def stock_folder(folder):
    return folder.with_name("stock_source")


@pytest.fixture(scope="module")
def processor(folder, family):
    return family.processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")


@pytest.fixture(scope="module")
def load(folder, family):
    """Loads the checkpoint, or another folder of the family."""

    def load(another_folder=None, **settings):
        return family.model.from_pretrained(another_folder or folder, **settings)

    return load


def kept_indices(model, inputs):
    with torch.no_grad():
        (kept,) = model.get_image_features(**image_inputs(inputs)).kept_indices
    return kept


def answer(model, inputs):
    return kept_indices(model, inputs).tolist(), greedy(model, inputs).tolist()


@pytest.fixture(scope="module")
def expected(load, inputs):
    return answer(load(), inputs)


def assert_oracle_agrees(model, stock, inputs, **tolerance):
    pair = Twins(None, stock, None, model, None)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**oracle_inputs(pair, inputs)).logits, **tolerance)


def forget_layouts():
    """What was asked for before is made anew."""
    token_layout._llava_next_layout.cache_clear()
    token_layout._single_tile_layout.cache_clear()


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_device_map_auto_with_too_little_memory(load, folder, inputs, expected, tmp_path, share):
    size = (folder / "model.safetensors").stat().st_size
    model = load(device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path)
    on_disk = [part for part, place in model.hf_device_map.items() if place == "disk"]
    assert any("vision_tower" in part for part in on_disk) == (share < 0.5)
    assert any("language_model" in part for part in on_disk)
    assert answer(model, inputs) == expected


def test_shards(load, inputs, expected, tmp_path):
    load().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert answer(load(tmp_path), inputs) == expected
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["pruning_config"]["retention_ratio"] == 0.25


def test_quantised_weights(load, family, stock_folder, processor, inputs):
    quantization = QuantoConfig(weights="int8")
    model = load(quantization_config=quantization)
    stock = family.stock_model.from_pretrained(stock_folder, quantization_config=quantization)
    projection = model.model.vision_tower.get_submodule("encoder.layers.6.self_attn.q_proj")
    assert type(projection) is not torch.nn.Linear, "the scored layers' weights are not quantised"
    assert len(kept_indices(model, inputs)) == processor.token_layout(60, 100).num_retained
    assert_oracle_agrees(model, stock, inputs, atol=1e-3, rtol=0)


@pytest.fixture
def spy_attention():
    """An attention implementation that counts by which kind of model it is called; it computes what sdpa does."""
    calls = {"clip_vision_model": 0, "llama": 0}

    def spy(module, *args, **kwargs):
        calls[module.config.model_type] += 1
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("spy_attention", spy)
    yield calls
    del ALL_ATTENTION_FUNCTIONS._global_mapping["spy_attention"]


# What is asked for, and how many layers then run it: the vision layers up to the feature, nine of ten, and both text layers.
ASKED = {
    "string": ("spy_attention", 9, 3),
    "vision": ({"vision_config": "spy_attention", "text_config": "eager"}, 9, 0),
    "text": ({"vision_config": "eager", "text_config": "spy_attention"}, 0, 3),
}


@pytest.mark.parametrize("at_loading", [True, False])
@pytest.mark.parametrize(("asked", "vision_calls", "text_calls"), ASKED.values(), ids=ASKED)
def test_the_attention_implementation_that_is_asked_for_runs(
    load, inputs, expected, spy_attention, at_loading, asked, vision_calls, text_calls
):
    if at_loading:
        model = load(attn_implementation=asked)
    else:
        model = load()
        assert answer(model, inputs) == expected
        model.set_attn_implementation(asked)
    for part, config in [("vision_config", model.config.vision_config), ("text_config", model.config.text_config)]:
        assert config._attn_implementation == (asked if isinstance(asked, str) else asked[part])
    assert model.model.vision_tower.config is model.config.vision_config
    spy_attention.update(clip_vision_model=0, llama=0)
    with torch.no_grad():
        model(**inputs)
    assert spy_attention == {"clip_vision_model": vision_calls, "llama": text_calls}
    assert answer(model, inputs) == expected


def test_models_are_built_from_a_configuration(load, family, folder, inputs):
    config = family.config.from_pretrained(folder)
    base = AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float64)
    assert type(base) is family.base
    assert base.dtype == torch.float64
    assert base.config.vision_config._attn_implementation == "eager"
    model = AutoModelForImageTextToText.from_config(config)
    assert type(model) is family.model
    base.load_state_dict(load().model.state_dict())
    in_double = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    with torch.no_grad():
        hidden = base(**in_double).last_hidden_state
    assert hidden.shape == (*inputs["input_ids"].shape, 64)
    assert torch.equal(kept_indices(base, in_double), kept_indices(load().double(), in_double))


@pytest.mark.parametrize("without_memory", [lambda: torch.device("meta"), accelerate.init_empty_weights])
def test_weights_loaded_after_construction_without_memory(load, family, folder, inputs, expected, without_memory):
    forget_layouts()  # so that layouts are made there too
    with without_memory():
        model = family.model(family.config.from_pretrained(folder)).eval()
    assert all(weight.is_meta for weight in model.parameters())
    loaded = load()
    model.load_state_dict(loaded.state_dict(), assign=True)
    # Buffers that no checkpoint holds (positions, rotary frequencies) stay behind, as in stock models.
    for name, buffer in loaded.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer.clone())
    assert answer(model, inputs) == expected


@pytest.mark.parametrize("part", ["config", "processor"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))], ids=["copy", "pickle"])
def test_configs_and_processors_are_copied_and_pickled(family, folder, processor, part, duplicate):
    original = {"config": family.config.from_pretrained(folder), "processor": processor}[part]
    double = duplicate(original)
    assert type(double) is type(original)
    assert double.to_dict() == original.to_dict()
    assert double.pruning_config == VisualTokenPruningConfig(**LOW_RATIO)
    double.pruning_config = {"retention_ratio": 0.5}
    assert original.pruning_config == VisualTokenPruningConfig(**LOW_RATIO)
    if part == "processor":
        fewer = original(images=photo(60, 100), text=PROMPT)["input_ids"]
        assert len(double(images=photo(60, 100), text=PROMPT)["input_ids"][0]) > len(fewer[0])


def test_a_model_that_has_not_run_is_pickled(load, inputs, expected):
    assert answer(pickle.loads(pickle.dumps(load())), inputs) == expected


def test_a_copied_model_is_a_model_of_its_own(load, inputs, expected):
    model = load()
    answer(model, inputs)
    double = copy.deepcopy(model)
    assert answer(double, inputs) == expected
    assert double.model.config is double.config
    assert double.model.vision_tower.config is double.config.vision_config
    double.config.pruning_config = {**LOW_RATIO, "global_ratio": 0, "regions": 4, "importance_start_layer": 0}
    double.set_attn_implementation("eager")
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert kept_indices(double, inputs).tolist() != expected[0]
    with torch.no_grad():
        for weight in double.parameters():
            weight.zero_()
    assert answer(model, inputs) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(load, family, stock_folder, inputs, dtype):
    stock = family.stock_model.from_pretrained(stock_folder).to(dtype)
    model, by_argument = load().to(dtype), load(dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {weight.dtype for weight in by_argument.parameters()} == {dtype}
    in_dtype = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    assert torch.equal(kept_indices(by_argument, in_dtype), kept_indices(model, in_dtype))
    assert_oracle_agrees(model, stock, in_dtype, atol=0, rtol=0)


def test_another_default_dtype(load, inputs, expected):
    forget_layouts()
    model = load()
    torch.set_default_dtype(torch.float64)
    try:
        assert answer(model, inputs) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_selection_does_not_follow_the_default_device(processor):
    # A user who sets another default device may still select on the CPU, as the processor always does.
    def selected():
        forget_layouts()
        layout = processor.token_layout(60, 100)
        scores = torch.arange(64.0, device="cpu").view(1, 8, 8).repeat(layout.num_views, 1, 1)
        kept = layout.kept_indices(select_hivtp(scores, layout.valid.view_as(scores), layout.pruning))
        return layout.valid, kept, layout.cells(kept), layout.pixel_boxes(kept)

    expected = selected()
    with torch.device("meta"):
        got = selected()
    for tensor, wanted in zip(got, expected, strict=True):
        assert torch.equal(tensor, wanted)


def test_training_after_inference_mode(load, processor):
    # What the first call remembers of an image size must not be a tensor that autograd refuses.
    forget_layouts()
    model = load()
    with torch.inference_mode():
        inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
        answer(model, inputs)
        layout = processor.token_layout(60, 100)
    assert not layout.valid.is_inference()
    inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.vision_tower.get_submodule("encoder.layers.0.self_attn.q_proj").weight.grad.any()
