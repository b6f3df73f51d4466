"""What vLLM's and SGLang's transformers back ends call, as docs/serving_engines.md lists it, without an engine."""

import functools
import re

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checkpoints import KEY_LAYOUTS, build_pruned_checkpoint, run_without_package, write_key_layout
from families import FAMILIES
from tiny_models import LOW_RATIO, image_inputs, photo

ENGINE_ATTENTION = "attention_of_an_engine"
SIZES = [(60, 100), (100, 60), (56, 56), (170, 50)]
# Engines ask what the largest image costs, and take this for it.
PROFILED_SIZE = (10_000, 10_000)


def attention_of_an_engine(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """Causal attention that finds its cache among `attention_instances`, which the engine gives to the model's forward."""
    attention_instances[module.layer_idx].append(tuple(query.shape))
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ENGINE_ATTENTION, attention_of_an_engine)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("checkpoint"), LOW_RATIO, family.name)


@pytest.fixture(scope="module")
def reference(folder, family):
    """The checkpoint as users load it."""
    return family.model.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return [photo(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def built_by_an_engine(folder, change=lambda model: None):
    """A base model as an engine has it: parameters without memory, changed, filled, and loaded from the file's own keys.

    Args:
        folder: of the checkpoint.
        change: what the engine does to the model before there are weights; it returns further renamings, or None.
    """
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = ENGINE_ATTENTION
    config.dtype = torch.float32
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config=config, dtype=torch.float32, trust_remote_code=True)
    renamings = [mapping.rename_source_key for mapping in get_model_conversion_mapping(model)]
    assert all(parameter.is_meta for parameter in model.parameters())
    change(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan), requires_grad=False))
    load_as_an_engine(model, load_file(folder / "model.safetensors"), renamings)
    return model.eval()


def load_as_an_engine(model, weights, renamings):
    """Fills a base model under the names that transformers' renamings give; those of a fused module by their parts."""
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    children = "|".join(name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False)))
    with torch.no_grad():
        for name, weight in weights.items():
            for rename in renamings:
                name, _ = rename(name)
            name = re.sub(rf"^(?!model\.)(?=(?:{children})\b)", "model.", name)
            part = re.fullmatch(r"(.+\.)([qkv])_proj\.(\w+)", name)
            if name in parameters:
                parameters[name].copy_(weight)
            elif part and f"{part[1]}qkv_proj.{part[3]}" in parameters:
                fused = parameters[f"{part[1]}qkv_proj.{part[3]}"]
                fused.chunk(3)["qkv".index(part[2])].copy_(weight)
            else:
                assert name.startswith("lm_head."), name
    assert not any(parameter.isnan().any() for parameter in parameters.values())


def fuse_projections(model):
    """One linear module for queries, keys and values of every attention module of the tower."""
    for attention in [module for module in model.vision_tower.modules() if hasattr(module, "q_proj")]:
        width = attention.q_proj.in_features
        with torch.device("meta"):
            attention.qkv_proj = nn.Linear(width, 3 * width)
        for name in ("q_proj", "k_proj", "v_proj"):
            delattr(attention, name)
        attention.forward = functools.partial(_fused_forward, attention)


def _fused_forward(attention, hidden_states, attention_mask=None, **kwargs):
    shape = hidden_states.shape[:-1]
    parts = attention.qkv_proj(hidden_states).chunk(3, -1)
    query, key, value = (part.view(*shape, -1, attention.head_dim).transpose(1, 2) for part in parts)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, None)
    output, weights = interface(attention, query, key, value, attention_mask, scaling=attention.scale, **kwargs)
    return attention.out_proj(output.reshape(*shape, -1)), weights


def image_fields(processor, images, **keywords):
    """Of every image by itself what an engine hands to the model, and the prompt's ids."""
    fields = []
    for image in images:
        inputs = processor(images=image, text="<image>\nwhat", return_tensors="pt", **keywords)
        fields.append({name: inputs[name] for name in ("pixel_values", "image_sizes", "retention_ratio") if name in inputs})
        fields[-1]["input_ids"] = inputs["input_ids"]
    return fields


@torch.no_grad()
def features_one_by_one(model, processor, images, **keywords):
    features = []
    for fields in image_fields(processor, images, **keywords):
        fields.pop("input_ids")
        features += model.get_image_features(fields.pop("pixel_values"), **fields).pooler_output
    return features


def assert_close(features, expected):
    assert [len(feature) for feature in features] == [len(feature) for feature in expected]
    for feature, other in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_built_without_memory_and_loaded_afterwards(layout, folder, reference, processor, images, tmp_path):
    """From each set of names that checkpoints have."""
    weights = {name: weight for name, weight in reference.state_dict().items() if name != "lm_head.weight"}
    copy = write_key_layout(folder, tmp_path / layout, weights, layout)
    features = features_one_by_one(built_by_an_engine(copy), processor, images)
    assert_close(features, features_one_by_one(reference, processor, images))


def test_encoder_and_decoder_can_be_told_apart(folder):
    """As vLLM asks, on a model that has not even buffers."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=True)
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model._supports_attention_backend


def test_fused_projections_are_scored(folder, reference, processor, images):
    model = built_by_an_engine(folder, fuse_projections)
    assert not any("q_proj" in name for name, _ in model.vision_tower.named_parameters())
    assert_close(features_one_by_one(model, processor, images), features_one_by_one(reference, processor, images))


@torch.no_grad()
def test_attention_of_the_engine_runs_in_the_language_model_alone(folder, reference, processor, images):
    """And the hidden states, from embeddings and positions, are those of a plain call."""
    model = built_by_an_engine(folder)
    instances = {layer: [] for layer in range(model.config.text_config.num_hidden_layers)}
    for fields in image_fields(processor, images):
        ids = fields.pop("input_ids")
        features = model.get_image_features(fields["pixel_values"], **{"image_sizes": fields.get("image_sizes")}).pooler_output
        embeddings = model.get_input_embeddings()(ids[0])
        embeddings[ids[0] == model.config.image_token_id] = torch.cat(list(features))
        (hidden, *_) = model(
            input_ids=None,
            inputs_embeds=embeddings[None],
            use_cache=False,
            position_ids=torch.arange(ids.shape[1])[None],
            attention_instances=instances,
            return_dict=False,
        )
        expected = reference.model(input_ids=ids, **fields).last_hidden_state
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)
    assert all(len(calls) == len(images) for calls in instances.values())


@torch.no_grad()
def test_a_batch_of_mixed_sizes_is_a_list(reference, processor, images):
    """One tensor per image, as many rows as the engine has set aside, equal to those of the image alone."""
    inputs = processor(images=images, text="<image>" * len(images), return_tensors="pt")
    inputs.pop("input_ids"), inputs.pop("attention_mask")
    features = reference.model.get_image_features(inputs.pop("pixel_values"), **inputs).pooler_output
    assert isinstance(features, list)
    announced = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert [len(feature) for feature in features] == announced["num_image_tokens"]
    assert announced["num_image_patches"] == [1] * len(images)
    assert_close(features, features_one_by_one(reference, processor, images))


def test_placeholders_are_found_by_what_replaces_them(processor, images, reference):
    """By `text_replacement_offsets`, which vLLM reads."""
    text = " and ".join(["<image>"] * len(images))
    inputs = processor(images=images, text=text, return_text_replacement_offsets=True, return_tensors="pt")
    (offsets,) = inputs["text_replacement_offsets"]
    announced = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    for offset, number in zip(offsets, announced, strict=True):
        assert offset["type"] == "image"
        ids = processor.tokenizer.encode(offset["replacement"], add_special_tokens=False)
        assert ids == [reference.config.image_token_id] * number


def test_placeholders_are_found_by_token_types(processor, images):
    """As SGLang does."""
    inputs = processor(
        images=images, text=" and ".join(["<image>"] * len(images)), return_mm_token_type_ids=True, return_tensors="pt"
    )
    announced = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    types = torch.as_tensor(inputs["mm_token_type_ids"])
    assert int((types == 1).sum()) == sum(announced)
    assert torch.equal(types == 1, inputs["input_ids"] == processor.image_token_id)


def test_profiling(reference, processor):
    """The largest image that engines think of: counted, written and encoded, all alike, and none costs more."""
    (announced,) = processor._get_num_multimodal_tokens(image_sizes=(list(PROFILED_SIZE),))["num_image_tokens"]
    (fields,) = image_fields(processor, [Image.new("RGB", PROFILED_SIZE)])
    written = int((fields["input_ids"] == reference.config.image_token_id).sum())
    fields.pop("input_ids")
    with torch.no_grad():
        (features,) = reference.model.get_image_features(**fields).pooler_output
    assert announced == written == len(features)
    others = [(height, width) for height in range(20, 400, 20) for width in range(20, 400, 20)]
    assert max(processor._get_num_multimodal_tokens(image_sizes=others)["num_image_tokens"]) <= announced


def test_a_count_that_depends_on_content_is_refused(folder):
    """Engines place features by the number that an image's size says, and mask nothing out."""
    processor = AutoProcessor.from_pretrained(folder, pruning_config={"exact_count": False})
    with pytest.raises(ValueError, match=r"serving engines need it True.*Set `exact_count=True`"):
        processor._get_num_multimodal_tokens(image_sizes=SIZES)


def test_a_checkpoint_without_weights_says_what_to_do(family, folder, tmp_path):
    """Before the engine looks for weights, and finds none."""
    config = family.config.from_base_model(folder)
    config.save_pretrained(tmp_path / "config_only")
    config = AutoConfig.from_pretrained(tmp_path / "config_only")
    with pytest.raises(ValueError, match=r"config_only has no weights.*`hivtp convert CHECKPOINT TARGET`, and serve TARGET"):
        AutoModel.from_config(config=config, dtype=torch.float32, trust_remote_code=True)
    config.base_model = None
    assert isinstance(AutoModel.from_config(config=config), family.base)


def kept_from_remote_code(folder, seed, height, width):
    """Runs without the package: what a base model keeps that was built and loaded as engines do."""
    import accelerate
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoProcessor
    from transformers.conversion_mapping import get_model_conversion_mapping

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.dtype = torch.float32
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config=config, dtype=torch.float32, trust_remote_code=True).eval()
    renamings = get_model_conversion_mapping(model)
    weights = {}
    for name, weight in load_file(f"{folder}/model.safetensors").items():
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        weights[name.removeprefix("model.")] = weight
    loaded = model.load_state_dict(weights, strict=False, assign=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inputs = processor(images=Image.fromarray(pixels), text="<image>", return_tensors="pt")
    fields = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        kept = model.get_image_features(**fields).kept_indices
    return {"module": type(model).__module__, "missing": loaded.missing_keys, "kept": [indices.tolist() for indices in kept]}


def test_remote_code_keeps_the_same_tokens(folder, reference, processor):
    picture = {"seed": 4, "height": 70, "width": 110}
    result = run_without_package(kept_from_remote_code, folder.with_name("engine"), folder=folder, **picture)
    assert result["module"].startswith("transformers_modules.")
    assert not result["missing"]
    pixels = np.random.default_rng(picture["seed"]).integers(0, 256, (70, 110, 3), dtype=np.uint8)
    inputs = processor(images=Image.fromarray(pixels), text="<image>", return_tensors="pt")
    with torch.no_grad():
        kept = reference.get_image_features(**image_inputs(inputs)).kept_indices
    assert result["kept"] == [indices.tolist() for indices in kept]


@torch.no_grad()
def test_images_inside_the_forward_of_several_requests_in_one_row(folder, reference, processor, images):
    """As SGLang calls it: ids of all requests in a row, pixels padded to the most tiles, and keywords of its own."""
    requests = [processor(images=image, text="<image>\nwhat", return_tensors="pt") for image in images]
    ids = torch.cat([request["input_ids"] for request in requests], dim=1)
    positions = torch.cat([torch.arange(request["input_ids"].shape[1]) for request in requests])[None]
    together = processor(images=images, text="<image>\nwhat" * len(images), return_tensors="pt")
    model = built_by_an_engine(folder)
    instances = {layer: [] for layer in range(model.config.text_config.num_hidden_layers)}
    (hidden, *_) = model(
        input_ids=ids,
        inputs_embeds=None,
        use_cache=False,
        position_ids=positions,
        return_dict=False,
        forward_batch=object(),
        attention_instances=instances,
        **image_inputs(together),
    )
    expected = reference.model(input_ids=ids, position_ids=positions, attention_mask=causal(ids), **image_inputs(together))
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-4, rtol=0)
    assert all(instances.values())


def causal(ids):
    """A mask of four dimensions, as transformers would else take positions that begin anew for packed sequences."""
    length = ids.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    return mask[None, None]
