"""Pushes that the Hub refuses, or that something breaks off: one message, nothing half done, and then they go on."""

import hashlib
import json
import re

import pytest

from checkpoints import build_pruned_checkpoint
from forked import run_python
from hub_commands import command_line, contents, message_of, run_commands
from hub_server import HubServer
from pushes import WEIGHTS, check_that_no_token_got_out, pushed_commit, with_changes, with_shards

pytestmark = pytest.mark.once

FOREVER = 10**6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_pruned_checkpoint(tmp_path_factory.mktemp("small"), {"retention_ratio": 0.4}, "llava")


def test_refusals_are_one_message_and_change_nothing(small, tmp_path):
    unknown = "hf_no_such_token_0123456789"
    with HubServer() as hub:
        stranger = hub.add_user("stranger")
        for name in ("open", "tagged", "down", "shut"):
            hub.add_repository(f"owner/{name}")
        hub.add_repository("owner/hidden", private=True)
        repository = hub.repository("owner/tagged")
        repository.refs["refs/tags/v1"] = repository.refs["refs/heads/main"]
        hub.fail(None, "^/api/models/owner/down", status=503, times=FOREVER)
        hub.fail("PUT", "^/storage/uploads/owner/shut/", status=403, times=FOREVER)
        expected = [
            # arguments, token, what the message says
            (["owner/open"], unknown, "401.*the Hub does not know the token: log in with `hf auth login`"),
            (["owner/open"], stranger, "403.*may write.*open a pull request with `--pr`"),
            (["owner/open", "--revision", "dev"], stranger, "403.*may write"),
            (["owner/hidden"], stranger, "403.*rights to create"),  # it cannot be seen, so it would be made
            (["owner/new"], stranger, "403.*rights to create"),
            (["owner/open", "--private"], hub.token, "exists and is public"),
            (["owner/tagged", "--revision", "v1"], hub.token, "'v1', which is a tag"),
            (["owner/tagged", "--revision", "refs/tags/v1"], hub.token, "which is a tag"),
            (["owner/tagged", "--revision", "refs/pr/9"], hub.token, "'refs/pr/9', which owner/tagged does not have"),
            (["owner/absent", "--pr"], hub.token, "owner/absent does not exist.*no pull request"),
            (["owner/down"], hub.token, "503.*Run the same command again"),
            (["owner/shut"], hub.token, "owner/shut: Error while uploading 'model.safetensors'.*403.*again"),
        ]
        before = {each.repo_id: (dict(each.refs), set(each.objects)) for each in hub.repositories}
        cases = [(["push", small, *arguments], token) for arguments, token, _ in expected]
        outcomes = run_commands(hub, tmp_path / "home", cases)
        tokens = [unknown, stranger, hub.token]
        check_that_no_token_got_out(hub, outcomes, tokens)
        for (arguments, _, text), outcome in zip(expected, outcomes, strict=True):
            message = message_of(outcome, tokens)
            assert re.search(text, message, re.DOTALL | re.IGNORECASE), (arguments, message)
            assert "signature=" not in message  # an address that is signed lets others write
        assert {each.repo_id: (dict(each.refs), set(each.objects)) for each in hub.repositories} == before
        assert not hub.unanswered


def test_what_passes_is_waited_for(small, tmp_path):
    steps = [
        ("GET", "^/api/models/owner/new$"),
        ("POST", "/repos/create"),
        ("GET", "/refs$"),
        ("GET", "/tree/"),
        ("POST", "/preupload/"),
        ("POST", "/info/lfs/objects/batch"),
        ("PUT", "^/storage/uploads"),
        ("POST", "/branch/"),
        ("POST", "/validate-yaml"),
        ("POST", "/commit/"),
    ]
    with HubServer() as hub:
        for method, pattern in steps:
            hub.fail(method, pattern, status=503)
            hub.fail(method, pattern, status=429, retry_after=30)
        (outcome,) = run_commands(hub, tmp_path / "home", [(["push", small, "owner/new", "--revision", "dev"], hub.token)])
        assert pushed_commit(outcome, "owner/new") == hub.commits("owner/new", "dev")[0].oid
        assert [len(hub.commits("owner/new", branch)) for branch in ("main", "dev")] == [1, 2]
        for method, pattern in steps:
            assert [request.status for request in hub.asked(method, pattern)][:2] == [503, 429]
            assert 200 in [request.status for request in hub.asked(method, pattern)], pattern
        assert outcome["slept"] == 2 * len(steps)
        assert "answers 429; trying again in 31 s." in outcome["err"]


def test_a_refused_commit_leaves_nothing_where_uploads_use_xet(small, tmp_path):
    # As users have it, and with the number of refusals after which `upload_folder` commits a part of the files. A checkpoint
    # without weights, as nothing of it goes through storage.
    config = json.loads((small / "config.json").read_text()) | {"base_model": {"name": "owner/base", "revision": "0" * 40}}
    folder = with_changes(small, tmp_path / "folder", {"config.json": json.dumps(config), WEIGHTS: None})
    assert len(contents(folder)) > 5
    with HubServer() as hub:
        before = hub.add_repository("owner/model")
        hub.fail("POST", "/commit/", status=400, times=6)
        environment = hub.environment(tmp_path / "home") | {"HF_HUB_DISABLE_XET": "0"}
        (tmp_path / "home").mkdir()
        run = run_python(command_line("push", folder, "owner/model"), tmp_path / "home", environment)
        assert run.returncode == 1, run.stderr
        assert "Bad request for commit endpoint" in run.stderr
        assert hub.repository("owner/model").refs == {"refs/heads/main": before}
        assert not hub.unanswered


def test_what_is_cut_goes_on(small, tmp_path):
    whole = with_shards(small, tmp_path / "whole")
    first, second = sorted(path for path in whole.glob("*.safetensors"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    stock = contents(small.parent / "stock_source")
    push = (["push", whole, "owner/model", "--revision", "dev"], None)
    with HubServer() as hub:
        before = hub.add_repository("owner/model", stock)
        hub.cut(f"uploads/.*/{hashes[1]}", after_bytes=second.stat().st_size // 2, times=6)  # as often as the client tries
        hub.cut("/commit/dev", after_bytes=1000)
        # Then somebody else commits between the look at the branch and the commit.
        overtaking = []
        news = {"NEWS.md": b"new"}
        hub.meanwhile("POST", "/commit/dev", lambda: overtaking.append(hub.commit("owner/model", news, revision="dev")))
        outcomes = run_commands(hub, tmp_path / "home", [(push[0], hub.token)] * 4)
        check_that_no_token_got_out(hub, outcomes, [hub.token])
        in_upload, in_commit, too_late = (message_of(outcome, [hub.token]) for outcome in outcomes[:3])
        assert "owner/model: Error while uploading 'model-00002-of-00002.safetensors'" in in_upload
        assert "The connection to the Hub broke" in in_commit
        assert "Somebody else has changed owner/model meanwhile" in too_late
        assert all("Run the same command again" in message for message in (in_upload, in_commit, too_late))
        commit = pushed_commit(outcomes[3], "owner/model")
        # What had arrived was not sent again, and there is one commit, on top of what is there.
        assert [request.status for request in hub.asked("PUT", hashes[0])] == [200]
        assert [request.status for request in hub.asked("PUT", hashes[1])] == [None] * 6 + [200]
        assert [each.oid for each in hub.commits("owner/model", "dev")][:3] == [commit, *overtaking, before]
        assert hub.commits("owner/model")[0].oid == before
        files = hub.files("owner/model", "dev")
        assert files["NEWS.md"] == b"new"
        assert {name: files[name] for name in contents(whole)} == contents(whole)
        assert WEIGHTS not in files
        # The branch was made when everything but the commit had arrived.
        (made,) = (index for index, request in enumerate(hub.requests) if "/branch/" in request.path and request.status == 200)
        assert all("/storage/" not in request.path for request in hub.requests[made:])
