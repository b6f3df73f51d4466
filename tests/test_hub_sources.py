"""Checkpoints that lie on the Hub, converted and inspected by the real client against a Hub on loopback."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoints import GEOMETRY
from families import FAMILIES
from hivtp_hf.inspection import inspect_checkpoint
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


def length_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["text_config"]["max_position_embeddings"]


def downloads_of_weights(hub: HubServer) -> int:
    """How many answers held the weights, or a part of them: they come from storage."""
    return len(hub.asked("GET", "^/storage/"))


def converted(source: str, targets: dict[str, str | None], pruning: dict[str, Any], token: str | None, cache_dir: str | None):
    """Runs in a process of its own: converts revisions, by target."""
    from hivtp_hf.conversion import convert_checkpoint

    return [
        str(convert_checkpoint(source, target, pruning, revision=revision, token=token, cache_dir=cache_dir))
        for target, revision in targets.items()
    ]


def test_a_private_checkpoint_becomes_a_folder_of_its_own(stock, tmp_path):
    files = contents(stock)
    cache, home = tmp_path / "cache", tmp_path / "home"
    with HubServer() as hub:
        token = hub.token
        old = hub.add_repository("owner/tiny", {**files, **EVIL, "config.json": config_with(files, 1111)}, private=True)
        main = hub.commit("owner/tiny", {"config.json": files["config.json"]})
        hub.repository("owner/tiny").refs["refs/heads/branch"] = main
        hub.commit("owner/tiny", {"config.json": config_with(files, 3333)}, revision="branch")

        # A first run of the whole, then other revisions in another process: the weights are the same ones.
        shared = {"source": "owner/tiny", "pruning": PRUNING, "token": token, "cache_dir": cache}
        runs = [finished(hub, home, program(converted, targets={str(tmp_path / "made"): None}, **shared))]
        assert runs[0].returncode == 0, runs[0].stderr
        assert downloads_of_weights(hub) == 1
        taken = len(hub.asked("GET", "/resolve/"))
        assert taken >= 5
        revisions = {"again": None, "branch": "branch", "old": old, "short": old[:12]}
        more = {str(tmp_path / name): revision for name, revision in revisions.items()}
        runs.append(finished(hub, home, program(converted, targets=more, **shared)))
        assert runs[1].returncode == 0, runs[1].stderr
        assert downloads_of_weights(hub) == 1
        # Two of the commits differ, each in one file.
        assert [request.path.rpartition("/")[2] for request in hub.asked("GET", "/resolve/")[taken:]] == ["config.json"] * 2
        runs.append(finished(hub, home, command_line("convert", "owner/tiny", tmp_path / "line", "--cache-dir", cache), token))
        assert runs[2].returncode == 0, runs[2].stderr
        assert downloads_of_weights(hub) == 1
        assert not hub.asked(pattern="evil")
        assert not hub.unanswered

    targets = {name: tmp_path / name for name in ("made", "again", "branch", "old", "short", "line")}
    lengths = {name: length_of(target) for name, target in targets.items()}
    assert lengths == {"made": 8192, "again": 8192, "branch": 3333, "old": 1111, "short": 1111, "line": 8192}
    made, again = contents(targets["made"]), contents(targets["again"])
    again["README.md"] = again["README.md"].replace(b"your-name/again", b"your-name/made")  # their cards name the folders
    assert again == made
    assert {path.name for path in (cache / "models--owner--tiny").iterdir()} >= {"blobs", "snapshots"}
    assert not list(home.rglob("models--*"))
    stored = {path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    for target in targets.values():
        assert (target / WEIGHTS).read_bytes() == files[WEIGHTS]
        for path in target.rglob("*"):
            assert not path.is_symlink()
            assert path.is_dir() or (path.stat().st_nlink == 1 and path.stat().st_ino not in stored), path
        assert not list(target.rglob("*evil*"))
    # The token was sent, and is nowhere: neither in what was written nor in what was printed.
    assert any(token in request.headers.get("authorization", "") for request in hub.requests)
    assert not [path for path, content in contents(tmp_path).items() if token.encode() in content]
    assert not any(token in run.stdout + run.stderr for run in runs)

    family = FAMILIES[json.loads(files["config.json"])["model_type"]]
    model, processor = (kind.from_pretrained(targets["made"]) for kind in (AutoModelForImageTextToText, AutoProcessor))
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
        for name in ("down", "stalled", "denied"):
            hub.add_repository(f"owner/{name}", small)
        hub.fail(None, "^/api/models/owner/down", status=503, times=FOREVER)
        hub.fail(None, "^/owner/stalled/resolve/.*/config.json", status=503, times=FOREVER)
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
            ("owner/stalled", [], None, "An error happened while trying to locate the file on the Hub"),
            ("owner/denied", [], None, "403"),
            ("owner/bert", [], None, "has the model type 'bert'"),
            ("owner/bare", [], None, "has no weights"),
            ("owner/fine/more", [], None, "is no folder, and no repository on the Hub"),
            ("owner/..bad", [], None, "owner/..bad"),
        ]
        cases = [(["convert", source, target, *options], token) for source, options, token, _ in expected]
        inspected = [(["inspect", source, *options], token) for source, options, token, _ in expected[:9]]
        outcomes = run_commands(hub, tmp_path / "home", [*cases, *inspected], parent)
        tokens = [stranger, hub.token, "hf_no_such_token_0123456789"]
        for (source, options, _, text), outcome in zip([*expected, *expected[:9]], outcomes, strict=True):
            message = message_of(outcome, tokens)
            assert re.search(text, message), (source, options, message)
        assert not hub.unanswered


def test_a_fault_that_passes_is_survived(small, tmp_path):
    parent, names = tmp_path / "parent", ("limited", "busy", "cut")
    with HubServer() as hub:
        for name in names:
            hub.add_repository(f"owner/{name}", small)
        hub.fail("GET", "^/storage/objects/owner/limited/", status=429, retry_after=1)
        hub.fail("GET", "^/owner/busy/resolve/.*/tokenizer.json", status=429, retry_after=1)
        hub.fail("HEAD", "^/owner/busy/resolve/.*/config.json", status=503)
        hub.cut("^/storage/objects/owner/cut/", after_bytes=len(small[WEIGHTS]) // 2)
        cases = [(["convert", f"owner/{name}", parent / name], None) for name in names]
        outcomes = dict(zip(names, run_commands(hub, tmp_path / "home", cases, parent), strict=True))
        # Each fault was met: what it hit was asked for again.
        statuses = {name: [r.status for r in hub.asked("GET", f"^/storage/.*owner/{name}/")] for name in names}
        assert [r.status for r in hub.asked("HEAD", "^/owner/busy/resolve/.*/config.json")].count(503) == 1
        assert [r.status for r in hub.asked("GET", "^/owner/busy/resolve/.*/tokenizer.json")].count(429) == 1
    assert statuses["limited"] == [429, 200]
    assert statuses["cut"] in ([200, 206], [200, 200])  # resumed, or from the start where too little had come
    for name, outcome in outcomes.items():
        assert outcome["status"] == 0, (name, outcome["err"])
        assert (parent / name / WEIGHTS).read_bytes() == small[WEIGHTS]
        assert AutoProcessor.from_pretrained(parent / name).pruning_config.method == "hivtp"
    assert sorted(path.name for path in parent.iterdir()) == sorted(names)


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
        assert 0 < len(hub.asked("GET", "^/storage/objects/")) < 40
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
    from hivtp_hf.conversion import file_copies

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
@pytest.mark.parametrize("force", mostly_nightly([False, True], bool))
def test_a_killed_process_leaves_no_half_target(small, tmp_path, force):
    parent, home = tmp_path / "parent", tmp_path / "home"
    target = parent / "pruned"
    home.mkdir()
    parent.mkdir()
    if force:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    before = contents(parent)
    with HubServer() as hub:
        hub.add_repository("owner/tiny", small)
        arguments = ["convert", "owner/tiny", str(target), *(["--force"] if force else [])]
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
        assert target.exists() == force
        assert {path: (parent / path).read_bytes() for path in before} == before
        again = finished(hub, home, command_line(*arguments))
        assert again.returncode == 0, again.stderr
    assert (target / WEIGHTS).read_bytes() == small[WEIGHTS]
    assert not (target / "mine.txt").exists()
    # What a killed process leaves is out of sight, and in nobody's way.
    assert all(path == target or path.name.startswith(".pruned.unfinished-") for path in parent.iterdir())
