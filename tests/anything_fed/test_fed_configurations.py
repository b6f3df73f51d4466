"""Any configuration that may be fed, by whatever route: settings, files, a processor that belongs to another model.

After every case a good call on the same model and processor gives what it gave before.
"""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from families import FAMILIES
from fed import PROMPT, Bench, cases_by_family, check_indices
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.pruning.registry import METHODS
from tiny_models import image_inputs, photo, pruned_config, pruned_processor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each family one, saved from a bench of its own: saving writes into a configuration, as it does for stock models."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        source = Bench(family)
        source.model.save_pretrained(folders[family])
        source.processor.save_pretrained(folders[family])
    return folders


@pytest.fixture
def checkpoint(bench, checkpoints):
    """The one of the bench's family."""
    return checkpoints[bench.family.name]


RATIO = r"`retention_ratio` is .*above 0 and at most 1"
NO_SETTINGS = "`pruning_config` is .*it must be a dict of settings"
# One of each kind of error; test_pruning_config.py has them all. name: (settings, piece of the error's message)
BAD_SETTINGS = {
    "a list": ([], NO_SETTINGS),
    "unknown key": ({"budget": 100}, "`budget`: not a setting of the method 'hivtp'.*`retention_ratio`"),
    "ratio and budget": ({"retention_ratio": 0.5, "token_budget": 10}, "`retention_ratio` is .*`token_budget` 10.*one of them"),
    "unknown method": ({"method": "nonesuch"}, "`method` is 'nonesuch'.*one of 'hivtp'"),
    "ratio as a string": ({"retention_ratio": "0.5"}, RATIO),
    "ratio of more digits than Python prints": ({"retention_ratio": 10**5000}, "cannot be printed.*above 0 and at most 1"),
    "flag as a number": ({"exact_count": 1}, "`exact_count` is 1 .*True or False"),
}
ROUTES = {
    "configuration": lambda bench, settings: bench.family.config(pruning_config=settings),
    "model's configuration": lambda bench, settings: setattr(bench.model.config, "pruning_config", settings),
    "new processor": lambda bench, settings: pruned_processor(bench.stock_processor, settings),
    "processor": lambda bench, settings: setattr(bench.processor, "pruning_config", settings),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_are_refused(bench, name, route):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        ROUTES[route](bench, settings)


LOADERS = {
    "configuration": lambda family: family.config,
    "model": lambda family: family.model,
    "processor": lambda family: family.processor,
    "auto configuration": lambda family: AutoConfig,
    "auto model": lambda family: AutoModelForImageTextToText,
    "auto processor": lambda family: AutoProcessor,
}


def load(bench, loader, folder, **settings):
    return LOADERS[loader](bench.family).from_pretrained(folder, **settings)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["a list", "ratio as a string"])
def test_settings_given_to_from_pretrained(bench, checkpoint, name, loader):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        load(bench, loader, checkpoint, pruning_config=settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_a_file_names(bench, checkpoint, tmp_path, name):
    """`{"method": ...}` alone, written by hand: both parts prune by it, and save it with all of its settings."""
    folder = tmp_path / "by_hand"
    shutil.copytree(checkpoint, folder)
    # The tower has four layers, of which the last but one gives the features.
    settings = {"method": name, **{"hivtp": {"importance_start_layer": 0}, "hiprune": {"object_layer": 1}}.get(name, {})}
    for file in ("config.json", "processor_config.json"):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "pruning_config": settings}))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = VisualTokenPruningConfig(**settings)
    assert (type(model), type(processor)) == (bench.family.model, bench.family.processor)
    assert model.config.pruning_config == processor.pruning_config == expected
    inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        kept = model.get_image_features(**image_inputs(inputs)).kept_indices[0]
        assert model(**inputs).logits.isfinite().all()
    layout = processor.token_layout(60, 100)
    check_indices(kept, layout)
    assert (len(kept) < layout.num_stock) == (name != "none")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pruning_config"] == expected.to_dict()


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
    "configuration in yaml": ("config.json", lambda data: b"model_type: hivtp_llava\n", MODEL_LOADERS, OSError, NO_JSON),
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
BAD_FILES_BY_FAMILY = {
    "llava_next": {
        **BAD_FILES,
        "no pinpoints": (
            "config.json",
            changed(image_grid_pinpoints=[]),
            ("model", "auto model"),
            ValueError,
            "`pinpoints` is",
        ),
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
    },
    "llava": {
        **BAD_FILES,
        "a tower of images of any size": (
            "config.json",
            changed(vision_config={"model_type": "pixtral"}),
            ("model", "auto model"),
            ValueError,
            "the vision tower is a Pixtral model",
        ),
        "another vision tower": (
            "config.json",
            changed(vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 2}),
            ("model", "auto model"),
            ValueError,
            "the vision tower has 2 layers",
        ),
    },
}


@cases_by_family(BAD_FILES_BY_FAMILY)
def test_files_that_are_damaged_or_missing(bench, checkpoint, name, tmp_path):
    file, change, loaders, error, message = BAD_FILES_BY_FAMILY[bench.family.name][name]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change is not None:
        (folder / file).write_bytes(change(content))
    for loader in loaders:
        with pytest.raises(error, match=message):
            load(bench, loader, folder)


def test_a_folder_that_is_not_there(bench, tmp_path):
    for loader in LOADERS:
        with pytest.raises((OSError, ValueError), match="nowhere"):
            load(bench, loader, tmp_path / "nowhere")


def test_a_sound_copy_loads_and_gives_the_same(bench, checkpoint):
    """So that what the damaged copies say is due to the damage."""
    model = bench.family.model.from_pretrained(checkpoint).eval()
    processor = bench.family.processor.from_pretrained(checkpoint)
    inputs, ours = bench.one_image(), processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    assert torch.equal(ours.input_ids, inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, bench.model(**inputs).logits)


OTHER_SETTINGS = r"the prompt has .*retention_ratio=0\.25.*pruning_config ?= ?model\.config"


def test_a_processor_without_settings_prunes_by_default_and_the_model_says_so(bench, checkpoint, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(checkpoint, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings["pruning_config"]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    processor = bench.family.processor.from_pretrained(folder)
    assert processor.pruning_config == VisualTokenPruningConfig()
    with pytest.raises(ValueError, match=OTHER_SETTINGS):
        bench.model(**processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"))


DIFFERENT_COUNTS = {
    "the default": {},
    "a little more": {"retention_ratio": 0.3},
    "everything": {"retention_ratio": 1.0},
    "nearly nothing": {"retention_ratio": 1e-9},
    "a budget": {"token_budget": 40},
    "another method": {"method": "random"},
    "no method": {"method": "none"},
    "one cell a tile": {"global_ratio": 0.0, "local_window": 10**30, "regions": 10**30},
}
DIFFERENT_COUNTS_BY_FAMILY = {
    "llava_next": {**DIFFERENT_COUNTS, "no newlines": {"retention_ratio": 0.25, "keep_newlines": False}},
    "llava": DIFFERENT_COUNTS,
}


@cases_by_family(DIFFERENT_COUNTS_BY_FAMILY)
def test_a_processor_of_other_settings_with_other_counts(bench, name):
    processor = pruned_processor(bench.stock_processor, DIFFERENT_COUNTS_BY_FAMILY[bench.family.name][name])
    assert processor.token_layout(60, 100).num_retained != bench.processor.token_layout(60, 100).num_retained
    inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    for call, limits in ((bench.model, {}), (bench.model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match=OTHER_SETTINGS):
            call(**inputs, **limits)


EQUAL_COUNTS = {
    "other stages": {"retention_ratio": 0.25, "global_ratio": 0.9, "local_window": 7},
    "other layers": {"retention_ratio": 0.25, "importance_start_layer": 0, "importance_num_layers": 1},
    "layers that the tower does not have": {"retention_ratio": 0.25, "importance_start_layer": 30},
    "a ratio that rounds to the same": {"retention_ratio": 0.2505},
    "other regions": {"retention_ratio": 0.25, "regions": 4},
    "another method": {"method": "hiprune", "retention_ratio": 0.25},
    "a method of other groups": {"method": "gprune", "retention_ratio": 0.25},
}
EQUAL_COUNTS_BY_FAMILY = {
    "llava_next": EQUAL_COUNTS,
    "llava": {
        **EQUAL_COUNTS,
        "a budget": {"token_budget": 16},
        "newlines, of which there are none": {"retention_ratio": 0.25, "keep_newlines": False},
    },
}


@cases_by_family(EQUAL_COUNTS_BY_FAMILY)
def test_a_processor_of_other_settings_with_equal_counts(bench, name):
    processor = pruned_processor(bench.stock_processor, EQUAL_COUNTS_BY_FAMILY[bench.family.name][name])
    assert processor.pruning_config != bench.model.config.pruning_config
    inputs, expected = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"), bench.one_image()
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    assert torch.equal(bench.check_model(inputs), bench.check_model(expected))


# What else a processor may have of another model: name: (its attributes, piece of the error's message)
OTHER_PROCESSORS = {
    "larger patches": ({"patch_size": 14}, "the prompt has"),
    "no patch size": ({"patch_size": None}, "`patch_size` is None"),
    "patch size as a string": ({"patch_size": "7"}, "`patch_size` is '7'"),
    "patch size of zero": ({"patch_size": 0}, "`patch_size` is 0"),
    "class token kept": ({"vision_feature_select_strategy": "full"}, "the prompt has"),
}
OTHER_PROCESSORS_BY_FAMILY = {
    "llava_next": {
        **OTHER_PROCESSORS,
        "patches that do not divide": ({"patch_size": 9}, "56 pixels does not divide into patches of 9 pixels"),
        "no class token": ({"num_additional_image_tokens": 0}, "the prompt has"),
    },
    "llava": {
        **OTHER_PROCESSORS,
        "patches that do not divide": ({"patch_size": 9}, "the prompt has 9 .* keeps 16"),
        "two tokens that are no cells": ({"num_additional_image_tokens": 2}, "the prompt has 17 .* keeps 16"),
        "three tokens that are no cells": (
            {"num_additional_image_tokens": 3},
            "tokens, which are no square|`extra_tokens` is 2",
        ),
    },
}


@cases_by_family(OTHER_PROCESSORS_BY_FAMILY)
def test_a_processor_of_another_model(bench, name):
    attributes, message = OTHER_PROCESSORS_BY_FAMILY[bench.family.name][name]
    processor = pruned_processor(bench.stock_processor, bench.model.config.pruning_config)
    for attribute, value in attributes.items():
        setattr(processor, attribute, value)
    with pytest.raises(ValueError, match=message):
        bench.model(**processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"))


# What a model's configuration may have of another model: name: (its attributes, piece of the error's message)
OTHER_MODELS = {
    "llava_next": {
        "another image token": ({"image_token_index": 7}, "the prompt has 0 image placeholders"),
        "other pinpoints": ({"image_grid_pinpoints": [[56, 112]]}, "the prompt has"),
        "more tiles": ({"image_grid_pinpoints": [[168, 168]]}, "images of 5 tiles.*up to 10 tiles"),
        "no pinpoints": ({"image_grid_pinpoints": []}, "`pinpoints` is"),
        "pinpoints without end": ({"image_grid_pinpoints": [[56 * 10**6, 56]]}, "131072 are allowed"),
    },
    "llava": {
        "another image token": ({"image_token_index": 7}, "the prompt has 0 image placeholders"),
        "a class token among the features": ({"vision_feature_select_strategy": "full"}, "the prompt has 16 .* keeps 17"),
    },
}


@cases_by_family(OTHER_MODELS)
def test_a_configuration_of_another_model(bench, name):
    attributes, message = OTHER_MODELS[bench.family.name][name]
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
    model = bench.family.model(config).eval()
    model.load_state_dict(bench.stock.state_dict())
    processor = pruned_processor(bench.stock_processor, config.pruning_config)
    inputs = processor(images=photo(112, 112), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(**image_inputs(inputs))
        assert model(**inputs).logits.shape[1] == inputs.input_ids.shape[1]
    layout = processor.token_layout(112, 112)
    tiles, newlines = {"llava_next": (5, 16), "llava": (1, 0)}[bench.family.name]
    assert layout.group_totals == (1,) * tiles
    assert len(features.kept_indices[0]) == layout.num_retained == tiles + newlines
    assert VisualTokenPruningConfig.from_dict(json.loads(json.dumps(config.pruning_config.to_dict()))) == config.pruning_config
