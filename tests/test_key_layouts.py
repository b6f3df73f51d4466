"""Stock weights exist under three sets of names. Each must load completely: what is not found stays random."""

import logging

import pytest
import torch
from transformers import LlavaNextConfig

from checkpoints import GEOMETRY, KEY_LAYOUTS, build_pruned_checkpoint, run_without_package, write_key_layout
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextModel, VisualTokenPruningConfig
from tiny_checkpoint import build_stock_checkpoint, tiny_config, tiny_model

MODEL_CLASSES = [HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextModel]
LM_HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def weights():
    """The source weights, under the names that they have in a stock model; never loaded from a file."""
    return tiny_model(tiny_config(**GEOMETRY)).state_dict()


@pytest.fixture(scope="module")
def stock_folders(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("stock")
    source = build_stock_checkpoint(folder / "source", seed=1, **GEOMETRY)
    return {layout: write_key_layout(source, folder / layout, weights, layout) for layout in KEY_LAYOUTS}


@pytest.fixture
def transformers_log(caplog):
    # transformers' loggers do not propagate to the root, where pytest listens.
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def load(model_class, folder, **kwargs):
    return model_class.from_pretrained(folder, output_loading_info=True, **kwargs)


def assert_same_weights(model, expected):
    """Same names, same tensors; a base model has the same ones without `model.`, and no head."""
    if isinstance(model, HIVTPLlavaNextModel):
        expected = {key.removeprefix("model."): weight for key, weight in expected.items() if key != LM_HEAD}
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def assert_complete(info, model_class):
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    if model_class is HIVTPLlavaNextModel:  # as in stock, a base model has no use for the head
        assert all(key.endswith(LM_HEAD) for key in info["unexpected_keys"])
    else:
        assert not info["unexpected_keys"]


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_every_layout_loads_completely(stock_folders, weights, transformers_log, layout, model_class):
    model, info = load(model_class, stock_folders[layout])
    assert_complete(info, model_class)
    assert_same_weights(model, weights)
    assert "model of type" not in transformers_log.text


def test_a_foreign_model_type_would_be_logged(tmp_path, transformers_log):
    # So that the silence of the test above means something.
    LlavaNextConfig.from_pretrained(build_pruned_checkpoint(tmp_path, {}))
    assert "model of type" in transformers_log.text


@pytest.mark.parametrize("loading", MODEL_CLASSES)
@pytest.mark.parametrize("saving", MODEL_CLASSES)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_saved_again_loads_again(stock_folders, weights, tmp_path, layout, saving, loading):
    saving.from_pretrained(stock_folders[layout]).save_pretrained(tmp_path)
    model, info = load(loading, tmp_path)
    if saving is HIVTPLlavaNextModel and loading is HIVTPLlavaNextForConditionalGeneration:
        assert info["missing_keys"] == {LM_HEAD}
        info["missing_keys"] = set()
        weights = weights | {LM_HEAD: model.lm_head.weight}
    assert_complete(info, loading)
    assert_same_weights(model, weights)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_pruning_keyword_replaces_the_stored_settings(stock_folders, tmp_path, model_class):
    stored = {"global_ratio": 0.5, "regions": 4}
    model_class.from_pretrained(stock_folders["hub"], pruning_config=stored).save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path).config.pruning_config == VisualTokenPruningConfig(**stored)
    model = model_class.from_pretrained(tmp_path, pruning_config={"retention_ratio": 0.25})
    assert model.config.pruning_config == VisualTokenPruningConfig(retention_ratio=0.25)


def load_save_and_load(folders, weights_file, saved_folder):
    """Runs in a process without the package: what remote code finds of each layout, first and after saving it again."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageTextToText

    weights = load_file(weights_file)
    found = {}
    for layout, folder in folders.items():
        for auto_class in (AutoModelForImageTextToText, AutoModel):
            saved = f"{saved_folder}/{layout}_{auto_class.__name__}"
            for step, source in (("first", folder), ("again", saved)):
                model, info = auto_class.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
                assert type(model).__module__.startswith("transformers_modules.")
                prefix = "model." if auto_class is AutoModel else ""
                equal = [key for key, weight in model.state_dict().items() if torch.equal(weight, weights[prefix + key])]
                found[f"{layout} {auto_class.__name__} {step}"] = {
                    "class": type(model).__name__,
                    "missing": sorted(info["missing_keys"]),
                    "unexpected": sorted(key for key in info["unexpected_keys"] if not key.endswith("lm_head.weight")),
                    "unequal": sorted(model.state_dict().keys() - equal),
                }
                model.save_pretrained(saved)
    return found


def test_remote_code_loads_every_layout_completely(weights, tmp_path):
    source = build_pruned_checkpoint(tmp_path, {"retention_ratio": 0.5})
    folders = {layout: write_key_layout(source, tmp_path / layout, weights, layout) for layout in KEY_LAYOUTS}
    weights_file = folders["in_memory"] / "model.safetensors"
    found = run_without_package(
        load_save_and_load, tmp_path / "work", folders=folders, weights_file=weights_file, saved_folder=tmp_path
    )
    assert len(found) == 12
    for case, result in found.items():
        expected = "HIVTPLlavaNextModel" if " AutoModel " in case else "HIVTPLlavaNextForConditionalGeneration"
        assert result == {"class": expected, "missing": [], "unexpected": [], "unequal": []}, case
