"""What transformers' own test suite asks of every vision-language model, asked of ours."""

import copy
import inspect
import json

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, GenerationMixin, LlamaConfig, logging

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.pruning.prompt_columns import COLUMN_ARGUMENTS
from tiny_models import LOW_RATIO, greedy, image_features_of, image_inputs, photo, pruned_config, twins

TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT:", "<image> How many?"]
SIZES = [(60, 100), (112, 112)]


# What our forward takes beside stock's arguments.
OUR_ARGUMENTS = ("retention_ratio", *COLUMN_ARGUMENTS)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


@pytest.fixture(params=["base", "model"])
def classes(pair, request):
    """Ours and stock's: those without, and those with a language modelling head."""
    return getattr(pair.family, request.param), getattr(pair.family, f"stock_{request.param}")


@pytest.fixture(scope="module")
def inputs(pair):
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    return dict(pair.processor(images=images, text=TEXTS, return_tensors="pt", padding=True))


@pytest.fixture
def copied(pair):
    """A model that a test may change."""
    return copy.deepcopy(pair.pruned)


def kept_indices(model, inputs):
    with torch.no_grad():
        output = model.get_image_features(**image_inputs(inputs))
    return [kept.tolist() for kept in output.kept_indices]


def logits(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).logits


def seeded(build, *args, **kwargs):
    torch.manual_seed(3)
    return build(*args, **kwargs)


def test_parameters_are_stocks_in_name_order_and_initial_value(pair, classes):
    ours, stocks = classes
    built, stock = seeded(ours, pair.pruned.config), seeded(stocks, pair.stock.config)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(stock, kind)())
        got = dict(getattr(built, kind)())
        assert list(got) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
    assert all(weight.requires_grad for weight in built.parameters())


def test_missing_weights_are_initialised_as_stocks(pair, classes):
    ours, stocks = classes
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # every weight is missing, and would be named
    try:
        built, again = (seeded(ours.from_pretrained, None, config=pair.pruned.config, state_dict={}) for _ in range(2))
        stock = dict(stocks.from_pretrained(None, config=pair.stock.config, state_dict={}).named_parameters())
    finally:
        logging.set_verbosity(level)
    for (name, weight), repeated in zip(built.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, repeated), f"{name} depends on more than the seed"
        if not stock[name].std():
            assert torch.equal(weight, stock[name]), name
        elif weight.numel() > 1000:
            assert float(weight.std()) == pytest.approx(float(stock[name].std()), rel=0.15), name


def test_a_state_dict_loads_without_a_folder(pair, inputs):
    model = pair.family.model.from_pretrained(None, config=pair.pruned.config, state_dict=pair.pruned.state_dict())
    assert torch.equal(logits(model, inputs), logits(pair.pruned, inputs))


def test_weights_of_another_shape_are_refused_or_ignored(pair, copied, inputs, tmp_path):
    copied.save_pretrained(tmp_path)
    config = pair.family.config.from_pretrained(tmp_path)
    config.text_config.vocab_size = 408
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        pair.family.model.from_pretrained(tmp_path, config=config)
    model = pair.family.model.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape[0] == 408
    assert kept_indices(model, inputs) == kept_indices(copied, inputs)


def test_saving_brings_generation_settings_along(pair, copied, tmp_path):
    copied.generation_config.max_new_tokens = 7
    copied.save_pretrained(tmp_path)
    loaded = pair.family.model.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    pair.family.base(loaded.config).save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base" / "generation_config.json").exists()


def test_what_transformers_reads_off_a_class_is_stocks(classes):
    ours, stocks = classes
    names = [
        "base_model_prefix",
        "input_modalities",
        "main_input_name",
        "supports_gradient_checkpointing",
        "_can_compile_fullgraph",
        "_can_record_outputs",
        "_keep_in_fp32_modules",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_no_split_modules",
        "_pp_plan",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
        "_tp_plan",
    ]
    for name in names:
        assert getattr(ours, name, None) == getattr(stocks, name, None), name
    # Stock's parameters in their order, and the ratio of a call in addition, before any further keywords.
    parameters = [*inspect.signature(stocks.forward).parameters]
    assert parameters[-1] == "kwargs"
    assert [*inspect.signature(ours.forward).parameters] == [*parameters[:-1], *OUR_ARGUMENTS, "kwargs"]
    assert issubclass(ours, GenerationMixin) == issubclass(stocks, GenerationMixin)
    assert ours.can_generate() == stocks.can_generate()


def test_plans_of_parallel_layers_are_stocks(pair):
    assert pair.pruned.tp_plan == pair.stock.tp_plan
    assert pair.pruned.tp_plan


def test_embeddings_are_read_and_replaced(copied, inputs):
    assert copied.get_input_embeddings() is copied.model.language_model.embed_tokens
    assert copied.get_output_embeddings() is copied.lm_head
    assert copied.base_model is copied.model
    new = torch.nn.Embedding(400, 64)
    copied.set_input_embeddings(new)
    assert copied.model.get_input_embeddings() is new
    assert logits(copied, inputs).isfinite().all()


def flattened(output):
    """All tensors of an output in order; caches are left out, as they are no tuples."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in flattened(part)]
    return []


def answers_in_tuples(model):
    """Whether a model can be told by its configuration; stock's LLaVA-1.5 stops at its own base model's tuple."""
    model.config.return_dict = False
    try:
        with torch.no_grad():
            return isinstance(model(input_ids=torch.tensor([[1, 5]])), tuple)
    except AttributeError:
        return False


@pytest.mark.parametrize("asked_by", ["argument", "config"])
@pytest.mark.parametrize("part", ["whole", "base"])
def test_tuples_hold_what_outputs_hold(pair, copied, inputs, part, asked_by):
    model = copied if part == "whole" else copied.model
    if (part, asked_by) == ("whole", "config") and not answers_in_tuples(copy.deepcopy(pair.stock)):
        pytest.skip("this transformers release cannot do so itself with this family")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        features = model.get_image_features(**image_inputs(inputs))
        if asked_by == "config":
            model.config.return_dict = False
            as_tuple = model(**inputs, output_hidden_states=True)
            features_tuple = model.get_image_features(**image_inputs(inputs))
        else:
            as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
            features_tuple = model.get_image_features(**image_inputs(inputs), return_dict=False)
    for got, expected in [(as_tuple, output), (features_tuple, features)]:
        assert type(got) is tuple
        tensors, expected_tensors = flattened(got), flattened(expected.to_tuple())
        assert len(tensors) == len(expected_tensors) > 2
        assert all(torch.equal(*both) for both in zip(tensors, expected_tensors, strict=True))


def test_hidden_states_and_attentions_have_the_pruned_length(copied, inputs):
    copied.set_attn_implementation("eager")
    with torch.no_grad():
        output = copied(**inputs, output_hidden_states=True, output_attentions=True)
    batch, length = inputs["input_ids"].shape
    assert [tuple(states.shape) for states in output.hidden_states] == [(batch, length, 64)] * 4
    assert [tuple(maps.shape) for maps in output.attentions] == [(batch, 2, length, length)] * 3
    assert len(torch.cat(image_features_of(output))) == sum(map(len, kept_indices(copied, inputs)))


def test_hidden_states_and_attentions_of_the_tower_are_stocks(pair, copied, inputs):
    stock = copy.deepcopy(pair.stock)
    for model in (stock, copied):
        model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = stock.get_image_features(**image_inputs(inputs), **asked)
        got = copied.get_image_features(**image_inputs(inputs), **asked)
    assert len(got.attentions) == 10
    assert len(got.hidden_states) == 11
    for name in ("attentions", "hidden_states"):
        assert all(torch.equal(*both) for both in zip(got[name], expected[name], strict=True))


def test_calls_are_repeatable_and_the_mode_does_not_matter(copied, inputs):
    expected = logits(copied, inputs)
    assert torch.equal(logits(copied, inputs), expected)
    copied.train()
    assert all(module.training for module in copied.modules())
    assert torch.equal(logits(copied, inputs), expected)
    copied.eval()
    assert not any(module.training for module in copied.modules())


@pytest.mark.parametrize("part", ["whole", "base"])
def test_images_and_placeholders_must_match(pair, inputs, part):
    model = pair.pruned if part == "whole" else pair.pruned.model
    last = {key: value[-1:] for key, value in image_inputs(inputs).items()}
    with pytest.raises(ValueError, match="the prompt has"):  # two prompts with an image each, one image
        model(**{**inputs, **last})
    row = {key: value[:1] for key, value in inputs.items()}
    twice = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in row.items()}
    with pytest.raises(ValueError, match="the prompt has"):  # the same prompt twice, one image
        model(**{**twice, **image_inputs(row)})
    with torch.no_grad():
        first, second = model(**twice)[0]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_the_configuration_goes_round(pair, tmp_path):
    config = pruned_config(pair.stock.config, LOW_RATIO)
    assert type(config.vision_config) is CLIPVisionConfig
    assert type(config.text_config) is LlamaConfig
    assert config.get_text_config() is config.text_config
    as_dict = config.to_dict()
    before = copy.deepcopy(as_dict)
    again = pair.family.config.from_dict(as_dict)
    assert as_dict == before  # reading must not eat what it reads
    assert again.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["pruning_config"] == config.pruning_config.to_dict()
    config.save_pretrained(tmp_path / "sub" / "folder")
    for loaded in (
        pair.family.config.from_pretrained(tmp_path / "sub", subfolder="folder"),
        AutoConfig.from_pretrained(tmp_path / "sub" / "folder"),
        pair.family.config.from_json_file(tmp_path / "sub" / "folder" / "config.json"),
    ):
        assert type(loaded) is pair.family.config
        assert loaded.pruning_config == VisualTokenPruningConfig(**LOW_RATIO)
        for part in ("vision_config", "text_config"):
            assert getattr(loaded, part).to_dict() == getattr(config, part).to_dict()
    assert CLIPVisionConfig.from_pretrained(tmp_path / "sub" / "folder").num_hidden_layers == 10
    assert pair.family.config().vision_config.num_hidden_layers == 24


def test_encoded_images_may_be_handed_to_generate(pair, inputs):
    expected = greedy(pair.pruned, inputs)
    with torch.no_grad():
        encoded = pair.pruned.get_image_features(**image_inputs(inputs))
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(greedy(pair.pruned, {**text, "mm_encoder_outputs": {"image": encoded}}), expected)
