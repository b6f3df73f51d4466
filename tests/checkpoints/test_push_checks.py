"""What `push_checkpoint` refuses by looking at the folder alone: nothing is sent, and nothing in it is run or followed."""

import json
import os
import re
import shutil

import pytest

from checkpoints import build_pruned_checkpoint
from hivtp_hf.checkpoints import push_checkpoint
from hivtp_hf.checkpoints.model_card import model_card
from pushes import WEIGHTS, with_shards

pytestmark = pytest.mark.once

TOKEN = "hf_planted_token_0123456789"
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("made"), {"retention_ratio": 0.4}, "llava")


@pytest.fixture
def folder(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "pruned")


@pytest.fixture(autouse=True)
def without_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))


def check_refused(folder, message, repo_id="owner/name", **arguments):
    """It is refused before anything is sent: requests fail here, as tests run offline."""
    with pytest.raises(ValueError, match=message) as refused:
        push_checkpoint(folder, repo_id, **{"token": TOKEN, **arguments})
    assert TOKEN not in str(refused.value)


def test_a_card_that_describes_other_settings(folder):
    # What all others differ from passes: the first request fails.
    said = model_card(folder, repo_id="owner/name")
    (folder / "README.md").write_text(str(said))
    with pytest.raises(OSError, match="offline"):
        push_checkpoint(folder, "owner/name", token=TOKEN)
    for name in ("config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text())
        content["pruning_config"]["retention_ratio"] = 0.3
        (folder / name).write_text(json.dumps(content))
    check_refused(folder, r"README\.md says that `retention_ratio` is 0\.4, and config\.json that it is 0\.3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"config.json": b"{"}, "cannot be read as JSON"),
        ({"config.json": b'{"model_type": "bert"}'}, "has the model type 'bert'"),
        ({"processor_config.json": None}, "has no processor_config.json"),
        ({"tokenizer.json": None}, "no tokenizer: one of tokenizer.json"),
        ({WEIGHTS: None}, "has no weights"),
        ({"hivtp_llava.py": None}, r"has no hivtp_llava\.py"),
        ({"hivtp_llava.py": b"from .absent import x\n"}, r"has no absent\.py"),
        ({"README.md": b"---\ntags: [\n---\n"}, "metadata of README.md cannot be read"),
        ({"README.md": b"\xff"}, "README.md is no text"),
        ({"notes/log.txt": f"token={TOKEN}".encode()}, r"notes/log\.txt holds the token"),
        ({"big.txt": b"x" * (2**20 - 5) + TOKEN.encode()}, r"big\.txt holds the token"),
        ({f"{TOKEN}.txt": b""}, "stands in the name of a file"),
    ],
)
def test_files_that_are_missing_or_wrong(folder, changes, message):
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    check_refused(folder, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"pruning_config": {"retention_ratio": 0.5}}, "different pruning settings"),
        ("config.json", {"auto_map": {"AutoConfig": "hivtp_llava.HIVTPLlavaConfig"}}, "AutoModelForImageText"),
        ("processor_config.json", {"auto_map": {}}, "AutoProcessor"),
        ("processor_config.json", {"image_processor": None}, "no settings for images"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "some/one--code.Own"]}}, "another repository"),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "own.Images"}}}, r"has no own\.py"),
        ("config.json", {"base_model": {"name": "owner/base", "revision": "main"}}, "40 hexadecimal"),
        ("config.json", {"base_model": {"name": "owner/base", "revision": COMMIT}}, "has weights"),
        ("config.json", {"base_model": {"name": "/models/base", "revision": None}}, "a folder of this machine"),
    ],
)
def test_settings_that_do_not_load(folder, name, changes, message):
    content = json.loads((folder / name).read_text())
    content = {key: value for key, value in (content | changes).items() if value is not None}
    (folder / name).write_text(json.dumps(content))
    check_refused(folder, message)


def test_a_missing_shard(folder, tmp_path):
    sharded = with_shards(folder, tmp_path / "sharded")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    check_refused(sharded, "names the shard 'model-00002-of-00002.safetensors'")


def test_no_pruned_checkpoint_at_all(pruned, tmp_path):
    check_refused(pruned.parent / "stock_source", "is a stock checkpoint .* `hivtp convert`")
    check_refused(tmp_path / "absent", "is no folder")
    check_refused(pruned / "config.json", "is no folder")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
@pytest.mark.parametrize("kind", ["file", "folder", "chain", "dangling", "hidden", "nested"])
def test_links_that_lead_out(folder, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder / ".env").write_text("secret")
    (folder / "notes").mkdir()
    link, target = {
        "file": (folder / "link.txt", outside / "secret.txt"),
        "folder": (folder / "link", outside),
        "chain": (folder / "link.txt", folder / "notes" / "second.txt"),
        "dangling": (folder / "link.txt", folder / "absent.txt"),
        "hidden": (folder / "link.txt", folder / ".env"),
        "nested": (folder / "notes" / "link.txt", "../../outside/secret.txt"),
    }[kind]
    if kind == "chain":
        target.symlink_to(outside / "secret.txt")
    link.symlink_to(target)
    said = "what is not pushed" if kind in ("dangling", "hidden") else "leads out of the folder"
    check_refused(folder, f"{re.escape(str(link))} is a link .*{said}|second.txt is a link .*{said}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file(folder):
    os.mkfifo(folder / "pipe")
    check_refused(folder, "pipe is neither a file nor a folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "name"}, "must be owner/name"),
        ({"repo_id": "owner/-bad-"}, "must be owner/name"),
        ({"revision": "dev", "create_pr": True}, "not both"),
        ({"revision": COMMIT}, "name of a branch"),
        ({"token": False}, "log in with `hf auth login`"),
    ],
)
def test_arguments(folder, arguments, message):
    check_refused(folder, message, **arguments)
