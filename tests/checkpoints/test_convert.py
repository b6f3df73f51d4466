"""`convert_checkpoint`: complete, with untouched weights, and whole or not at all."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoints import GEOMETRY
from families import FAMILIES
from hivtp_hf.checkpoints import convert, convert_checkpoint, file_copies
from hub_commands import contents
from pushes import with_shards
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import greedy, photo

PRUNING = {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 5}


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build_stock_checkpoint(folder / "stock", family=request.param, **GEOMETRY)


@pytest.fixture(scope="module")
def next_stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("next") / "stock", **GEOMETRY)


def made(source, target, pruning=PRUNING, **arguments):
    return convert_checkpoint(str(source), target, pruning, show_progress=False, **arguments)


def family_of_folder(folder):
    return FAMILIES[json.loads((folder / "config.json").read_text())["model_type"].removeprefix("hivtp_")]


def test_a_whole_checkpoint(stock, tmp_path):
    before = contents(stock)
    target = made(stock, tmp_path / "pruned")
    assert target == tmp_path / "pruned"
    assert contents(stock) == before
    family = family_of_folder(stock)
    needed = {"config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"}
    assert needed | {"chat_template.jinja", "model.safetensors", "README.md"} <= {path.name for path in target.iterdir()}
    # The same code as our own classes save, and nothing executable of anybody else's.
    own = tmp_path / "own"
    family.model.from_pretrained(stock).save_pretrained(own)
    family.processor.from_pretrained(stock).save_pretrained(own)
    assert {path.name for path in target.glob("*.py")} == {path.name for path in own.glob("*.py")}
    assert (target / "generation_config.json").read_bytes() == before["generation_config.json"]

    # Weights: the same bytes in a file of its own, so that what is saved there later leaves the source alone.
    copied, source = target / "model.safetensors", stock / "model.safetensors"
    assert copied.read_bytes() == source.read_bytes()
    assert copied.stat().st_ino != source.stat().st_ino
    model = AutoModelForImageTextToText.from_pretrained(target)
    processor = AutoProcessor.from_pretrained(target)
    assert type(model) is family.model
    assert model.pruning_config == processor.pruning_config
    assert {name: model.pruning_config.to_dict()[name] for name in PRUNING} == PRUNING
    direct = family.model.from_pretrained(stock, pruning_config=PRUNING)
    inputs = processor(images=photo(60, 100), text="<image> what", return_tensors="pt")
    assert torch.equal(greedy(model, inputs), greedy(direct, inputs))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(target)
    assert contents(stock) == before


CARD = "---\nlicense: llama2\nlanguage: en\nbase_model: {base}\ntags: [theirs]\n---\n# Theirs\n"


def test_the_card_is_that_of_a_pruned_checkpoint_under_the_licence_of_its_source(next_stock, tmp_path):
    source = shutil.copytree(next_stock, tmp_path / "source")
    (source / "README.md").write_text(CARD.format(base="lmsys/vicuna-7b"))
    card = ModelCard.load(made(source, tmp_path / "first") / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("llama2", "en", "transformers")
    assert "theirs" not in card.data.tags
    assert "Theirs" not in card.text
    assert '"your-name/first"' in card.text
    # What the source was made from is not what this is made from, and a folder has no name on the Hub.
    assert card.data.base_model is None
    # Of a pruned one, the weights are still those of its base.
    (tmp_path / "first" / "README.md").write_text(CARD.format(base="llava-hf/llava-v1.6-mistral-7b-hf"))
    again = ModelCard.load(made(tmp_path / "first", tmp_path / "second") / "README.md")
    assert (again.data.base_model, again.data.license) == ("llava-hf/llava-v1.6-mistral-7b-hf", "llama2")


@pytest.mark.parametrize("card", ["no metadata", "---\nlicense: [\n---\n", "---\nlicense: {a: b}\n---\n"])
def test_a_broken_card_is_in_nobodys_way(next_stock, tmp_path, card):
    source = shutil.copytree(next_stock, tmp_path / "source")
    (source / "README.md").write_text(card)
    made_card = ModelCard.load(made(source, tmp_path / "pruned") / "README.md")
    assert made_card.data.license is None
    assert made_card.data.pipeline_tag == "image-text-to-text"


def test_settings_of_a_pruned_source_stay_unless_they_are_given(next_stock, tmp_path):
    first = made(next_stock, tmp_path / "first")
    second = made(first, tmp_path / "second", {"retention_ratio": 0.125})
    third = made(second, tmp_path / "third", {"method": "gprune"})
    settings = [json.loads((folder / "config.json").read_text())["pruning_config"] for folder in (first, second, third)]
    assert [setting["method"] for setting in settings] == ["hiprune", "hiprune", "gprune"]
    assert [setting["retention_ratio"] for setting in settings] == [0.25, 0.125, 0.125]
    assert settings[1]["object_layer"] == 5
    assert "object_layer" not in settings[2]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(next_stock, tmp_path, kind):
    source = with_shards(next_stock, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    shards = sorted(source.glob("model-*.safetensors"))
    if kind == "bin":
        index = index.rename(source / "pytorch_model.bin.index.json")
        index.write_text(index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        for shard in shards:
            torch.save(load_file(shard), source / f"pytorch_{shard.stem}.bin")
            shard.unlink()
        shards = sorted(source.glob("pytorch_model-*.bin"))
    target = made(source, tmp_path / "pruned")
    assert len(shards) == 2
    for path in (index, *shards):
        assert (target / path.name).read_bytes() == path.read_bytes()
    loaded = AutoModelForImageTextToText.from_pretrained(target).state_dict()
    whole = FAMILIES["llava_next"].model.from_pretrained(next_stock).state_dict()
    assert all(torch.equal(loaded[key], whole[key]) for key in whole)

    shards[0].unlink()
    with pytest.raises(ValueError, match=r"names the shard .* which is no file beside it"):
        made(source, tmp_path / "other")
    index.write_text(json.dumps({"weight_map": {"a": f"../{shards[1].name}"}}))
    with pytest.raises(ValueError, match=r"names the shard '\.\./"):
        made(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "source"]


def test_an_existing_target_stays_unless_forced(next_stock, tmp_path):
    target = made(next_stock, tmp_path / "pruned")
    (target / "notes.txt").write_text("mine")
    before = contents(target)
    with pytest.raises(ValueError, match="exists already; give another target, or `--force`"):
        made(next_stock, target, {"method": "uniform"})
    assert contents(target) == before
    made(next_stock, target, {"method": "uniform"}, force=True)
    assert not (target / "notes.txt").exists()
    assert json.loads((target / "config.json").read_text())["pruning_config"]["method"] == "uniform"
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_run_leaves_nothing(next_stock, tmp_path, monkeypatch, force):
    target = tmp_path / "pruned"
    if force:
        made(next_stock, target)
    before = contents(tmp_path)

    def interrupted(files, **_):
        files[0][1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "copy_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(next_stock, target, {"method": "uniform"}, force=force)
    assert contents(tmp_path) == before
    assert target.exists() == force


def test_targets_that_touch_the_source(next_stock, tmp_path):
    source = shutil.copytree(next_stock, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for target in (source, source / "inside", tmp_path / "link", tmp_path / "link" / "inside", tmp_path):
        with pytest.raises(ValueError, match=r"lie in each other|exists and is no folder"):
            made(source, target, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is no folder"):
        made(source, tmp_path / "file", force=True)
    assert contents(source) == before


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"retention_ratio": 50}, "For 50 % write 0.5"),
        ({"importance_start_layer": 40}, "reads the encoder layers 40 to 42, but the vision tower has 10 layers"),
    ],
)
def test_settings_that_do_not_fit(next_stock, tmp_path, pruning, message):
    with pytest.raises(ValueError, match=message):
        made(next_stock, tmp_path / "pruned", pruning)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(next_stock, tmp_path):
    (tmp_path / "empty").mkdir()
    other = shutil.copytree(next_stock, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    broken = shutil.copytree(next_stock, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    bare = shutil.copytree(next_stock, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    for source, message in (
        (tmp_path / "missing", "is no folder, and no repository on the Hub"),
        (tmp_path / "empty", "has no config.json"),
        (other, "has the model type 'bert' .* known are 'llava_next', 'hivtp_llava_next', 'llava', 'hivtp_llava'"),
        (broken, "cannot be read as JSON"),
        (bare, "has no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            made(source, tmp_path / "target")
    with pytest.raises(ValueError, match=r"`revision` is 'main', but .* is a folder"):
        made(next_stock, tmp_path / "target", revision="main")
    assert not (tmp_path / "target").exists()


def test_code_of_the_source_is_neither_run_nor_copied(next_stock, tmp_path):
    source = shutil.copytree(next_stock, tmp_path / "source")
    code = f"open({str(tmp_path / 'run')!r}, 'w').close()\n"
    for name in ("configuration_evil.py", "tokenization_evil.py", "processing_evil.py"):
        (source / name).write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "configuration_evil.Evil", "AutoModel": "configuration_evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
        ("processor_config.json", {"AutoProcessor": "processing_evil.Evil"}),
    ):
        stored = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**stored, "auto_map": auto_map}))
    target = made(source, tmp_path / "pruned")
    assert not (tmp_path / "run").exists()
    assert not list(target.glob("*evil*"))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        assert "evil" not in (target / name).read_text()


def test_copies_where_blocks_are_shared_and_where_not(tmp_path, monkeypatch):
    """Both ways give the same bytes; which of them this file system takes does not matter."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * 2**20 + 5))
    (tmp_path / "link").symlink_to(source)
    file_copies.copy_files([(tmp_path / "link", tmp_path / "one")], show_progress=False)
    monkeypatch.setattr(file_copies, "_share_blocks", lambda source, target: False)
    file_copies.copy_files([(tmp_path / "link", tmp_path / "two")], show_progress=False)
    for name in ("one", "two"):
        assert (tmp_path / name).read_bytes() == source.read_bytes()
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).stat().st_nlink == 1
    with pytest.raises(FileExistsError):
        file_copies.copy_files([(source, tmp_path / "two")], show_progress=False)
