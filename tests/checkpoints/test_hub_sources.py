"""Checkpoints that lie on the Hub, converted and inspected by the real client against a Hub on loopback."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoints import GEOMETRY
from families import FAMILIES
from hivtp_hf.checkpoints import inspect_checkpoint
from hub_commands import command_line, contents, finished, message_of, run_commands
from hub_server import HubServer, program
from nightly import mostly_nightly
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import greedy, photo

pytestmark = pytest.mark.once

PRUNING = {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 5}
WEIGHTS = "model.safetensors"
EVIL = {"modeling_evil.py": b"raise SystemExit('foreign code ran')\n", "nested/evil.py": b"raise SystemExit\n"}
FOREVER = 10**6


@pytest.fixture(scope="module", params=mostly_nightly(FAMILIES, lambda family: family == "llava_next"))
def stock(request, tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp(request.param) / "stock", family=request.param, **GEOMETRY)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The files of one checkpoint, for what is the same in every family."""
    return contents(build_stock_checkpoint(tmp_path_factory.mktemp("small") / "stock", family="llava", **GEOMETRY))


def config_with(files: dict[str, bytes], length: int) -> bytes:
    """A config.json that can be told from others by the length that its language model names."""
    config = json.loads(files["config.json"])
    config["text_config"]["max_position_embeddings"] = length
    return json.dumps(config).encode()


def test_a_private_checkpoint_becomes_a_folder_of_its_own(stock, tmp_path):
    files = contents(stock)
    cache, home, parent = tmp_path / "cache", tmp_path / "home", tmp_path / "made"
    settings = ("--method", "hiprune", "--retention-ratio", "0.25", "--object-layer", "5", "--cache-dir", cache)
    with HubServer() as hub:
        token = hub.token
        old = hub.add_repository("owner/tiny", {**files, **EVIL, "config.json": config_with(files, 1111)}, private=True)
        main = hub.commit("owner/tiny", {"config.json": files["config.json"]})
        hub.repository("owner/tiny").refs["refs/heads/branch"] = main
        hub.commit("owner/tiny", {"config.json": config_with(files, 3333)}, revision="branch")
        revisions = {"newest": [], "branch": ["--revision", "branch"], "old": ["--revision", old[:12]]}
        cases = [
            (["convert", "owner/tiny", parent / name, *revision, *settings], token) for name, revision in revisions.items()
        ]
        outcomes = run_commands(hub, home, cases, parent)
        assert [outcome["status"] for outcome in outcomes] == [0, 0, 0], outcomes
        # The weights of all are the same ones, and downloaded once; answers that hold them come from storage.
        assert len(hub.asked("GET", "^/storage/")) == 1
        assert not hub.asked(pattern="evil")
        assert not hub.unanswered

    lengths = {
        name: json.loads((parent / name / "config.json").read_text())["text_config"]["max_position_embeddings"]
        for name in revisions
    }
    assert lengths == {"newest": 8192, "branch": 3333, "old": 1111}
    assert {path.name for path in (cache / "models--owner--tiny").iterdir()} >= {"blobs", "snapshots"}
    assert not list(home.rglob("models--*"))
    stored = {path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    for name in revisions:
        assert (parent / name / WEIGHTS).read_bytes() == files[WEIGHTS]
        for path in (parent / name).rglob("*"):
            assert not path.is_symlink()
            assert path.is_dir() or (path.stat().st_nlink == 1 and path.stat().st_ino not in stored), path
            assert "evil" not in path.name
    # The token was sent, and is nowhere: neither in what was written nor in what was printed.
    assert any(token in request.headers.get("authorization", "") for request in hub.requests)
    assert not [path for path, content in contents(tmp_path).items() if token.encode() in content]
    assert not any(token in outcome["out"] + outcome["err"] for outcome in outcomes)

    family = FAMILIES[json.loads(files["config.json"])["model_type"]]
    model, processor = (kind.from_pretrained(parent / "newest") for kind in (AutoModelForImageTextToText, AutoProcessor))
    direct = family.model.from_pretrained(stock, pruning_config=PRUNING)
    assert type(model) is family.model
    inputs = processor(images=photo(60, 100), text="<image> what", return_tensors="pt")
    assert torch.equal(greedy(model, inputs), greedy(direct, inputs))


def test_inspection_takes_no_weights(stock, tmp_path):
    files = contents(stock)
    with HubServer() as hub:
        old = hub.add_repository("owner/tiny", {**files, **EVIL, "pytorch_model.bin": b"weights too"}, private=True)
        hub.commit("owner/tiny", {"config.json": b'{"model_type": "bert"}'})
        options = ("--json", "--size", "300x451", "--method", "gprune", "--revision", old, "--cache-dir", tmp_path / "cache")
        run = finished(hub, tmp_path / "home", command_line("inspect", "owner/tiny", *options), hub.token)
        assert run.returncode == 0, run.stderr
        assert not hub.asked(pattern=r"safetensors|\.bin|storage|evil")
        assert hub.asked("GET", rf"/resolve/{old}/config\.json")
        assert hub.token not in run.stdout + run.stderr
        assert not hub.unanswered
    report = json.loads(run.stdout)
    assert report.pop("checkpoint") == "owner/tiny"
    local = inspect_checkpoint(str(stock), [(300, 451)], {"method": "gprune"}).to_dict()
    del local["checkpoint"]
    assert report == local
    assert not list((tmp_path / "home").rglob("models--*"))
    assert list((tmp_path / "cache").rglob("config.json"))


def test_refusals_are_one_message_and_leave_nothing(small, tmp_path):
    parent = tmp_path / "parent"
    target = parent / "pruned"
    with HubServer() as hub:
        stranger = hub.add_user("stranger")
        hub.add_repository("owner/fine", small)
        hub.add_repository("owner/private", small, private=True)
        hub.add_repository("owner/gated", small, gated=True)
        hub.add_repository("owner/bert", {"config.json": b'{"model_type": "bert"}', WEIGHTS: b"w"})
        hub.add_repository("owner/bare", {name: content for name, content in small.items() if name != WEIGHTS})
        for name in ("down", "denied"):
            hub.add_repository(f"owner/{name}", small)
        hub.fail(None, "^/api/models/owner/down", status=503, times=FOREVER)
        hub.fail(None, "^/storage/objects/owner/denied/", status=403, times=FOREVER)
        expected = [
            ("owner/absent", [], None, "404|Repository Not Found"),
            ("owner/private", [], stranger, "404|Repository Not Found"),
            ("owner/fine", [], "hf_no_such_token_0123456789", "401|Invalid"),
            ("owner/gated", [], None, "gated|restricted"),
            ("owner/gated", [], stranger, "Ask for access"),
            ("owner/fine", ["--revision", "no-such-branch"], None, "Check `revision`"),
            ("owner/fine", ["--revision", "0" * 40], None, "0{40}"),
            ("owner/down", [], None, "503"),
            ("owner/denied", [], None, "403"),
            ("owner/bert", [], None, "has the model type 'bert'"),
            ("owner/bare", [], None, "has no weights"),
            ("owner/fine/more", [], None, "is no folder, and no repository on the Hub"),
        ]
        cases = [(["convert", source, target, *options], token) for source, options, token, _ in expected]
        outcomes = run_commands(hub, tmp_path / "home", cases, parent)
        tokens = [stranger, hub.token, "hf_no_such_token_0123456789"]
        for (source, options, _, text), outcome in zip(expected, outcomes, strict=True):
            message = message_of(outcome, tokens)
            assert re.search(text, message), (source, options, message)
        assert not hub.unanswered


def test_a_download_that_is_cut_again_and_again(small, tmp_path):
    parent, home = tmp_path / "parent", tmp_path / "home"
    target = parent / "pruned"
    with HubServer() as hub:
        hub.add_repository("owner/tiny", small)
        hub.add_repository("owner/config", small)
        hub.cut("^/storage/objects/", after_bytes=0, times=40)
        hub.cut("^/owner/config/resolve/.*/config.json", after_bytes=10, times=40)
        cases = [(["convert", source, target], hub.token) for source in ("owner/tiny", "owner/config")]
        for outcome in run_commands(hub, home, cases, parent):
            message_of(outcome, [hub.token])
    # The same repository on a Hub that is well again, and the cache as the failures left it.
    with HubServer() as hub:
        hub.add_repository("owner/tiny", small)
        run = finished(hub, home, command_line("convert", "owner/tiny", target))
        assert run.returncode == 0, run.stderr
    assert (target / WEIGHTS).read_bytes() == small[WEIGHTS]
    assert [path.name for path in parent.iterdir()] == ["pruned"]


def test_no_hub_at_all(small, tmp_path):
    parent, home = tmp_path / "parent", tmp_path / "home"
    with HubServer() as hub:
        hub.add_repository("owner/tiny", small)
        first = finished(hub, home, command_line("inspect", "owner/tiny", "--json"), hub.token)
        assert first.returncode == 0, first.stderr
    # Configuration is in the cache by now, weights are not.
    cases = [(["convert", source, parent / "pruned"], hub.token) for source in ("owner/tiny", "owner/other")]
    for outcome in run_commands(hub, home, cases, parent):
        message_of(outcome, [hub.token])


def slowly(arguments: list[str]) -> None:
    """Runs in a process of its own: the command line, which tells when it has copied a piece of the weights, and waits."""
    import sys
    import time

    import hivtp_hf.cli
    from hivtp_hf.checkpoints import file_copies

    class Bar(file_copies.tqdm):
        def update(self, size=1):
            print("copied", size, flush=True)
            time.sleep(200)

    file_copies.tqdm = Bar
    file_copies._CHUNK_BYTES = 4096
    file_copies._share_blocks = lambda source, target: False
    sys.argv = ["hivtp", *arguments]
    hivtp_hf.cli.main()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_a_killed_process_leaves_no_half_target(small, tmp_path):
    parent, home = tmp_path / "parent", tmp_path / "home"
    target = parent / "pruned"
    home.mkdir()
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    with HubServer() as hub:
        hub.add_repository("owner/tiny", small)
        arguments = ["convert", "owner/tiny", str(target), "--force"]
        process = subprocess.Popen(
            [sys.executable, *program(slowly, arguments=arguments)],
            cwd=home,
            env=hub.environment(home, token=False),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline() == "copied 4096\n"
            assert [path for path in parent.rglob(WEIGHTS) if path.is_file()]  # it is under way
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0, output
        assert contents(target) == {"mine.txt": b"mine"}
        again = finished(hub, home, command_line(*arguments))
        assert again.returncode == 0, again.stderr
    assert (target / WEIGHTS).read_bytes() == small[WEIGHTS]
    assert not (target / "mine.txt").exists()
    # What a killed process leaves is out of sight, and in nobody's way.
    assert all(path == target or path.name.startswith(".pruned.unfinished-") for path in parent.iterdir())
