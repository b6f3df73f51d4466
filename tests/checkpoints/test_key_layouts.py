"""Stock weights exist under three sets of names. Each must load completely: what is not found stays random."""

import logging

import pytest
import torch
from safetensors import safe_open

from checkpoints import GEOMETRY, KEY_LAYOUTS, build_pruned_checkpoint, run_without_package, write_key_layout
from families import FAMILIES
from tiny_checkpoint import build_stock_checkpoint, tiny_config, tiny_model

pytestmark = pytest.mark.releases
PARTS = ["model", "base"]  # as a family names them
LM_HEAD = "lm_head.weight"
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


# The rules read the tower's place alone, so that one family is enough for its other kind.
@pytest.fixture(scope="module", params=[("llava_next", "clip"), ("llava", "clip"), ("llava", "siglip")], ids="-".join)
def geometry(request):
    """A family and a vision tower, as `tiny_config` takes them."""
    family, tower = request.param
    return {**GEOMETRY, "family": family, "vision_type": TOWERS[tower]}


@pytest.fixture(scope="module")
def family(geometry):
    return FAMILIES[geometry["family"]]


@pytest.fixture(scope="module")
def weights(geometry):
    """The source weights, under the names that they have in a stock model; never loaded from a file."""
    return tiny_model(tiny_config(**geometry)).state_dict()


@pytest.fixture(scope="module")
def stock_folders(tmp_path_factory, weights, geometry):
    folder = tmp_path_factory.mktemp("stock")
    source = build_stock_checkpoint(folder / "source", seed=1, **geometry)
    layouts = {layout: write_key_layout(source, folder / layout, weights, layout) for layout in KEY_LAYOUTS}
    return {"source": source, **layouts}


def load(model_class, folder, **kwargs):
    return model_class.from_pretrained(folder, output_loading_info=True, **kwargs)


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_layouts_are_what_they_are_called(stock_folders):
    # Or the tests below would read names that nobody writes. What stock saves is what it was once converted to, but for one
    # level of the vision tower.
    assert names_in(stock_folders["saved_by_stock"]) == names_in(stock_folders["source"])
    assert all(
        name.startswith(("vision_tower.vision_model.", "multi_modal_projector.", "language_model.", "image_newline"))
        for name in names_in(stock_folders["hub"])
    )
    assert len({frozenset(names_in(stock_folders[layout])) for layout in KEY_LAYOUTS}) == 3


def assert_same_weights(model, expected, part):
    """Same names, same tensors; a base model has the same ones without `model.`, and no head."""
    if part == "base":
        expected = {key.removeprefix("model."): weight for key, weight in expected.items() if key != LM_HEAD}
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def assert_complete(info, part):
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    if part == "base":  # as in stock, a base model has no use for the head
        assert all(key.endswith(LM_HEAD) for key in info["unexpected_keys"])
    else:
        assert not info["unexpected_keys"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_every_layout_loads_completely(stock_folders, weights, family, layout, part):
    model, info = load(getattr(family, part), stock_folders[layout])
    assert_complete(info, part)
    assert_same_weights(model, weights, part)


@pytest.mark.parametrize("loading", PARTS)
@pytest.mark.parametrize("saving", PARTS)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_saved_again_loads_again(stock_folders, weights, family, tmp_path, layout, saving, loading):
    getattr(family, saving).from_pretrained(stock_folders[layout]).save_pretrained(tmp_path)
    model, info = load(getattr(family, loading), tmp_path)
    if (saving, loading) == ("base", "model"):
        assert info["missing_keys"] == {LM_HEAD}
        info["missing_keys"] = set()
        weights = weights | {LM_HEAD: model.lm_head.weight}
    assert_complete(info, loading)
    assert_same_weights(model, weights, loading)


@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_stock_reads_what_ours_saved(stock_folders, weights, family, tmp_path, layout):
    """The way back: a pruned checkpoint's weights are a stock checkpoint's, under the names that stock would save them by."""
    family.model.from_pretrained(stock_folders[layout]).save_pretrained(tmp_path / "ours")
    family.stock_model.from_pretrained(stock_folders[layout]).save_pretrained(tmp_path / "stock")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "stock")
    config = family.stock_config.from_pretrained(stock_folders[layout])
    model, info = load(family.stock_model, tmp_path / "ours", config=config)
    assert_complete(info, "model")
    assert_same_weights(model, weights, "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_class_loads_a_pruned_checkpoint_with_a_warning(tmp_path, caplog, name):
    logger = logging.getLogger("transformers")  # which does not propagate to the root, where pytest listens
    logger.addHandler(caplog.handler)
    try:
        FAMILIES[name].stock_model.from_pretrained(build_pruned_checkpoint(tmp_path, {}, name))
    finally:
        logger.removeHandler(caplog.handler)
    assert "model of type" in caplog.text


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


@pytest.mark.parametrize("name", FAMILIES)
def test_remote_code_loads_every_layout_completely(tmp_path, name):
    source = build_pruned_checkpoint(tmp_path, {"retention_ratio": 0.5}, name)
    weights = tiny_model(tiny_config(family=name, **GEOMETRY)).state_dict()
    layouts = KEY_LAYOUTS if name == "llava_next" else ["hub", "in_memory"]  # one of ours and one of stock's rules
    folders = {layout: write_key_layout(source, tmp_path / layout, weights, layout) for layout in layouts}
    weights_file = folders["in_memory"] / "model.safetensors"
    found = run_without_package(
        load_save_and_load, tmp_path / "work", folders=folders, weights_file=weights_file, saved_folder=tmp_path
    )
    assert len(found) == 4 * len(folders)
    for case, result in found.items():
        expected = FAMILIES[name].base if " AutoModel " in case else FAMILIES[name].model
        assert result == {"class": expected.__name__, "missing": [], "unexpected": [], "unequal": []}, case
