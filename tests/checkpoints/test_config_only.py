"""Checkpoints without weights whose base is a folder: everything about them but the Hub, which test_config_only_hub.py has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    QuantoConfig,
)

from checkpoints import GEOMETRY
from families import FAMILIES
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.pruning import configuration as pruned_configuration
from hivtp_hf.pruning.base_checkpoint import BaseCheckpoint
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import greedy, photo

PRUNING = {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 5}
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family, tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp(family.name) / "stock", family=family.name, **GEOMETRY)


@pytest.fixture(scope="module")
def published(family, stock, tmp_path_factory):
    """What pushing a configuration and a processor leaves, in a folder."""
    folder = tmp_path_factory.mktemp(f"{family.name}_published") / "published"
    config = family.config.from_base_model(stock, pruning_config=PRUNING)
    config.save_pretrained(folder)
    family.processor.from_pretrained(stock, pruning_config=config.pruning_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(published):
    return AutoProcessor.from_pretrained(published)(images=photo(60, 100), text="<image> what", return_tensors="pt")


@pytest.fixture(scope="module")
def expected(family, stock, inputs):
    """The tokens and logits of the base itself under the same settings."""
    model = family.model.from_pretrained(stock, pruning_config=PRUNING)
    with torch.no_grad():
        return greedy(model, inputs), model(**inputs).logits


@pytest.fixture(scope="module")
def next_stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("next") / "stock", **GEOMETRY)


@pytest.fixture
def next_published(next_stock, tmp_path):
    folder = tmp_path / "published"
    FAMILIES["llava_next"].config.from_base_model(next_stock).save_pretrained(folder)
    FAMILIES["llava_next"].processor.from_pretrained(next_stock).save_pretrained(folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def named_base(folder):
    return json.loads((folder / "config.json").read_text()).get("base_model")


def test_it_is_small_and_names_base_classes_and_code(family, stock, published):
    assert not [path for path in published.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert sum(path.stat().st_size for path in published.iterdir()) < 700_000
    assert named_base(published) == {"name": str(stock), "revision": None}
    config = json.loads((published / "config.json").read_text())
    assert config["architectures"] == [family.model.__name__]
    for reference in config["auto_map"].values():
        assert (published / f"{reference.partition('.')[0]}.py").is_file()


@pytest.mark.parametrize("route", ["our class", "AutoModelForImageTextToText", "configuration given"])
def test_weights_come_from_the_base(family, stock, published, inputs, expected, route):
    if route == "our class":
        model = family.model.from_pretrained(published)
    elif route == "AutoModelForImageTextToText":
        model = AutoModelForImageTextToText.from_pretrained(published)
    else:
        model = family.model.from_pretrained(published, config=family.config.from_pretrained(published))
    assert type(model) is family.model
    assert torch.equal(greedy(model, inputs), expected[0])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected[1])
    # Under its own name, so that adapters and processors find it again.
    assert model.name_or_path == model.config.name_or_path == str(published)
    assert model.config.base_model == BaseCheckpoint(str(stock), None)


def test_the_base_model_class(family, stock, published):
    model = AutoModel.from_pretrained(published)
    assert type(model) is family.base
    expected = family.model.from_pretrained(stock).model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_asked_for_reaches_the_base(family, published, tmp_path, auto):
    load = AutoModelForImageTextToText.from_pretrained if auto else family.model.from_pretrained
    model = load(published, dtype=torch.bfloat16, attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    on_disk = load(published, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)
    assert on_disk.lm_head.weight.device.type == "meta"
    quantised = load(published, quantization_config=QuantoConfig(weights="int8"))
    assert type(quantised.model.language_model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    assert not load(published, output_loading_info=True)[1]["missing_keys"]
    assert load(published, pruning_config={"method": "gprune"}).pruning_config.method == "gprune"


def test_its_own_generation_settings_rule(family, stock, published, tmp_path):
    assert family.model.from_pretrained(published).generation_config.max_new_tokens is None
    folder = shutil.copytree(published, tmp_path / "published")
    GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.max_new_tokens == 3
    given = family.model.from_pretrained(folder, generation_config=GenerationConfig(max_new_tokens=7))
    assert given.generation_config.max_new_tokens == 7


def test_a_saved_model_is_complete(family, published, inputs, tmp_path):
    model = family.model.from_pretrained(published)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # training, in small
    model.save_pretrained(tmp_path / "saved")
    assert named_base(tmp_path / "saved") is None
    assert named_base(published) == model.config.base_model.to_dict()
    assert torch.equal(greedy(family.model.from_pretrained(tmp_path / "saved"), inputs), greedy(model, inputs))


def test_a_configuration_is_no_reason_to_ignore_weights_that_were_named(family, stock, published, inputs, tmp_path):
    config = family.config.from_pretrained(published)
    trained = family.model.from_pretrained(stock, pruning_config=PRUNING)
    with torch.no_grad():
        trained.lm_head.weight.mul_(-1)
    trained.save_pretrained(tmp_path / "trained")
    model = family.model.from_pretrained(tmp_path / "trained", config=config)
    assert torch.equal(greedy(model, inputs), greedy(trained, inputs))


def test_stock_classes_do_not_load_it_in_silence(published):
    with pytest.raises((OSError, ValueError)):
        LlavaNextForConditionalGeneration.from_pretrained(published)


# What can be wrong with a base.


def test_no_such_folder(next_published):
    edit(next_published, base_model={"name": "/nowhere/at/all", "revision": None})
    with pytest.raises(OSError, match=r"no weights; its config.json names /nowhere/at/all .* no such folder here"):
        AutoModelForImageTextToText.from_pretrained(next_published)


def test_a_base_of_another_family(next_published, tmp_path):
    other = build_stock_checkpoint(tmp_path / "other", family="llava", **GEOMETRY)
    edit(next_published, base_model={"name": str(other), "revision": None})
    with pytest.raises(ValueError, match=r"names .*other as the base that has them, and that cannot be used: .*'llava'"):
        AutoModelForImageTextToText.from_pretrained(next_published)


@pytest.mark.parametrize("change", [{"text_width": 128}, {"vision_layers": 11}])
def test_a_base_of_another_architecture(next_published, tmp_path, change):
    other = build_stock_checkpoint(tmp_path / "other", **{**GEOMETRY, **change})
    edit(next_published, base_model={"name": str(other), "revision": None})
    with pytest.raises(ValueError, match=r"another architecture: `(text|vision)_config\.\w+` is \d+ there and \d+ here"):
        AutoModelForImageTextToText.from_pretrained(next_published)


def test_a_base_that_names_a_base(next_stock, next_published, tmp_path):
    second = shutil.copytree(next_published, tmp_path / "second")
    edit(second, base_model={"name": str(next_published), "revision": None})
    with pytest.raises(ValueError, match=f"names a base in turn, {next_stock}. Name the one that has the weights"):
        AutoModelForImageTextToText.from_pretrained(second)
    # So a circle ends at once, too.
    edit(second, base_model={"name": str(second), "revision": None})
    with pytest.raises(ValueError, match="names a base in turn"):
        AutoModelForImageTextToText.from_pretrained(second)


def test_a_base_beside_weights(next_stock, next_published):
    shutil.copy(next_stock / "model.safetensors", next_published)
    with pytest.raises(ValueError, match=r"has weights, and its config.json names .*stock as the base"):
        AutoModelForImageTextToText.from_pretrained(next_published)


def test_a_base_without_weights(next_stock, next_published, tmp_path):
    empty = shutil.copytree(next_stock, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    edit(next_published, base_model={"name": str(empty), "revision": None})
    with pytest.raises(OSError, match="empty"):
        AutoModelForImageTextToText.from_pretrained(next_published)
    for config_only in (True, False):
        with pytest.raises(ValueError, match=r"has no weights: one of model\.safetensors"):
            convert_checkpoint(str(empty), tmp_path / "target", config_only=config_only)
        with pytest.raises(ValueError, match=r"has no weights: one of model\.safetensors"):
            convert_checkpoint(str(next_published), tmp_path / "target", config_only=config_only)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "value",
    [
        "owner/name",
        {"name": "owner/name"},
        {"name": "owner/name", "revision": "main"},
        {"name": "../name", "revision": COMMIT},
        {"name": "a/b/c", "revision": COMMIT},
        {"name": "/a/folder", "revision": COMMIT},
        {"name": "a/folder", "revision": None},
        {"name": 3, "revision": COMMIT},
        {"name": "owner/name", "revision": COMMIT, "more": 1},
    ],
)
def test_what_is_no_base(value, next_published):
    edit(next_published, base_model=value)
    with pytest.raises(ValueError, match=r"`base_model` is .*; it must be .*from_base_model"):
        AutoModelForImageTextToText.from_pretrained(next_published)


def test_a_base_in_a_configuration(family):
    config = family.config(base_model={"name": "owner/name", "revision": COMMIT})
    assert config.base_model == BaseCheckpoint("owner/name", COMMIT)
    assert str(config.base_model) == f"owner/name at commit {COMMIT}"
    assert json.loads(config.to_json_string())["base_model"] == {"name": "owner/name", "revision": COMMIT}
    config.base_model = None
    assert "base_model" not in json.loads(config.to_json_string())


def test_where_a_configuration_finds_its_base(family, stock, published, tmp_path, monkeypatch):
    monkeypatch.chdir(stock.parent)
    assert family.config.from_base_model("stock").base_model == BaseCheckpoint(str(stock), None)
    # A base of a base is not made: the one with the weights is named.
    config = family.config.from_base_model(published)
    assert config.base_model == BaseCheckpoint(str(stock), None)
    assert config.pruning_config.method == "hiprune"
    with pytest.raises(ValueError, match=r"`revision` is 'main', but .* is a folder, which has none"):
        family.config.from_base_model(stock, revision="main")
    with pytest.raises(ValueError, match="`retention_ratio` is a pruning setting"):
        family.config.from_base_model(stock, retention_ratio=0.5)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        family.config.from_base_model(tmp_path)


def test_a_configuration_without_a_base_is_no_checkpoint(family, monkeypatch):
    monkeypatch.setattr(PreTrainedConfig, "push_to_hub", lambda self, name: name)
    records = []
    monkeypatch.setattr(pruned_configuration.logger, "warning", records.append)
    assert family.config().push_to_hub("owner/name") == "owner/name"
    assert "from_base_model" in records[0]
    records.clear()
    family.config(base_model={"name": "owner/name", "revision": COMMIT}).push_to_hub("owner/name")
    assert not records


def test_a_folder_of_this_machine_is_not_published(family, published):
    config = family.config.from_pretrained(published)
    for push in (lambda: config.push_to_hub("me/it"), lambda: config.save_pretrained("x", push_to_hub=True)):
        with pytest.raises(ValueError, match="a folder of this machine, which nobody else can load"):
            push()
    assert not Path("x").exists()


# How convert makes and ends them.


def converted(source, target, pruning=None, **arguments):
    return convert_checkpoint(str(source), target, pruning, show_progress=False, **arguments)


def test_convert_makes_one_and_makes_it_complete(stock, inputs, expected, tmp_path):
    small = converted(stock, tmp_path / "small", PRUNING, config_only=True)
    assert named_base(small) == {"name": str(stock), "revision": None}
    assert not list(small.glob("*.safetensors"))
    assert torch.equal(greedy(AutoModelForImageTextToText.from_pretrained(small), inputs), expected[0])
    complete = converted(small, tmp_path / "complete")
    assert named_base(complete) is None
    assert (complete / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    names = {path.name for path in small.iterdir()} | {"model.safetensors"}
    assert {path.name for path in complete.iterdir()} == names
    assert torch.equal(greedy(AutoModelForImageTextToText.from_pretrained(complete), inputs), expected[0])
    # Of one without weights comes another with the same base; of a complete one, one with that as its base.
    for source, base in ((small, stock), (complete, complete)):
        again = converted(source, tmp_path / f"of_{source.name}", {"method": "gprune"}, config_only=True)
        assert named_base(again) == {"name": str(base), "revision": None}


def test_convert_leaves_source_and_base_alone(next_stock, tmp_path):
    stock = shutil.copytree(next_stock, tmp_path / "stock")
    small = converted(stock, tmp_path / "small", config_only=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in (stock, stock / "inside", small / "inside", tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            converted(small, target, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
