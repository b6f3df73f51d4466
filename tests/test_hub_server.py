"""The Hub on loopback is what the real client takes for the Hub."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hub_commands import contents
from hub_server import HubServer, run_client
from hub_server_repositories import oid_of, pointer_to
from pushes import with_changes

pytestmark = pytest.mark.once

CONFIG = b'{"model_type": "bert"}'
REPO = {"repo_id": "owner/model"}


def call(calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What calls of the client's API give, or the classes and status of what they raise, and how long it slept."""
    import time

    import huggingface_hub

    slept: list[float] = []
    time.sleep = slept.append
    outcomes: list[Any] = []
    for name, arguments in calls:
        try:
            outcomes.append(getattr(huggingface_hub, name)(**arguments))
        except Exception as error:
            response = getattr(error, "response", None)
            outcomes.append([response and response.status_code, *(kind.__name__ for kind in type(error).__mro__)])
    return {"outcomes": outcomes, "slept": slept}


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git itself")
def test_hashes_of_files_are_gits_own():
    for path, content, stored in [("x.json", b"\0b", b"\0b"), ("x.bin", b"", b""), ("x.bin", b"x", pointer_to(b"x"))]:
        run = subprocess.run(["git", "hash-object", "--stdin", "--no-filters"], input=stored, capture_output=True, check=True)
        assert run.stdout.decode().strip() == oid_of(path, content)


def test_a_folder_goes_up_and_comes_down_again(tmp_path):
    # What is cut off on its way up is in test_push_faults.py.
    weights = random.Random(0).randbytes(21 * 2**20)
    files = {"README.md": b"---\ntags: []\n---\n", "config.json": CONFIG, "a/ä b.txt": b"x", "a.bin": b"a", "w.pt": weights}
    (tmp_path / "empty").mkdir()
    with_changes(tmp_path / "empty", tmp_path / "first", files)
    with_changes(tmp_path / "first", tmp_path / "second", {"config.json": b"{}", "a.bin": b"b", "a/ä b.txt": None})
    upload = ("upload_folder", REPO | {"folder_path": str(tmp_path / "first"), "commit_message": "One"})
    change = ("upload_folder", REPO | {"folder_path": str(tmp_path / "second"), "delete_patterns": "a/*.txt"})
    with HubServer() as hub:
        hub.fail("POST", "/preupload/", status=503, retry_after=40)
        result = run_client(hub, call, calls=[("create_repo", REPO), upload, upload, change])
        created, one, same, two = result["outcomes"]
        assert created == f"{hub.endpoint}/owner/model"
        assert result["slept"] == [41]  # one second more than Retry-After says
        commits = hub.commits("owner/model")
        assert [commit.title for commit in commits] == ["Upload folder using huggingface_hub", "One", "initial commit"]
        assert [one, same, two] == [f"{created}/commit/{commits[index].oid}" for index in (1, 1, 0)]
        # Of the second commit only what is new.
        assert sorted(len(request.body) for request in hub.asked("PUT")) == [1, 1, len(weights)]

        hub.cut("^/storage/objects", after_bytes=15 * 2**20)
        downloads = [("hf_hub_download", REPO | {"filename": "w.pt"}), ("snapshot_download", REPO)]
        downloads.append(("snapshot_download", REPO | {"revision": commits[1].oid}))
        newest, older = map(Path, run_client(hub, call, home=tmp_path / "home", calls=downloads)["outcomes"][1:])
        for folder, source, commit in ((newest, "second", commits[0]), (older, "first", commits[1])):
            assert folder.name == commit.oid
            assert contents(folder) == commit.files
            assert contents(tmp_path / source).items() <= commit.files.items()
        # The client writes 10 MiB at a time, and what it has not written it asks for again.
        ranges = [request.headers.get("range") for request in hub.asked("GET", "^/storage/objects")]
        assert ranges[:2] == [None, f"bytes={10 * 2**20}-"]
        assert not any("authorization" in request.headers for request in hub.asked(pattern="^/storage"))
        assert not hub.unanswered


def test_refusals_raise_what_the_hub_makes_the_client_raise(tmp_path):
    with HubServer() as hub:
        stranger = hub.add_user("stranger")
        hub.add_repository("owner/private", {"config.json": CONFIG}, private=True)
        hub.add_repository("owner/gated", {"config.json": CONFIG}, gated=True)
        hub.add_repository("owner/model", {"config.json": CONFIG})
        config, deletion = REPO | {"filename": "config.json"}, REPO | {"path_in_repo": "config.json"}
        upload = REPO | {"path_or_fileobj": str(Path(__file__)), "path_in_repo": "x"}
        cases: list[tuple[str, str, int, dict[str, Any]]] = [
            # the call, what it raises, with which status, its arguments
            ("hf_hub_download", "RepositoryNotFoundError", 401, config | {"repo_id": "owner/private", "token": False}),
            ("model_info", "RepositoryNotFoundError", 404, {"repo_id": "owner/private", "token": stranger}),
            ("hf_hub_download", "GatedRepoError", 401, config | {"repo_id": "owner/gated", "token": False}),
            ("hf_hub_download", "GatedRepoError", 403, config | {"repo_id": "owner/gated", "token": stranger}),
            ("hf_hub_download", "EntryNotFoundError", 404, REPO | {"filename": "absent.json"}),
            ("hf_hub_download", "RevisionNotFoundError", 404, config | {"revision": "absent"}),
            ("model_info", "HfHubHTTPError", 401, REPO | {"token": "hf_wrong"}),
            ("create_repo", "HfHubHTTPError", 403, {"repo_id": "owner/new", "token": stranger}),
            ("upload_file", "HfHubHTTPError", 403, upload | {"token": stranger}),
            ("delete_file", "HfHubHTTPError", 412, deletion | {"parent_commit": "0" * 40}),
        ]
        before = hub.repository("owner/model").refs.copy()
        calls = [(name, arguments) for name, _, _, arguments in cases]
        outcomes = run_client(hub, call, home=tmp_path, calls=calls)["outcomes"]
        for (name, error, status, arguments), outcome in zip(cases, outcomes, strict=True):
            assert outcome[0] == status, (name, arguments, outcome)
            assert error in outcome[1:], (name, arguments, outcome)
        assert hub.repository("owner/model").refs == before
        # Whoever may not write may open a pull request, which leaves the main branch where it is.
        (proposed,) = run_client(hub, call, calls=[("upload_file", upload | {"token": stranger, "create_pr": True})])[
            "outcomes"
        ]
        assert proposed.endswith(f"/commit/{hub.commits('owner/model', 'refs/pr/1')[0].oid}")
        assert hub.repository("owner/model").refs == before | {"refs/pr/1": proposed.rpartition("/")[2]}
        assert hub.repository("owner/model").pull_requests == ["stranger"]
        assert not hub.unanswered
