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
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from checkpoints import GEOMETRY, build_pruned_checkpoint, run_without_package
from hivtp_hf import (
    HIVTPLlavaNextConfig,
    HIVTPLlavaNextForConditionalGeneration,
    HIVTPLlavaNextModel,
    HIVTPLlavaNextProcessor,
    VisualTokenPruningConfig,
)
from tiny_checkpoint import build_stock_checkpoint, tiny_config, tiny_processor

PRUNING = VisualTokenPruningConfig(global_ratio=0.5, regions=4)
TEXT = "USER: <image>\nWhat is shown in this image? ASSISTANT:"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("checkpoint") / "stock", **GEOMETRY)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("checkpoint"), PRUNING.to_dict())


def read_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("auto_name", "expected"),
    [
        ("AutoConfig", HIVTPLlavaNextConfig),
        ("AutoModel", HIVTPLlavaNextModel),
        ("AutoModelForImageTextToText", HIVTPLlavaNextForConditionalGeneration),
        ("AutoModelForMultimodalLM", HIVTPLlavaNextForConditionalGeneration),
        ("AutoProcessor", HIVTPLlavaNextProcessor),
    ],
)
def test_auto_class_gives_ours(pruned, auto_name, expected):
    auto_class = getattr(transformers, auto_name, None)
    if auto_class is None:
        pytest.skip(f"this transformers has no {auto_name}")
    assert type(auto_class.from_pretrained(pruned)) is expected


def test_saved_config(pruned):
    saved = read_json(pruned, "config")
    assert saved["model_type"] == "hivtp_llava_next"
    assert saved["pruning_config"] == PRUNING.to_dict()
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_hivtp_llava_next.HIVTPLlavaNextConfig",
        "AutoModel": "modeling_hivtp_llava_next.HIVTPLlavaNextModel",
        "AutoModelForImageTextToText": "modeling_hivtp_llava_next.HIVTPLlavaNextForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_hivtp_llava_next.HIVTPLlavaNextForConditionalGeneration",
    }


def test_saved_processor_config(pruned):
    saved = read_json(pruned, "processor_config")
    assert saved["pruning_config"] == PRUNING.to_dict()
    assert saved["auto_map"] == {"AutoProcessor": "processing_hivtp_llava_next.HIVTPLlavaNextProcessor"}


def test_tokenizer_stays_stock(stock, pruned):
    saved = (pruned / "tokenizer_config.json").read_text()
    assert not any(name in saved for name in ("pruning", *PRUNING.to_dict()))
    ours, theirs = AutoProcessor.from_pretrained(pruned).tokenizer, LlavaNextProcessor.from_pretrained(stock).tokenizer
    assert type(ours) is type(theirs)


def test_defaults_prune(stock):
    config = HIVTPLlavaNextConfig.from_pretrained(stock)
    processor = HIVTPLlavaNextProcessor.from_pretrained(stock)
    for part in (config, processor, HIVTPLlavaNextConfig()):
        assert part.pruning_config == VisualTokenPruningConfig()
    layout = processor.token_layout(60, 90)
    assert layout.num_retained < layout.num_stock


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


def constructed_processor(folder, settings):
    stock = LlavaNextProcessor.from_pretrained(folder)
    return HIVTPLlavaNextProcessor(stock.image_processor, stock.tokenizer, patch_size=7, pruning_config=settings)


def by_keyword(loading_class, source):
    return lambda folders, new_folder, given: loading_class.from_pretrained(folders[source], pruning_config=given)


def by_file(loading_class, name):
    return lambda folders, new_folder, given: loading_class.from_pretrained(
        edited_json(folders["pruned"], new_folder, name, given)
    )


# From the folders to load, a folder to write to and the settings, to what then has the settings.
ROUTES = {
    "config constructor": lambda folders, new_folder, given: HIVTPLlavaNextConfig(pruning_config=given),
    "config assignment": lambda folders, new_folder, given: assigned(HIVTPLlavaNextConfig(), given),
    "config keyword": by_keyword(HIVTPLlavaNextConfig, "pruned"),
    "config keyword, stock": by_keyword(HIVTPLlavaNextConfig, "stock"),
    "config file": by_file(HIVTPLlavaNextConfig, "config"),
    "AutoConfig keyword": by_keyword(AutoConfig, "pruned"),
    "AutoConfig file": by_file(AutoConfig, "config"),
    "model keyword": by_keyword(AutoModelForImageTextToText, "pruned"),
    "model keyword, stock": by_keyword(HIVTPLlavaNextForConditionalGeneration, "stock"),
    "base model keyword": by_keyword(AutoModel, "pruned"),
    "processor constructor": lambda folders, new_folder, given: constructed_processor(folders["stock"], given),
    "processor assignment": lambda folders, new_folder, given: assigned(constructed_processor(folders["stock"], None), given),
    "processor keyword": by_keyword(HIVTPLlavaNextProcessor, "pruned"),
    "processor keyword, stock": by_keyword(HIVTPLlavaNextProcessor, "stock"),
    "processor file": by_file(HIVTPLlavaNextProcessor, "processor_config"),
    "AutoProcessor keyword": by_keyword(AutoProcessor, "pruned"),
    "AutoProcessor file": by_file(AutoProcessor, "processor_config"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_reads_all_that_a_user_may_write(stock, pruned, tmp_path, route):
    half = VisualTokenPruningConfig(retention_ratio=0.5)
    default = VisualTokenPruningConfig()
    for step, (given, expected) in enumerate([({"retention_ratio": 0.5}, half), (half, half), (None, default), ({}, default)]):
        result = ROUTES[route]({"stock": stock, "pruned": pruned}, tmp_path / str(step), given)
        read = (result.config if isinstance(result, PreTrainedModel) else result).pruning_config
        assert isinstance(read, VisualTokenPruningConfig)
        assert read == expected, f"given {given!r}"


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_refuses_bad_settings(stock, pruned, tmp_path, route):
    for step, (bad, named) in enumerate(
        [
            ({"retention_ratio": 0}, "`retention_ratio` is 0"),
            ({"retention_rato": 0.5}, "`retention_rato`: not a setting"),
            ({"method": "unheard of"}, "`method` is 'unheard of'"),
            (0.5, "`pruning_config` is 0.5"),
            ("half", "`pruning_config` is 'half'"),
        ]
    ):
        with pytest.raises(ValueError, match=named):
            ROUTES[route]({"stock": stock, "pruned": pruned}, tmp_path / str(step), bad)


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
def stock_with_llama_tokenizer(stock):
    """A stock checkpoint that records a tokenizer class which would read its tokenizer.json differently."""
    folder = shutil.copytree(stock, stock.with_name("stock_with_llama_tokenizer"))
    tiny_processor(tiny_config(**GEOMETRY), llama_style_tokenizer()).save_pretrained(folder)
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
def test_unpruned_token_ids_equal_stock(checkpoint, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    image = Image.fromarray(np.zeros((60, 90, 3), dtype=np.uint8))
    theirs = LlavaNextProcessor.from_pretrained(folder)
    expected = theirs(images=image, text=TEXT)["input_ids"]

    ours = HIVTPLlavaNextProcessor.from_pretrained(folder, pruning_config={"retention_ratio": 1})
    assert ours(images=image, text=TEXT)["input_ids"] == expected

    HIVTPLlavaNextConfig.from_pretrained(folder).save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is HIVTPLlavaNextProcessor
    assert again(images=image, text=TEXT)["input_ids"] == expected
    # Serving engines read the tokenizer on its own.
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == theirs.tokenizer(TEXT)["input_ids"]

    # A checkpoint may also be converted by its settings alone, with the tokenizer's files as they came.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    converted = AutoProcessor.from_pretrained(tmp_path)
    assert converted(images=image, text=TEXT)["input_ids"] == expected


def refusals(folder):
    """Runs in a process without the package: what the Auto classes say of code that nobody trusts."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    messages = []
    for auto_class in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
        try:
            auto_class.from_pretrained(folder)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_untrusted_code_is_an_error(pruned, tmp_path):
    messages = run_without_package(refusals, tmp_path / "work", folder=pruned)
    assert len(messages) == 3
    assert all("trust_remote_code=True" in message for message in messages)
