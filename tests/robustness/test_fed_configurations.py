"""Any configuration that may be fed, by whatever route: settings, files, a processor that belongs to another model.

After every case a good call on the same model and processor gives what it gave before.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from families import FAMILIES
from fed import PROMPT, Bench, cases_by_family, check_indices
from hivtp_hf import VisualTokenPruningConfig
from tiny_models import image_inputs, photo, pruned_processor


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


# test_pruning_config.py has all kinds of errors; this is one of them.
BAD_SETTINGS = {"retention_ratio": "0.5"}
RATIO = r"`retention_ratio` is .*above 0 and at most 1"
ROUTES = {
    "configuration": lambda bench, settings: bench.family.config(pruning_config=settings),
    "model's configuration": lambda bench, settings: setattr(bench.model.config, "pruning_config", settings),
    "new processor": lambda bench, settings: pruned_processor(bench.stock_processor, settings),
    "processor": lambda bench, settings: setattr(bench.processor, "pruning_config", settings),
}
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


def test_bad_settings_are_refused_by_every_route(bench, checkpoint):
    for route in ROUTES.values():
        with pytest.raises(ValueError, match=RATIO):
            route(bench, BAD_SETTINGS)
    for loader in LOADERS:
        with pytest.raises(ValueError, match=RATIO):
            load(bench, loader, checkpoint, pruning_config=BAD_SETTINGS)


def test_a_method_that_a_file_names(bench, checkpoint, tmp_path):
    """Settings written by hand, some alone: both parts prune by them, and save them with all others."""
    folder = tmp_path / "by_hand"
    shutil.copytree(checkpoint, folder)
    settings = {"method": "hiprune", "object_layer": 1}
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
    check_indices(kept, processor.token_layout(60, 100))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pruning_config"] == expected.to_dict()


def changed(**values):
    """A JSON file with some values replaced."""
    return lambda data: json.dumps({**json.loads(data), **values}).encode()


NO_TYPE = "no config.json that names its `model_type`"
OURS, ALL_MODELS = ("configuration", "model"), ("configuration", "model", "auto configuration", "auto model")
# name: (the new content of config.json from the old one, or None to remove it, what loads it, piece of the error's message)
BAD_FILES = {
    "truncated": (lambda data: data[:200], ALL_MODELS, "is not a valid JSON file"),
    "no configuration": (None, OURS, NO_TYPE),
    "empty object": (lambda data: b"{}", OURS, NO_TYPE),
    "list": (lambda data: b"[]", OURS, NO_TYPE),
    "settings that are a list": (changed(pruning_config=[]), ALL_MODELS, "`pruning_config` is .*it must be a dict of settings"),
    "settings of a later release": (changed(pruning_config={"budget": 3}), ALL_MODELS, "`budget`: not a setting"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_damaged_or_missing(bench, checkpoint, name, tmp_path):
    change, loaders, message = BAD_FILES[name]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    if change is not None:
        (folder / "config.json").write_bytes(change(content))
    for loader in loaders:
        with pytest.raises((OSError, ValueError), match=message):
            load(bench, loader, folder)


def test_a_folder_that_is_not_there(bench, tmp_path):
    for loader in LOADERS:
        with pytest.raises((OSError, ValueError), match="nowhere"):
            load(bench, loader, tmp_path / "nowhere")


DIFFERENT_COUNTS = [{}, {"retention_ratio": 0.3}, {"method": "none"}]


@pytest.mark.parametrize("settings", DIFFERENT_COUNTS, ids=str)
def test_a_processor_of_other_settings_with_other_counts(bench, settings):
    processor = pruned_processor(bench.stock_processor, settings)
    assert processor.token_layout(60, 100).num_retained != bench.processor.token_layout(60, 100).num_retained
    inputs = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    for call, limits in ((bench.model, {}), (bench.model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match=r"the prompt has .*retention_ratio=0\.25.*pruning_config ?= ?model\.config"):
            call(**inputs, **limits)


EQUAL_COUNTS = [{"importance_start_layer": 30}, {"regions": 4}, {"method": "gprune"}]


@pytest.mark.parametrize("settings", EQUAL_COUNTS, ids=str)
def test_a_processor_of_other_settings_with_equal_counts(bench, settings):
    """What is kept is the model's business."""
    processor = pruned_processor(bench.stock_processor, {"retention_ratio": 0.25, **settings})
    inputs, expected = processor(images=photo(60, 100), text=PROMPT, return_tensors="pt"), bench.one_image()
    assert torch.equal(inputs.input_ids, expected["input_ids"])
    assert torch.equal(bench.check_model(inputs), bench.check_model(expected))


# What else a processor may have of another model: name: (its attributes, piece of the error's message)
OTHER_PROCESSORS = {
    "larger patches": ({"patch_size": 14}, "the prompt has"),
    "no patch size": ({"patch_size": None}, "`patch_size` is None"),
    "class token kept": ({"vision_feature_select_strategy": "full"}, "the prompt has"),
}
OTHER_PROCESSORS_BY_FAMILY = {
    "llava_next": {
        **OTHER_PROCESSORS,
        "patches that do not divide": ({"patch_size": 9}, "the prompt has"),
    },
    "llava": {
        **OTHER_PROCESSORS,
        "patches that do not divide": ({"patch_size": 9}, "the prompt has 9 .* keeps 16"),
        "three tokens that are no cells": (
            {"num_additional_image_tokens": 3},
            "tokens, which are no square|`num_additional_image_tokens` is 3",
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


# What a model's configuration may have of another model: name: (attribute, its value, piece of the error's message)
OTHER_MODELS = {
    "llava_next": {
        "another image token": ("image_token_index", 7, "the prompt has 0 image placeholders"),
        "more tiles": ("image_grid_pinpoints", [[168, 168]], "images of 5 tiles.*up to 10 tiles"),
        "no pinpoints": ("image_grid_pinpoints", [], "`pinpoints` is"),
    },
    "llava": {
        "another image token": ("image_token_index", 7, "the prompt has 0 image placeholders"),
        "a class token among the features": ("vision_feature_select_strategy", "full", "the prompt has 16 .* keeps 17"),
    },
}


@cases_by_family(OTHER_MODELS)
def test_a_configuration_of_another_model(bench, name, monkeypatch):
    attribute, value, message = OTHER_MODELS[bench.family.name][name]
    monkeypatch.setattr(bench.model.config, attribute, value)
    with pytest.raises(ValueError, match=message):
        bench.model(**bench.one_image())
    monkeypatch.undo()  # before the good call
