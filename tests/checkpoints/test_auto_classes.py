"""The Auto classes give our classes, and every way to set the pruning is read and checked alike."""

import json
import shutil

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from checkpoints import GEOMETRY, build_pruned_checkpoint, run_without_package
from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.pruning.registry import METHODS
from tiny_checkpoint import build_stock_checkpoint, tiny_config, tiny_processor

PRUNING = VisualTokenPruningConfig(global_ratio=0.5, regions=4)
TEXT = "USER: <image>\nWhat is shown in this image? ASSISTANT:"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(tmp_path_factory, family):
    return build_stock_checkpoint(tmp_path_factory.mktemp("checkpoint") / "stock", family=family.name, **GEOMETRY)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, family):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("checkpoint"), PRUNING.to_dict(), family.name)


def read_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("auto_name", "part"),
    [
        ("AutoConfig", "config"),
        ("AutoModel", "base"),
        ("AutoModelForImageTextToText", "model"),
        ("AutoModelForMultimodalLM", "model"),
        ("AutoProcessor", "processor"),
    ],
)
def test_auto_class_gives_ours(family, pruned, auto_name, part):
    assert type(getattr(transformers, auto_name).from_pretrained(pruned)) is getattr(family, part)


# As they are written on the Hub, where older checkpoints go on naming them.
SAVED_NAMES = {"llava_next": "hivtp_llava_next.HIVTPLlavaNext", "llava": "hivtp_llava.HIVTPLlava"}


def test_saved_files(family, pruned):
    name = SAVED_NAMES.get(family.name, f"{family.config.model_type}.{family.config.__name__.removesuffix('Config')}")
    config, processor = read_json(pruned, "config"), read_json(pruned, "processor_config")
    assert config["model_type"] == f"hivtp_{family.name}"
    assert config["pruning_config"] == processor["pruning_config"] == PRUNING.to_dict()
    assert config["auto_map"] == {
        "AutoConfig": f"{name}Config",
        "AutoModel": f"{name}Model",
        "AutoModelForImageTextToText": f"{name}ForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{name}ForConditionalGeneration",
    }
    assert processor["auto_map"] == {"AutoProcessor": f"{name}Processor"}
    assert "pruning" not in (pruned / "tokenizer_config.json").read_text()


def test_a_foreign_auto_map_is_replaced_on_saving(family, stock, tmp_path):
    """Of checkpoints that once had code of their own, which would be loaded in place of ours."""
    source = shutil.copytree(stock, tmp_path / "source")
    for name, entry in (("config", "AutoConfig"), ("config", "AutoModelForCausalLM"), ("processor_config", "AutoProcessor")):
        content = read_json(source, name)
        content.setdefault("auto_map", {})[entry] = "someone/else--other_code.Other"
        (source / f"{name}.json").write_text(json.dumps(content))
    for part in (family.model, family.processor):
        part.from_pretrained(source, pruning_config=PRUNING).save_pretrained(tmp_path / "saved")
    test_saved_files(family, tmp_path / "saved")


def test_datasets_knows_a_processor_again(pruned, family):
    """By this hash `datasets.map` finds what it has computed with a processor, and must not with another."""
    datasets = pytest.importorskip("datasets", reason="this is about the cache of datasets")
    hashes = [datasets.fingerprint.Hasher.hash(family.processor.from_pretrained(pruned)) for _ in range(2)]
    assert hashes[0] == hashes[1]
    for settings in ({"retention_ratio": 0.5}, {"retention_ratio": 0.5, "method": "uniform"}):
        other = family.processor.from_pretrained(pruned, pruning_config=settings)
        assert datasets.fingerprint.Hasher.hash(other) not in hashes


def test_defaults_prune(family, stock):
    config = family.config.from_pretrained(stock)
    processor = family.processor.from_pretrained(stock)
    for part in (config, processor, family.config()):
        assert part.pruning_config == VisualTokenPruningConfig()
    layout = processor.token_layout(60, 90)
    assert layout.num_retained < layout.num_stock


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_stored_and_read_again(family, pruned, tmp_path, name):
    """By the Auto classes, from the name of the method alone, and with settings of its own."""
    chosen = {"retention_ratio": 0.25} if METHODS[name].default_retention_ratio else {}
    for step, settings in enumerate([{"method": name}, {"method": name, **chosen, "keep_newlines": False}]):
        expected, folder = VisualTokenPruningConfig(**settings), tmp_path / str(step)
        AutoConfig.from_pretrained(pruned, pruning_config=settings).save_pretrained(folder)
        AutoProcessor.from_pretrained(pruned, pruning_config=settings).save_pretrained(folder)
        for auto_class, file in ((AutoConfig, "config"), (AutoProcessor, "processor_config")):
            assert read_json(folder, file)["pruning_config"] == expected.to_dict()
            assert auto_class.from_pretrained(folder).pruning_config == expected


def edited_json(folder, target, name, settings):
    """A copy of a checkpoint in whose file someone wrote other settings."""
    shutil.copytree(folder, target)
    content = read_json(target, name) | {"pruning_config": settings}
    (target / f"{name}.json").write_text(json.dumps(content, default=VisualTokenPruningConfig.to_dict))
    return target


def assigned(part, settings):
    part.pruning_config = settings
    return part


def constructed_processor(family, folders, settings):
    stock = family.stock_processor.from_pretrained(folders["stock"])
    return family.processor(stock.image_processor, stock.tokenizer, patch_size=7, pruning_config=settings)


def loading(part, source, file=None):
    """By a class of the family or an Auto class; settings are given along, or stand in a file."""

    def load(family, folders, new_folder, given):
        loading_class = getattr(family, part) if isinstance(part, str) else part
        if file is None:
            return loading_class.from_pretrained(folders[source], pruning_config=given)
        return loading_class.from_pretrained(edited_json(folders[source], new_folder, file, given))

    return load


# From the family, its folders to load, a folder to write to and the settings, to what then has the settings.
ROUTES = {
    "config constructor": lambda family, folders, new, given: family.config(pruning_config=given),
    "config assignment": lambda family, folders, new, given: assigned(family.config(), given),
    "config keyword": loading(AutoConfig, "pruned"),
    "config file": loading(AutoConfig, "pruned", "config"),
    "model keyword": loading(AutoModelForImageTextToText, "pruned"),
    "model keyword, stock": loading("model", "stock"),
    "base model keyword": loading(AutoModel, "pruned"),
    "processor constructor": lambda family, folders, new, given: constructed_processor(family, folders, given),
    "processor assignment": lambda family, folders, new, given: assigned(constructed_processor(family, folders, None), given),
    "processor keyword": loading(AutoProcessor, "pruned"),
    "processor keyword, stock": loading("processor", "stock"),
    "processor file": loading(AutoProcessor, "pruned", "processor_config"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_reads_and_checks_all_that_a_user_may_write(family, stock, pruned, tmp_path, route):
    folders, half = {"stock": stock, "pruned": pruned}, VisualTokenPruningConfig(retention_ratio=0.5)
    hiprune = {"method": "hiprune", "alpha": 0.2}
    written = [({"retention_ratio": 0.5}, half), (half, half), (None, VisualTokenPruningConfig())]
    for step, (given, expected) in enumerate([*written, (hiprune, VisualTokenPruningConfig(**hiprune))]):
        result = ROUTES[route](family, folders, tmp_path / str(step), given)
        read = (result.config if isinstance(result, PreTrainedModel) else result).pruning_config
        assert isinstance(read, VisualTokenPruningConfig)
        assert read == expected, f"given {given!r}"
    for bad, named in (({"retention_rato": 0.5}, "`retention_rato`: not a setting"), ("half", "`pruning_config` is 'half'")):
        with pytest.raises(ValueError, match=named):
            ROUTES[route](family, folders, tmp_path / str(bad), bad)


def llama_style_tokenizer(corpus=TEXT):
    """As in many LLaVA checkpoints: spaces are U+2581, and tokenizer.json writes one after every special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    special_tokens = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator([corpus.replace("<image>", "")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.fixture(scope="module")
def stock_with_llama_tokenizer(family, stock):
    """A stock checkpoint that records a tokenizer class which would read its tokenizer.json differently."""
    folder = shutil.copytree(stock, stock.with_name("stock_with_llama_tokenizer"))
    tiny_processor(tiny_config(family=family.name, **GEOMETRY), llama_style_tokenizer()).save_pretrained(folder)
    recorded = read_json(folder, "tokenizer_config") | {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(recorded))
    return folder


def test_llama_class_and_tokenizer_json_differ(stock_with_llama_tokenizer):
    # Which of the two stock follows depends on its release. They must differ, or the next test would prove little.
    by_class, by_file = (
        tokenizer_class.from_pretrained(stock_with_llama_tokenizer)(TEXT)["input_ids"]
        for tokenizer_class in (LlamaTokenizer, PreTrainedTokenizerFast)
    )
    assert by_class[: by_class.index(3) + 1] == by_file[: by_file.index(3) + 1]
    assert by_class != by_file


@pytest.mark.parametrize("checkpoint", ["stock", "stock_with_llama_tokenizer"])
def test_unpruned_token_ids_equal_stock(family, checkpoint, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    image = Image.fromarray(np.zeros((60, 90, 3), dtype=np.uint8))
    theirs = family.stock_processor.from_pretrained(folder)
    expected = theirs(images=image, text=TEXT)["input_ids"]

    ours = family.processor.from_pretrained(folder, pruning_config={"retention_ratio": 1})
    assert ours(images=image, text=TEXT)["input_ids"] == expected

    family.config.from_pretrained(folder).save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is family.processor
    assert again(images=image, text=TEXT)["input_ids"] == expected
    # Serving engines read the tokenizer on its own.
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == theirs.tokenizer(TEXT)["input_ids"]

    made = convert_checkpoint(str(folder), tmp_path / "made", {"retention_ratio": 1}, show_progress=False)
    assert AutoProcessor.from_pretrained(made)(images=image, text=TEXT)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(made)(TEXT)["input_ids"] == theirs.tokenizer(TEXT)["input_ids"]


def refusals(folders):
    """Runs in a process without the package: what the Auto classes say of code that nobody trusts."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    messages = []
    for folder in folders:
        for auto_class in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
            try:
                auto_class.from_pretrained(folder)
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_untrusted_code_is_an_error(tmp_path):
    folders = [build_pruned_checkpoint(tmp_path / name, {}, name) for name in FAMILIES]
    messages = run_without_package(refusals, tmp_path / "work", folders=folders)
    assert len(messages) == 3 * len(folders)
    assert all("trust_remote_code=True" in message for message in messages)
