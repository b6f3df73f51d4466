"""Checkpoints without weights on the Hub: published the short way, loaded from a pinned base, by the real client."""

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load, save

from checkpoints import GEOMETRY
from families import FAMILIES
from hub_commands import command_line, finished
from hub_server import HubServer, run_client
from nightly import mostly_nightly
from tiny_checkpoint import build_stock_checkpoint

PRUNING = {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 5}
WEIGHTS = "model.safetensors"
BASE, SMALL = "owner/base", "owner/small"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The files of a stock checkpoint, by family."""
    folders = {
        name: build_stock_checkpoint(tmp_path_factory.mktemp(name) / "stock", family=name, **GEOMETRY) for name in FAMILIES
    }
    return {name: {path.name: path.read_bytes() for path in folder.iterdir()} for name, folder in folders.items()}


def trained(weights: bytes) -> bytes:
    """Other weights of the same shapes, whose answers differ."""
    changed = {name: weight * (-1 if "lm_head" in name else 1) for name, weight in load(weights).items()}
    return save({name: weight.contiguous() for name, weight in changed.items()}, {"format": "pt"})


def publish(family: str, base: str, small: str, pruning: dict[str, Any]) -> str:
    """Runs in a process of its own: the short way to publish, as the README has it."""
    import hivtp_hf

    prefix = {"llava_next": "HIVTPLlavaNext", "llava": "HIVTPLlava"}[family]
    config = getattr(hivtp_hf, f"{prefix}Config").from_base_model(base, pruning_config=pruning)
    config.push_to_hub(small)
    processor = getattr(hivtp_hf, f"{prefix}Processor").from_pretrained(base, pruning_config=config.pruning_config)
    return processor.push_to_hub(small).oid


def loaded(name: str, ways: list[str], without_package: bool = True, secret: Any = None, **arguments: Any) -> Any:
    """Runs in a process of its own: what a checkpoint answers, loaded in several ways. `secret` is a token."""
    import sys

    if secret:
        arguments["token"] = secret
    if without_package:
        for module in ("hivtp_hf", "torchvision"):
            sys.modules[module] = None
    import numpy as np
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trust = {"trust_remote_code": True} if without_package else {}
    classes = {"base": AutoModel}
    if not without_package:
        import hivtp_hf

        classes["own"] = getattr(hivtp_hf, AutoConfig.from_pretrained(name).architectures[0])
    image = Image.fromarray((np.arange(60 * 100 * 3) % 251).astype(np.uint8).reshape(60, 100, 3))
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers: dict[str, object] = {}
    for way in ways:
        if way == "pipeline":
            pipe = pipeline("image-text-to-text", model=name, **arguments, **trust)
            model, processor = pipe.model, pipe.processor
        else:
            model = classes.get(way, AutoModelForImageTextToText).from_pretrained(name, **arguments, **trust)
            processor = AutoProcessor.from_pretrained(name, **arguments, **trust)
        inputs = processor(images=image, text="<image> what", return_tensors="pt")
        if way == "base":
            answers[way] = float(model(**inputs).last_hidden_state.float().abs().sum())
        else:
            answers[way] = model.generate(**inputs, **greedy)[0, inputs.input_ids.shape[1] :].tolist()
    base = model.config.base_model
    answers["method"] = model.config.pruning_config.method
    answers["base"] = None if base is None else list(base)
    answers["name"] = model.name_or_path
    return answers


def failing(names: list[str]) -> list[list[str]]:
    """Runs in a process of its own: the errors that loading ends in."""
    from transformers import AutoModelForImageTextToText

    import hivtp_hf  # noqa: F401

    errors = []
    for name in names:
        try:
            AutoModelForImageTextToText.from_pretrained(name)
        except Exception as error:
            errors.append([type(error).__name__, str(error)])
        else:
            errors.append(["", "it loaded"])
    return errors


@pytest.mark.parametrize("family", mostly_nightly(FAMILIES, lambda family: family == "llava_next"))
def test_published_the_short_way_and_loaded_without_the_package(stock, family, tmp_path):
    files = stock[family]
    with HubServer() as hub:
        pinned = hub.add_repository(BASE, files)
        run_client(hub, publish, home=tmp_path / "author", family=family, base=BASE, small=SMALL, pruning=PRUNING)
        pushed = hub.files(SMALL)
        assert WEIGHTS not in pushed
        assert sum(map(len, pushed.values())) < 700_000
        config = json.loads(pushed["config.json"])
        assert config["base_model"] == {"name": BASE, "revision": pinned}
        # No code of the package is needed, and the base may move on: its commit stays the one that was named.
        before = run_client(hub, loaded, home=tmp_path / "reader", token=False, name=SMALL, ways=["model"])
        hub.commit(BASE, {WEIGHTS: trained(files[WEIGHTS])})
        for without_package, way in ((True, "base"), (False, "own")):
            where = {"home": tmp_path / f"{way}_reader", "token": False, "name": SMALL, "without_package": without_package}
            after = run_client(hub, loaded, ways=[way, "model", "pipeline"], **where)
            assert after.get("own", before["model"]) == after["model"] == after["pipeline"] == before["model"]
            assert after["base"] == [BASE, pinned]
            assert (after["method"], after["name"]) == ("hiprune", SMALL)
        # The newest weights do answer otherwise, so that the comparison says something.
        hub.commit(SMALL, {"config.json": pushed["config.json"].replace(pinned.encode(), hub.commits(BASE)[0].oid.encode())})
        newest = run_client(hub, loaded, home=tmp_path / "other", token=False, name=SMALL, ways=["model"])
        assert newest["model"] != before["model"]
        assert not hub.unanswered


def test_a_revision_is_that_of_the_small_repository(stock, tmp_path):
    with HubServer() as hub:
        pinned = hub.add_repository(BASE, stock["llava_next"])
        first = run_client(hub, publish, family="llava_next", base=BASE, small=SMALL, pruning=PRUNING)
        run_client(hub, publish, family="llava_next", base=BASE, small=SMALL, pruning={"method": "gprune"})
        for revision, method in ((first, "hiprune"), ("main", "gprune")):
            ways = ["model", "pipeline"]
            answers = run_client(hub, loaded, home=tmp_path, name=SMALL, ways=ways, revision=revision)
            assert (answers["method"], answers["base"]) == (method, [BASE, pinned])
            assert answers["model"] == answers["pipeline"]


def test_token_cache_and_offline_reach_the_base(stock, tmp_path):
    cache, home = tmp_path / "cache", tmp_path / "home"
    with HubServer() as hub:
        hub.add_repository(BASE, stock["llava_next"], private=True)
        run_client(hub, publish, family="llava_next", base=BASE, small=SMALL, pruning=PRUNING)
        # A process without a token of its own gets it as an argument, and what it downloads goes where it is told.
        where = {"home": home, "token": False, "name": SMALL, "ways": ["model"], "cache_dir": cache}
        online = run_client(hub, loaded, secret=hub.token, **where)
        assert {path.name for path in cache.glob("models--*")} == {"models--owner--base", "models--owner--small"}
        assert not list((home / "hub").glob("models--owner--base"))
        asked = len(hub.requests)
        offline = run_client(hub, loaded, offline=True, local_files_only=True, **where)
        assert offline["model"] == online["model"]
        assert len(hub.requests) == asked


def test_bases_that_cannot_be_loaded(stock):
    files = stock["llava_next"]
    with HubServer() as hub:
        pinned = hub.add_repository(BASE, files)
        gated = hub.add_repository("owner/gated", files, gated=True)
        private = hub.add_repository("owner/private", files, private=True)
        run_client(hub, publish, family="llava_next", base=BASE, small=SMALL, pruning=PRUNING)
        small = hub.files(SMALL)
        cases = {
            "missing": ("owner/none", pinned, "OSError", "owner/none is not a local folder"),
            "commit": (BASE, "0" * 40, "OSError", "0" * 40),
            "gated": ("owner/gated", gated, "OSError", "gated repo"),
            "private": ("owner/private", private, "OSError", "owner/private is not a local folder"),
        }
        # Weights beside the name of a base are no base's fault, but which ones are meant?
        hub.add_repository("owner/both-small", {**small, WEIGHTS: files[WEIGHTS]})
        for case, (name, revision, *_) in cases.items():
            config = {**json.loads(small["config.json"]), "base_model": {"name": name, "revision": revision}}
            hub.add_repository(f"owner/{case}-small", {**small, "config.json": json.dumps(config).encode()})
        names = [f"owner/{case}-small" for case in cases]
        *errors, (_, message_of_both) = run_client(hub, failing, token=False, names=[*names, "owner/both-small"])
        for (case, (name, revision, kind, said)), (error, message) in zip(cases.items(), errors, strict=True):
            assert error == kind, (case, message)
            assert f"owner/{case}-small has no weights; its config.json names {name} at commit {revision}" in message, case
            assert said in message, (case, message)
        assert "owner/both-small has weights, and its config.json names" in message_of_both
        assert not hub.asked("GET", "^/storage/")  # no weights were fetched before


@pytest.mark.once
def test_converted_to_a_complete_one(stock, tmp_path):
    with HubServer() as hub:
        files = {**stock["llava_next"], "README.md": b"---\nlicense: llama2\n---\n# Base\n"}
        pinned = hub.add_repository(BASE, files)
        small, complete = tmp_path / "small", tmp_path / "complete"
        settings = ("--method", "hiprune", "--retention-ratio", "0.25", "--object-layer", "5")
        run = finished(hub, tmp_path / "home", command_line("convert", BASE, small, "--config-only", *settings))
        assert run.returncode == 0, run.stderr
        assert json.loads((small / "config.json").read_text())["base_model"] == {"name": BASE, "revision": pinned}
        card = (small / "README.md").read_text()
        assert ModelCard(card).data.to_dict() | {"base_model": BASE, "license": "llama2"} == ModelCard(card).data.to_dict()
        assert pinned in card
        assert not hub.asked("GET", "^/storage/")
        hub.commit(BASE, {WEIGHTS: trained(files[WEIGHTS])})
        hub.add_repository(SMALL, {path.name: path.read_bytes() for path in small.iterdir()})
        run = finished(hub, tmp_path / "home", command_line("convert", SMALL, complete))
        assert run.returncode == 0, run.stderr
        assert (complete / WEIGHTS).read_bytes() == files[WEIGHTS]
        assert "base_model" not in json.loads((complete / "config.json").read_text())
        # A repository with no weights at all is no base.
        hub.add_repository("owner/empty", {name: content for name, content in files.items() if name != WEIGHTS})
        run = finished(hub, tmp_path / "home", command_line("convert", "owner/empty", tmp_path / "x", "--config-only"))
        assert run.returncode == 1
        assert "owner/empty has no weights" in run.stderr
        hub.add_repository("owner/both", {**hub.files(SMALL), WEIGHTS: files[WEIGHTS]})
        run = finished(hub, tmp_path / "home", command_line("convert", "owner/both", tmp_path / "x"))
        assert run.returncode == 1
        assert "owner/both has weights, and its config.json names" in run.stderr
        assert not (tmp_path / "x").exists()
