"""The Auto classes give our classes, and every way to set the pruning is read and checked alike."""

import json
import os
import shutil
import subprocess
import sys

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
from hivtp_hf import HIVTPLlavaNextProcessor, VisualTokenPruningConfig
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


def test_saved_config(family, pruned):
    saved, name = read_json(pruned, "config"), SAVED_NAMES[family.name]
    assert saved["model_type"] == f"hivtp_{family.name}"
    assert saved["pruning_config"] == PRUNING.to_dict()
    assert saved["auto_map"] == {
        "AutoConfig": f"{name}Config",
        "AutoModel": f"{name}Model",
        "AutoModelForImageTextToText": f"{name}ForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{name}ForConditionalGeneration",
    }


def test_saved_processor_config(family, pruned):
    saved = read_json(pruned, "processor_config")
    assert saved["pruning_config"] == PRUNING.to_dict()
    assert saved["auto_map"] == {"AutoProcessor": f"{SAVED_NAMES[family.name]}Processor"}


def test_a_foreign_auto_map_is_replaced_on_saving(family, stock, tmp_path):
    """Of checkpoints that once had code of their own, which would be loaded in place of ours."""
    source = shutil.copytree(stock, tmp_path / "source")
    for name, entry in (("config", "AutoConfig"), ("config", "AutoModelForCausalLM"), ("processor_config", "AutoProcessor")):
        content = read_json(source, name)
        content.setdefault("auto_map", {})[entry] = "someone/else--other_code.Other"
        (source / f"{name}.json").write_text(json.dumps(content))
    for part in (family.model, family.processor):
        part.from_pretrained(source, pruning_config=PRUNING).save_pretrained(tmp_path / "saved")
    test_saved_config(family, tmp_path / "saved")
    test_saved_processor_config(family, tmp_path / "saved")


def test_datasets_knows_a_processor_again_in_another_process(tmp_path):
    """By this hash `datasets.map` finds what it has computed with a processor, and must not with another."""
    datasets = pytest.importorskip("datasets", reason="this is about the cache of datasets")
    folder = build_pruned_checkpoint(tmp_path, PRUNING.to_dict())
    processor = HIVTPLlavaNextProcessor.from_pretrained(folder)
    program = (
        "import sys; from datasets.fingerprint import Hasher; from hivtp_hf import HIVTPLlavaNextProcessor; "
        "print(Hasher.hash(HIVTPLlavaNextProcessor.from_pretrained(sys.argv[1])))"
    )
    other_process = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    hashed = datasets.fingerprint.Hasher.hash(processor)
    assert other_process.stdout.split()[-1] == hashed
    for settings in ({"retention_ratio": 0.5}, {"retention_ratio": 0.5, "method": "uniform"}, PRUNING):
        processor.pruning_config = settings
        assert (datasets.fingerprint.Hasher.hash(processor) == hashed) == (settings is PRUNING)


def test_tokenizer_stays_stock(family, stock, pruned):
    saved = (pruned / "tokenizer_config.json").read_text()
    assert not any(name in saved for name in ("pruning", *PRUNING.to_dict()))
    ours, theirs = AutoProcessor.from_pretrained(pruned).tokenizer, family.stock_processor.from_pretrained(stock).tokenizer
    assert type(ours) is type(theirs)


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
    as_dict = VisualTokenPruningConfig.to_dict
    (target / f"{name}.json").write_text(json.dumps(content, default=as_dict))
    return target


def assigned(part, settings):
    part.pruning_config = settings
    return part


def constructed_processor(family, folders, settings):
    stock = family.stock_processor.from_pretrained(folders["stock"])
    return family.processor(stock.image_processor, stock.tokenizer, patch_size=7, pruning_config=settings)


def by_keyword(part, source):
    """By a class of the family or an Auto class."""

    def load(family, folders, new_folder, given):
        loading_class = getattr(family, part) if isinstance(part, str) else part
        return loading_class.from_pretrained(folders[source], pruning_config=given)

    return load


def by_file(part, name):
    def load(family, folders, new_folder, given):
        loading_class = getattr(family, part) if isinstance(part, str) else part
        return loading_class.from_pretrained(edited_json(folders["pruned"], new_folder, name, given))

    return load


# From the family, its folders to load, a folder to write to and the settings, to what then has the settings.
ROUTES = {
    "config constructor": lambda family, folders, new_folder, given: family.config(pruning_config=given),
    "config assignment": lambda family, folders, new_folder, given: assigned(family.config(), given),
    "config keyword": by_keyword("config", "pruned"),
    "config keyword, stock": by_keyword("config", "stock"),
    "config file": by_file("config", "config"),
    "AutoConfig keyword": by_keyword(AutoConfig, "pruned"),
    "AutoConfig file": by_file(AutoConfig, "config"),
    "model keyword": by_keyword(AutoModelForImageTextToText, "pruned"),
    "model keyword, stock": by_keyword("model", "stock"),
    "base model keyword": by_keyword(AutoModel, "pruned"),
    "processor constructor": lambda family, folders, new_folder, given: constructed_processor(family, folders, given),
    "processor assignment": lambda family, folders, new_folder, given: assigned(
        constructed_processor(family, folders, None), given
    ),
    "processor keyword": by_keyword("processor", "pruned"),
    "processor keyword, stock": by_keyword("processor", "stock"),
    "processor file": by_file("processor", "processor_config"),
    "AutoProcessor keyword": by_keyword(AutoProcessor, "pruned"),
    "AutoProcessor file": by_file(AutoProcessor, "processor_config"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_reads_all_that_a_user_may_write(family, stock, pruned, tmp_path, route):
    half, hiprune = VisualTokenPruningConfig(retention_ratio=0.5), VisualTokenPruningConfig(method="hiprune", alpha=0.2)
    default = VisualTokenPruningConfig()
    written = [({"retention_ratio": 0.5}, half), (half, half), (None, default), ({}, default)]
    for step, (given, expected) in enumerate([*written, ({"method": "hiprune", "alpha": 0.2}, hiprune)]):
        result = ROUTES[route](family, {"stock": stock, "pruned": pruned}, tmp_path / str(step), given)
        read = (result.config if isinstance(result, PreTrainedModel) else result).pruning_config
        assert isinstance(read, VisualTokenPruningConfig)
        assert read == expected, f"given {given!r}"


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_refuses_bad_settings(family, stock, pruned, tmp_path, route):
    for step, (bad, named) in enumerate(
        [
            ({"retention_ratio": 0}, "`retention_ratio` is 0"),
            ({"retention_rato": 0.5}, "`retention_rato`: not a setting"),
            ({"method": "unheard of"}, "`method` is 'unheard of'"),
            ({"method": "gprune", "alpha": 0.2}, "`alpha`: not a setting of the method 'gprune'"),
            (0.5, "`pruning_config` is 0.5"),
            ("half", "`pruning_config` is 'half'"),
        ]
    ):
        with pytest.raises(ValueError, match=named):
            ROUTES[route](family, {"stock": stock, "pruned": pruned}, tmp_path / str(step), bad)


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

    # A checkpoint may also be converted by its settings alone, with the tokenizer's files as they came.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    converted = AutoProcessor.from_pretrained(tmp_path)
    assert converted(images=image, text=TEXT)["input_ids"] == expected


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
