"""A saved folder must work where the package is not installed, from the Python file that lies beside the weights."""

import json
import zipfile
from pathlib import Path

import pytest

from checkpoints import GEOMETRY, build_pruned_checkpoint, run_without_package
from families import FAMILIES
from hivtp_hf.remote_code import bundle
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.releases
DATA = Path(__file__).parents[1] / "data"
# A checkpoint of each family, with a method of its own each.
CHECKPOINTS = {
    "llava_next": {"retention_ratio": 0.4, "regions": 1},
    "llava": {"method": "hiprune", "retention_ratio": 0.4, "alpha": 0.2},
}
# Methods whose answers are compared too, from one process for all of them.
OTHER_METHODS = {
    "llava_next": [{"method": "hiprune"}, {"method": "gprune"}],
    "llava": [{"method": "gprune", "token_budget": 20}, {"method": "cls_attention"}, {"method": "random", "seed": 3}],
}


def code_of(folder):
    return {file.name: file.read_text() for file in Path(folder).glob("*.py")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["config", "processor", "model"])
def test_each_part_saved_alone_brings_the_whole_code(tmp_path, family, part):
    stock = build_stock_checkpoint(tmp_path / "stock", family=family, **GEOMETRY)
    getattr(FAMILIES[family], part).from_pretrained(stock).save_pretrained(tmp_path / "saved")
    assert code_of(tmp_path / "saved") == {f"hivtp_{family}.py": bundle(family)}


def answers(folder, trust_remote_code, saved_folder=None, other_settings=(), **settings):
    """Runs with and without the package: the tokens that a checkpoint generates, and who generates them."""
    import numpy as np
    from PIL import Image
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trust = {"trust_remote_code": trust_remote_code}
    greedy = {"max_new_tokens": 12, "do_sample": False}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust, **settings)
    processor = AutoProcessor.from_pretrained(folder, **trust, **settings)
    pixels = np.random.default_rng(0)
    images = [
        Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in ((90, 60), (50, 170))
    ]
    prompts = ["USER: <image>\nWhat is shown? ASSISTANT:", "USER: <image>\nHow many people are on the left? ASSISTANT:"]

    def generate(count, model=model, processor=processor):
        inputs = processor(images=images[:count], text=prompts[:count], padding=True, return_tensors="pt")
        generated = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :]
        return {"padding": (inputs["attention_mask"] == 0).sum(1).tolist(), "tokens": generated.tolist()}

    question = [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is shown?"}]
    chat = [{"role": "user", "content": question}]
    from_pipeline = pipeline("image-text-to-text", model=folder, **trust)(
        text=chat, return_full_text=False, generate_kwargs=greedy
    )
    of_other_methods = []
    for pruning in other_settings:
        parts = [
            auto.from_pretrained(folder, **trust, pruning_config=pruning)
            for auto in (AutoModelForImageTextToText, AutoProcessor)
        ]
        kept = [part.pruning_config.to_dict() for part in (parts[0].config, parts[1])]
        of_other_methods.append([*kept, generate(2, *parts)])
    if saved_folder:
        model.save_pretrained(saved_folder)
        processor.save_pretrained(saved_folder)
    base_model = AutoModel.from_pretrained(folder, **trust)
    return {
        "generated": {"one": generate(1), "two": generate(2), "pipeline": from_pipeline[0]["generated_text"]},
        "other methods": of_other_methods,
        "classes": [type(part).__name__ for part in (model, processor, model.config, base_model)],
        "packages": sorted({type(part).__module__.split(".")[0] for part in (model, processor, model.config, base_model)}),
    }


@pytest.fixture(scope="module", params=CHECKPOINTS)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("checkpoint"), CHECKPOINTS[family.name], family.name)


@pytest.fixture(scope="module")
def installed(folder, family):
    """What the installed package answers, in this process."""
    return answers(str(folder), trust_remote_code=False, other_settings=OTHER_METHODS[family.name])


def test_the_settings_show_in_the_answers(folder, installed):
    # Otherwise equal answers would not prove that remote code prunes, or pads to the left.
    everything = answers(str(folder), trust_remote_code=False, pruning_config={"retention_ratio": 1})
    for call in ("one", "two"):
        assert everything["generated"][call] != installed["generated"][call]
    assert any(installed["generated"]["two"]["padding"])
    of_methods = [installed["generated"]["two"]["tokens"], *(answer[-1]["tokens"] for answer in installed["other methods"])]
    assert len({str(tokens) for tokens in of_methods}) == len(of_methods) > 2


def test_remote_code_answers_as_the_installed_package(folder, family, installed):
    """And it saves its file again."""
    saved = folder.with_name("saved_by_remote_code")
    remote = run_without_package(
        answers,
        folder.with_name("first_process"),
        folder=folder,
        trust_remote_code=True,
        saved_folder=saved,
        other_settings=OTHER_METHODS[family.name],
    )
    assert (installed["packages"], remote["packages"]) == (["hivtp_hf"], ["transformers_modules"])
    assert {**remote, "packages": installed["packages"]} == installed
    assert remote["classes"][-1] == family.base.__name__
    assert code_of(saved) == code_of(folder)


def test_a_checkpoint_of_many_code_files_still_loads(tmp_path):
    """As older releases saved it: without weights, and with 33 files of code. Its settings rule, on weights of today."""
    old = tmp_path / "old"
    with zipfile.ZipFile(DATA / "config_only_checkpoint_of_33_code_files.zip") as saved:
        saved.extractall(old)
    base = build_stock_checkpoint(tmp_path / "base", **GEOMETRY, text_layers=2)  # as it was then
    config = json.loads((old / "config.json").read_text())
    config["base_model"]["name"] = str(base)
    (old / "config.json").write_text(json.dumps(config))
    remote = run_without_package(answers, tmp_path / "process", folder=old, trust_remote_code=True)
    assert remote["packages"] == ["transformers_modules"]
    installed = answers(str(old), trust_remote_code=False)
    assert installed["generated"] == remote["generated"]
    assert installed["classes"] == remote["classes"]


def pickled(folder, file):
    """Writes a configuration of remote code as an engine sends it to its processes, and says what is in it."""
    import copy
    import pickle
    from pathlib import Path

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.text_config._attn_implementation = "sdpa"
    # The engine keeps the part of the language model by itself, too.
    content = pickle.dumps([config, config.text_config])
    Path(file).write_bytes(content)
    copied = copy.deepcopy(config)
    copied.pruning_config = {"method": "none"}
    return {"values": config.to_json_string(), "names its module": b"transformers_modules" in content}


def unpickled(file):
    import pickle
    from pathlib import Path

    config, text_config = pickle.loads(Path(file).read_bytes())
    config.pruning_config = config.pruning_config.to_dict()  # which its class checks
    return {
        "values": config.to_json_string(),
        "package": type(config).__module__.split(".")[0],
        "one part": config.text_config is text_config,
        "attention": text_config._attn_implementation,
    }


def test_a_configuration_of_remote_code_is_pickled_by_name(folder, tmp_path):
    """Engines pickle classes of remote code by value; ours reach what no pickler takes. The other process knows nothing yet."""
    file = tmp_path / "config.pickle"
    sent = run_without_package(pickled, tmp_path / "one", folder=folder, file=file)
    received = run_without_package(unpickled, tmp_path / "other", file=file)
    assert not sent["names its module"]
    assert received == {"values": sent["values"], "package": "transformers_modules", "one part": True, "attention": "sdpa"}
