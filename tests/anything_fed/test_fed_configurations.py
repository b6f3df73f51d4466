"""Any configuration that may be fed, by whatever route: settings, files, a processor that belongs to another model.

After every case a good call on the same model and processor gives what it gave before.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fed import PROMPT, Bench
from hivtp_hf import (
    HIVTPLlavaNextConfig,
    HIVTPLlavaNextForConditionalGeneration,
    HIVTPLlavaNextProcessor,
    VisualTokenPruningConfig,
)
from tiny_models import photo, pruned_config, pruned_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Saved from a bench of its own: saving writes into a configuration, as it does for stock models."""
    folder = tmp_path_factory.mktemp("checkpoint")
    source = Bench()
    source.model.save_pretrained(folder)
    source.processor.save_pretrained(folder)
    return folder


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


RATIO = r"`retention_ratio` is .*above 0 to 1"
WINDOW = r"`local_window` is .*whole number from 1"
NO_SETTINGS = "`pruning_config` is .*it must be a dict of settings"
# name: (settings, piece of the error's message)
BAD_SETTINGS = {
    "a list": ([], NO_SETTINGS),
    "a list of pairs": ([("method", "hivtp")], NO_SETTINGS),
    "a string": ("hivtp", NO_SETTINGS),
    "json": ('{"retention_ratio": 0.5}', NO_SETTINGS),
    "a number": (0.5, NO_SETTINGS),
    "a boolean": (True, NO_SETTINGS),
    "nan": (float("nan"), NO_SETTINGS),
    "a set": ({"hivtp"}, NO_SETTINGS),
    "keys that are no strings": ({1: 2}, NO_SETTINGS),
    "the class itself": (VisualTokenPruningConfig, NO_SETTINGS),
    "a very deep list": (nested(100_000), f"a value that cannot be printed.*{NO_SETTINGS[-20:]}"),
    "unknown key": ({"budget": 100}, "`budget`: not a setting of the method 'hivtp'.*`retention_ratio`"),
    "key of another case": ({"Retention_Ratio": 0.5}, "`Retention_Ratio`: not a setting"),
    "key that Python uses": ({"self": 1}, "`self`: not a setting"),
    "nested once more": ({"pruning_config": {"retention_ratio": 0.5}}, "`pruning_config`: not a setting"),
    "unknown method": ({"method": "nonesuch"}, "`method` is 'nonesuch'.*one of 'hivtp'"),
    "no method": ({"method": None}, "`method` is None"),
    "ratio as a string": ({"retention_ratio": "0.5"}, RATIO),
    "ratio in percent": ({"retention_ratio": 50}, RATIO),
    "ratio as a boolean": ({"retention_ratio": True}, RATIO),
    "ratio of nan": ({"retention_ratio": float("nan")}, RATIO),
    "infinite ratio": ({"retention_ratio": float("inf")}, RATIO),
    "ratio of zero": ({"retention_ratio": 0}, RATIO),
    "negative ratio": ({"retention_ratio": -0.0}, RATIO),
    "complex ratio": ({"retention_ratio": 0.5 + 0j}, RATIO),
    "ratio as a tensor": ({"retention_ratio": torch.tensor(0.5)}, RATIO),
    "ratio as an array": ({"retention_ratio": np.array([0.5])}, RATIO),
    "huge ratio": ({"retention_ratio": 10**400}, RATIO),
    "ratio of more digits than Python prints": ({"retention_ratio": 10**5000}, "cannot be printed.*above 0 to 1"),
    "window as a float": ({"local_window": 2.0}, WINDOW),
    "window as a string": ({"local_window": "2"}, WINDOW),
    "window as a boolean": ({"local_window": True}, WINDOW),
    "huge window": ({"local_window": 10**101}, f"`local_window` is .*whole number from 1 to {10**100}"),
    "window beyond all floats": ({"local_window": 10**400}, f"{WINDOW} to "),
    "window of more digits than Python prints": ({"local_window": -(10**5000)}, WINDOW),
    "flag as a number": ({"exact_count": 1}, "`exact_count` is 1 .*True or False"),
    "flag as a string": ({"keep_newlines": "no"}, "`keep_newlines` is 'no' .*True or False"),
    "a very long string": ({"method": "x" * 10**6}, r"`method` is 'x{399} \.\.\. x{49}' \(str\)"),
}
ROUTES = {
    "from_dict": lambda bench, settings: VisualTokenPruningConfig.from_dict(settings),
    "configuration": lambda bench, settings: HIVTPLlavaNextConfig(pruning_config=settings),
    "model's configuration": lambda bench, settings: setattr(bench.model.config, "pruning_config", settings),
    "new processor": lambda bench, settings: pruned_processor(bench.stock_processor, settings),
    "processor": lambda bench, settings: setattr(bench.processor, "pruning_config", settings),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_are_refused(bench, name, route):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message) as error:
        ROUTES[route](bench, settings)
    assert len(str(error.value)) < 2000


LOADERS = {
    "configuration": HIVTPLlavaNextConfig.from_pretrained,
    "model": HIVTPLlavaNextForConditionalGeneration.from_pretrained,
    "processor": HIVTPLlavaNextProcessor.from_pretrained,
    "auto configuration": AutoConfig.from_pretrained,
    "auto model": AutoModelForImageTextToText.from_pretrained,
    "auto processor": AutoProcessor.from_pretrained,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["a list", "ratio as a string", "unknown method", "window as a boolean"])
def test_settings_given_to_from_pretrained(checkpoint, name, loader):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](checkpoint, pruning_config=settings)


def changed(**values):
    """A JSON file with some values replaced."""
    return lambda data: json.dumps({**json.loads(data), **values}).encode()


NO_JSON = "is not a valid JSON file"
MODEL_LOADERS = ("configuration", "model", "auto configuration", "auto model")
PROCESSOR_LOADERS = ("processor", "auto processor")
# name: (file, its new content from the old one, or None to remove it, what loads it, type of the error, piece of its message)
BAD_FILES = {
    "truncated configuration": ("config.json", lambda data: data[:200], MODEL_LOADERS, OSError, NO_JSON),
    "empty configuration": ("config.json", lambda data: b"", MODEL_LOADERS, OSError, NO_JSON),
    "binary configuration": ("config.json", lambda data: b"\xff\xfe\x00\x80" * 10, MODEL_LOADERS, OSError, NO_JSON),
    "configuration in yaml": ("config.json", lambda data: b"model_type: hivtp_llava_next\n", MODEL_LOADERS, OSError, NO_JSON),
    "no configuration": ("config.json", None, ("auto configuration", "auto model"), ValueError, "Unrecognized model"),
    **{
        name: ("config.json", content, ("configuration", "model"), ValueError, "no config.json that names its `model_type`")
        for name, content in (
            ("no configuration, our class", None),
            ("empty object", lambda data: b"{}"),
            ("list", lambda data: b"[]"),
        )
    },
    "settings that are a list": ("config.json", changed(pruning_config=[]), MODEL_LOADERS, ValueError, NO_SETTINGS),
    "settings with nan": (
        "config.json",
        changed(pruning_config={"retention_ratio": float("nan")}),
        MODEL_LOADERS,
        ValueError,
        RATIO,
    ),
    "settings of a later release": (
        "config.json",
        changed(pruning_config={"budget": 3}),
        MODEL_LOADERS,
        ValueError,
        "`budget`: not a setting",
    ),
    "no pinpoints": ("config.json", changed(image_grid_pinpoints=[]), ("model", "auto model"), ValueError, "`pinpoints` is"),
    "odd pinpoints": (
        "config.json",
        changed(image_grid_pinpoints=[[56, 100]]),
        ("model", "auto model"),
        ValueError,
        r"\(56, 100\) does not divide into tiles of 56 pixels",
    ),
    "enormous pinpoints": (
        "config.json",
        changed(image_grid_pinpoints=[[56 * 10**6, 56 * 10**6]]),
        ("model", "auto model"),
        ValueError,
        "131072 are allowed",
    ),
    "another vision tower": (
        "config.json",
        changed(vision_config=None),
        ("model", "auto model"),
        ValueError,
        "does not divide into tiles of 336 pixels",
    ),
    "no weights": ("model.safetensors", None, ("model", "auto model"), OSError, "no file named model.safetensors"),
    "truncated weights": (
        "model.safetensors",
        lambda data: data[:1000],
        ("model", "auto model"),
        SafetensorError,
        "deserializing header",
    ),
    "no processor": ("processor_config.json", None, PROCESSOR_LOADERS, OSError, "Can't load image processor"),
    "truncated processor": ("processor_config.json", lambda data: data[:200], PROCESSOR_LOADERS, OSError, NO_JSON),
    "processor's settings that are a list": (
        "processor_config.json",
        changed(pruning_config=[]),
        PROCESSOR_LOADERS,
        ValueError,
        NO_SETTINGS,
    ),
    "no tokenizer": ("tokenizer.json", None, PROCESSOR_LOADERS, ValueError, "instantiate the backend tokenizer"),
    "truncated tokenizer": ("tokenizer.json", lambda data: data[:200], PROCESSOR_LOADERS, ValueError, "line 10"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_damaged_or_missing(checkpoint, name, tmp_path):
    file, change, loaders, error, message = BAD_FILES[name]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change is not None:
        (folder / file).write_bytes(change(content))
    for loader in loaders:
        with pytest.raises(error, match=message):
            LOADERS[loader](folder)


def test_a_folder_that_is_not_there(tmp_path):
    for loader in LOADERS.values():
        with pytest.raises((OSError, ValueError), match="nowhere"):
            loader(tmp_path / "nowhere")


def test_a_sound_copy_loads_and_gives_the_same(bench, checkpoint):
    """So that what the damaged copies say is due to the damage."""
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = HIVTPLlavaNextProcessor.from_pretrained(checkpoint)
    inputs, ours = bench.one_image(), processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    assert torch.equal(ours.input_ids, inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, bench.model(**inputs).logits)


OTHER_SETTINGS = r"the prompt has .*retention_ratio=0\.25.*processor\.pruning_config = model\.config"


def test_a_processor_without_settings_prunes_by_default_and_the_model_says_so(bench, checkpoint, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(checkpoint, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings["pruning_config"]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    processor = HIVTPLlavaNextProcessor.from_pretrained(folder)
    assert processor.pruning_config == VisualTokenPruningConfig()
    with pytest.raises(ValueError, match=OTHER_SETTINGS):
        bench.model(**processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"))


DIFFERENT_COUNTS = [
    {},
    {"retention_ratio": 0.3},
    {"retention_ratio": 1.0},
    {"retention_ratio": 1e-9},
    {"retention_ratio": 0.25, "keep_newlines": False},
    {"global_ratio": 0.0, "local_window": 10**30, "regions": 10**30},
]


@pytest.mark.parametrize("settings", DIFFERENT_COUNTS, ids=str)
def test_a_processor_of_other_settings_with_other_counts(bench, settings):
    processor = pruned_processor(bench.stock_processor, settings)
    assert processor.token_layout(60, 100).num_retained != bench.processor.token_layout(60, 100).num_retained
    inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    for call, limits in ((bench.model, {}), (bench.model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match=OTHER_SETTINGS):
            call(**inputs, **limits)


EQUAL_COUNTS = [
    {"retention_ratio": 0.25, "global_ratio": 0.9, "local_window": 7},
    {"retention_ratio": 0.25, "importance_start_layer": 0, "importance_num_layers": 1},
    {"retention_ratio": 0.25, "importance_start_layer": 30},
    {"retention_ratio": 0.2505},
    {"retention_ratio": 0.25, "regions": 4},
]


@pytest.mark.parametrize("settings", EQUAL_COUNTS, ids=str)
def test_a_processor_of_other_settings_with_equal_counts(bench, settings):
    processor = pruned_processor(bench.stock_processor, settings)
    assert processor.pruning_config != bench.model.config.pruning_config
    inputs, expected = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"), bench.one_image()
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    assert torch.equal(bench.check_model(inputs), bench.check_model(expected))


# What else a processor may have of another model: name: (its attributes, piece of the error's message)
OTHER_PROCESSORS = {
    "larger patches": ({"patch_size": 14}, "the prompt has"),
    "patches that do not divide": ({"patch_size": 9}, "56 pixels does not divide into patches of 9 pixels"),
    "no patch size": ({"patch_size": None}, "`patch_size` is None"),
    "patch size as a string": ({"patch_size": "7"}, "`patch_size` is '7'"),
    "patch size of zero": ({"patch_size": 0}, "`patch_size` is 0"),
    "no class token": ({"num_additional_image_tokens": 0}, "the prompt has"),
    "class token kept": ({"vision_feature_select_strategy": "full"}, "the prompt has"),
}


@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_a_processor_of_another_model(bench, name):
    attributes, message = OTHER_PROCESSORS[name]
    processor = pruned_processor(bench.stock_processor, bench.model.config.pruning_config)
    for attribute, value in attributes.items():
        setattr(processor, attribute, value)
    with pytest.raises(ValueError, match=message):
        bench.model(**processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"))


# What a model's configuration may have of another model: name: (its attributes, piece of the error's message)
OTHER_MODELS = {
    "another image token": ({"image_token_index": 7}, "the prompt has 0 image placeholders"),
    "other pinpoints": ({"image_grid_pinpoints": [[56, 112]]}, "the prompt has"),
    "more tiles": ({"image_grid_pinpoints": [[168, 168]]}, "images of 5 tiles.*up to 10 tiles"),
    "no pinpoints": ({"image_grid_pinpoints": []}, "`pinpoints` is"),
    "pinpoints without end": ({"image_grid_pinpoints": [[56 * 10**6, 56]]}, "131072 are allowed"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_configuration_of_another_model(bench, name):
    attributes, message = OTHER_MODELS[name]
    config = bench.model.config
    before = {attribute: getattr(config, attribute) for attribute in attributes}
    try:
        for attribute, value in attributes.items():
            setattr(config, attribute, value)
        with pytest.raises(ValueError, match=message):
            bench.model(**bench.one_image())
    finally:
        for attribute, value in before.items():
            setattr(config, attribute, value)


HUGE_BUT_VALID = {"local_window": 10**100, "regions": 10**100, "global_ratio": 1e-300}


def test_huge_settings_that_mean_something(bench):
    """A window larger than a tile is one window, and more regions than cells are one region a cell."""
    config = pruned_config(bench.stock.config, {**HUGE_BUT_VALID, "importance_start_layer": 1, "importance_num_layers": 2})
    model = HIVTPLlavaNextForConditionalGeneration(config).eval()
    model.load_state_dict(bench.stock.state_dict())
    processor = pruned_processor(bench.stock_processor, config.pruning_config)
    inputs = processor(images=photo(112, 112), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(inputs.pixel_values, inputs.image_sizes)
        assert model(**inputs).logits.shape[1] == inputs.input_ids.shape[1]
    layout = processor.token_layout(112, 112)
    assert layout.tile_totals == (1,) * 5
    assert len(features.kept_indices[0]) == layout.num_retained == 5 + 16
    assert VisualTokenPruningConfig.from_dict(json.loads(json.dumps(config.pruning_config.to_dict()))) == config.pruning_config
