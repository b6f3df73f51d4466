"""What tests of pushes share: checkpoints to push, and processes without the package that load what was pushed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from hub_server import HubServer, Request, run_client

WEIGHTS = "model.safetensors"
CARD = """\
---
license: llama2
base_model: owner/base
---
# A checkpoint

`from_pretrained("your-name/pruned.v1-5")`, which is your-name/pruned.v1-5.
"""
LOADING = r'AutoModelForImageTextToText\.from_pretrained\("(\S+)", revision="([0-9a-f]{40})", trust_remote_code=True\)'


def with_changes(source: Path, target: Path, changes: dict[str, bytes | str | None]) -> Path:
    """A copy of a folder with other files: text, bytes, or None for a file that is taken away."""
    shutil.copytree(source, target)
    for name, content in changes.items():
        path = target / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return target


def with_settings(source: Path, target: Path, pruning: dict[str, Any]) -> Path:
    """A copy of a pruned checkpoint with other settings."""
    changes = {}
    for name in ("config.json", "processor_config.json"):
        content = json.loads((source / name).read_text())
        content["pruning_config"] |= pruning
        changes[name] = json.dumps(content)
    return with_changes(source, target, changes)


def with_shards(source: Path, target: Path) -> Path:
    """A copy of a checkpoint whose weights lie in two files with an index."""
    weights = load_file(source / WEIGHTS)
    names = sorted(weights)
    index: dict[str, str] = {}
    shutil.copytree(source, target)
    (target / WEIGHTS).unlink()
    for number, keys in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, target / shard, {"format": "pt"})
        index |= dict.fromkeys(keys, shard)
    size = sum(weight.nbytes for weight in weights.values())
    (target / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    return target


def pushed_commit(outcome: dict[str, Any], repo_id: str) -> str:
    """The commit that a push which went well says to load."""
    assert outcome["status"] == 0, outcome["err"]
    found = re.search(LOADING, outcome["out"])
    assert found, outcome["out"]
    assert found[1] == repo_id
    return found[2]


def uploads(hub: HubServer) -> list[Request]:
    """The requests so far that sent bytes to storage."""
    return hub.asked("PUT", "^/storage/")


def check_that_no_token_got_out(hub: HubServer, outcomes: list[dict[str, Any]], tokens: list[str]) -> None:
    """No token in what was printed, in what was sent but for the header that carries it, or in what a repository holds."""
    for token in tokens:
        assert not any(token in outcome["out"] + outcome["err"] for outcome in outcomes)
        assert not any(token.encode() in request.body or token in request.target for request in hub.requests)
        for repository in hub.repositories:
            assert not any(token.encode() in content for content in repository.objects.values())
            for commit in repository.history.values():
                assert token not in commit.title + commit.message
                assert not any(token.encode() in content for content in commit.files.values())


def answers(sources: list[list[str | None]], without_package: bool, text: str) -> list[list[Any]]:
    """Runs with and without the package: per (name, revision), who answers a question about an image, and how."""
    import sys

    if without_package:
        for name in ("hivtp_hf", "torchvision"):
            sys.modules[name] = None  # cannot be imported
    import numpy as np
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = []
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    for name, revision in sources:
        code = {"revision": revision, "trust_remote_code": True} if without_package else {}
        model = AutoModelForImageTextToText.from_pretrained(name, **code)
        processor = AutoProcessor.from_pretrained(name, **code)
        inputs = processor(images=image, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        package = type(model).__module__.partition(".")[0]
        settings = model.config.pruning_config.to_dict()
        found.append([package, type(model).__name__, settings, output[0, inputs["input_ids"].shape[1] :].tolist()])
    return found


def check_same_answers(
    hub: HubServer,
    pushed: dict[tuple[str, str | None], Path],
    home: Path,
    token: str | bool = False,
    text: str = "<image> what",
) -> None:
    """Every repository at its revision answers in a process without the package as its folder does here."""
    sources = [list(source) for source in pushed]
    remote = run_client(hub, answers, home=home, token=token, sources=sources, without_package=True, text=text)
    local = answers([[str(folder), None] for folder in pushed.values()], without_package=False, text=text)
    assert {answer[0] for answer in remote} == {"transformers_modules"}
    assert {answer[0] for answer in local} == {"hivtp_hf"}
    assert [answer[1:] for answer in remote] == [answer[1:] for answer in local]
