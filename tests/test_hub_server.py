"""The Hub on loopback is what the real client takes for the Hub."""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, run_client
from hub_server_repositories import Blob, Repository, git_hash, ignored, tracked_by_lfs, tree_hashes

pytestmark = pytest.mark.once

CARD = b"---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- pruning\n---\n# A model\n"
CONFIG = json.dumps({"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}).encode()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


def call(calls: list[tuple[str, dict[str, Any]]], without_waiting: bool = False) -> dict[str, Any]:
    """What calls of the client's API give, or the names of the classes of what they raise, and how long it slept."""
    import time

    import huggingface_hub

    slept: list[float] = []
    if without_waiting:
        time.sleep = slept.append
    outcomes: list[Any] = []
    for name, arguments in calls:
        try:
            outcomes.append(getattr(huggingface_hub, name)(**arguments))
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            response = getattr(error, "response", None)
            outcomes.append({"raised": names, "status": response and response.status_code, "text": str(error)})
    return {"outcomes": outcomes, "slept": slept}


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git itself")
def test_hashes_are_gits_own(tmp_path):
    files = {"b.txt": b"b", "a/x": b"x", "a.txt": b"", "a-b": b"1", "a/deep/er/y": b"\0y"}
    repository = Repository("owner/model")
    commit = repository.commit("refs/heads/main", {path: Blob(content) for path, content in files.items()}, "Title", "Body")
    date = str(int(commit.date.timestamp())) + " +0000"
    who = {"NAME": "owner", "EMAIL": "owner@users.noreply.huggingface.co", "DATE": date}
    environment = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}

    def git(*arguments: str, **more: str) -> str:
        command = ["git", "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True).stdout.strip()

    written(tmp_path, files)
    git("init", "--quiet")
    git("add", "--all")
    tree = git("write-tree")
    assert tree_hashes(commit.files)[""] == tree
    assert git("commit-tree", tree, "-m", "Title", "-m", "Body") == commit.oid
    pointer = Blob(b"x", lfs=True).pointer
    assert git_hash("blob", pointer) == Blob(b"x", lfs=True).oid
    assert pointer.splitlines()[1:] == [b"oid sha256:" + hashlib.sha256(b"x").hexdigest().encode(), b"size 1"]


def test_attributes_and_ignored_paths():
    attributes = b"*.bin filter=lfs\nsaved/**/* filter=lfs\n*.bin -filter\n# *.txt filter=lfs\n"
    assert [tracked_by_lfs(path, attributes) for path in ("a.bin", "saved/x/y", "a.txt")] == [False, True, False]
    assert [ignored(path, "*.log\ncache/\n!keep.log\n#x") for path in ("a/b.log", "cache/x", "keep.log", "x")] == [
        *(True, True),
        *(False, False),
    ]


def test_a_folder_goes_up_and_comes_down_again(tmp_path):
    first = {
        "README.md": CARD,
        "config.json": CONFIG,
        "empty.bin": b"",
        "model.safetensors": random_bytes(300_000),
        "nested/deeper/pytorch_model.bin": random_bytes(1000, 1),
        "nested/große datei.txt": "ä".encode(),
        "untracked.dat": random_bytes(70_000, 2),
        "ignored.log": b"not to be committed",
        ".gitignore": b"*.log\n",
    }
    second = first | {"config.json": b"{}", "model.safetensors": random_bytes(300_001, 3)}
    del second["nested/große datei.txt"]
    folders = [str(written(tmp_path / name, files)) for name, files in {"first": first, "second": second}.items()]
    repo = {"repo_id": "owner/model"}
    with HubServer(lfs_threshold=50_000) as hub:
        created, again, refused, one, same, two = run_client(
            hub,
            call,
            calls=[
                ("create_repo", repo | {"exist_ok": True}),
                ("create_repo", repo | {"exist_ok": True}),
                ("create_repo", repo),
                ("upload_folder", repo | {"folder_path": folders[0], "commit_message": "One", "commit_description": "Why"}),
                ("upload_folder", repo | {"folder_path": folders[0], "ignore_patterns": ["ignored.log"]}),
                ("upload_folder", repo | {"folder_path": folders[1], "delete_patterns": "nested/*.txt"}),
            ],
        )["outcomes"]
        uploads = hub.asked("PUT")
        commits = hub.commits("owner/model")
        assert created == again == f"{hub.endpoint}/owner/model"
        assert refused["status"] == 409
        assert [commit.title for commit in commits] == ["Upload folder using huggingface_hub", "One", "initial commit"]
        assert [one, same, two] == [f"{created}/commit/{commits[index].oid}" for index in (1, 1, 0)]
        assert (commits[1].message, commits[1].author) == ("Why", "owner")
        assert commits[1].parent == commits[2].oid

        large = ["model.safetensors", "nested/deeper/pytorch_model.bin", "untracked.dat"]
        assert [path for path, blob in commits[1].files.items() if blob.lfs] == large
        sent = sorted(hashlib.sha256(first[path]).hexdigest() for path in large)
        assert sorted(request.path.rpartition("/")[2] for request in uploads[:3]) == sent
        assert len(uploads) == 4  # of the second commit only what is new
        attributes = hub.files("owner/model")[".gitattributes"].decode().splitlines()
        assert attributes[-1] == "untracked.dat filter=lfs diff=lfs merge=lfs -text"

        hub.requests.clear()
        fetched = run_client(
            hub,
            call,
            home=tmp_path / "home",
            calls=[
                ("snapshot_download", repo),
                ("snapshot_download", repo | {"revision": commits[1].oid}),
                ("snapshot_download", repo | {"local_dir": str(tmp_path / "plain"), "revision": commits[1].oid[:7]}),
            ],
        )["outcomes"]
        assert [Path(folder).name for folder in fetched[:2]] == [commits[0].oid, commits[1].oid]
        kept = [{path: content for path, content in files.items() if path != "ignored.log"} for files in (first, second)]
        for folder, expected, commit in zip(fetched[:2], (kept[1], kept[0]), commits, strict=False):
            found = read(folder)
            assert found == hub.files("owner/model", commit.oid)
            assert found.pop(".gitattributes")
            assert found == expected
        shutil.rmtree(tmp_path / "plain" / ".cache")
        assert read(fetched[2]) == hub.files("owner/model", commits[1].oid)

        in_storage = hub.asked(pattern="^/storage")
        assert in_storage
        assert {request.headers["host"].partition(":")[0] for request in in_storage} == {"localhost"}
        assert not any("authorization" in request.headers for request in in_storage)
        assert all("authorization" in request.headers for request in hub.asked(pattern="^/(api/models|owner)/"))
        assert hub.unanswered == []


def listed() -> dict[str, Any]:
    """All that the client can list of a repository and of the account."""
    from huggingface_hub import HfApi, hf_hub_url

    api, repo = HfApi(), "owner/model"
    api.create_branch(repo, branch="a/branch", revision="main")
    api.create_branch(repo, branch="a/branch", exist_ok=True)
    api.create_branch(repo, branch="gone")
    api.delete_branch(repo, branch="gone")
    api.create_tag(repo, tag="v1", tag_message="First")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=repo, revision="a/branch")
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    info = api.model_info(repo, files_metadata=True)
    paths = api.get_paths_info(repo, ["folder", "folder/model.bin", "absent"], expand=True)
    api.create_repo("owner/data", repo_type="dataset", private=True)
    api.upload_file(path_or_fileobj=b"rows" * 9, path_in_repo="rows.bin", repo_id="owner/data", repo_type="dataset")
    rows = api.hf_hub_download("owner/data", "rows.bin", repo_type="dataset")
    api.create_repo("owner/short-lived")
    api.update_repo_settings("owner/short-lived", private=True, gated="auto")
    settings = api.model_info("owner/short-lived", expand=["private", "gated"])
    api.delete_repo("owner/short-lived")
    metadata = [api.get_hf_file_metadata(url=hf_hub_url(repo, path)) for path in ("folder/model.bin", "x.txt")]
    return {
        "user": api.whoami()["name"],
        "metadata": [[each.commit_hash, each.etag, each.size, each.xet_file_data] for each in metadata],
        "locations": [each.location.partition("?")[0] for each in metadata],
        "branches": {ref.name: ref.target_commit for ref in refs.branches},
        "tags": {ref.ref: ref.target_commit for ref in refs.tags},
        "info": [info.sha, info.private, info.gated, info.library_name, info.tags, info.card_data.license, info.author],
        "siblings": {file.rfilename: [file.size, file.blob_id, file.lfs and file.lfs.sha256] for file in info.siblings},
        "tree": [file.path for file in api.list_repo_tree(repo, recursive=True)],
        "folder": [file.path for file in api.list_repo_tree(repo, "folder")],
        "paths": {path.path: [type(path).__name__, path.last_commit and path.last_commit.oid] for path in paths},
        "commits": [commit.commit_id for commit in api.list_repo_commits(repo)],
        "rows": open(rows, "rb").read().decode(),
        "settings": [settings.private, settings.gated, settings.siblings],
        "exists": [api.repo_exists("owner/short-lived"), api.file_exists(repo, "new.txt"), api.revision_exists(repo, "v1")],
    }


def test_what_is_listed_is_what_is_there():
    with HubServer(page_size=2) as hub:
        first = hub.add_repository("owner/model", {"README.md": CARD, "folder/model.bin": b"m" * 9, "folder/b/c.txt": b"c"})
        head = hub.commit("owner/model", {"x.txt": b"x", "folder/b/c.txt": b"d"})
        found = run_client(hub, listed)
        files = hub.commits("owner/model")[0].files
        branch = hub.commits("owner/model", "a/branch")[0]
    assert found["user"] == "owner"
    assert found["metadata"] == [[head, files["folder/model.bin"].sha256, 9, None], [head, files["x.txt"].oid, 1, None]]
    sha256 = files["folder/model.bin"].sha256
    assert found["locations"] == [
        f"{hub.storage}/objects/model/owner/model/{sha256}",
        f"{hub.endpoint}/owner/model/resolve/main/x.txt",
    ]
    assert found["branches"] == {"main": head, "a/branch": branch.oid}
    assert branch.files.keys() - files.keys() == {"new.txt"}
    assert found["tags"] == {"refs/tags/v1": head}
    assert found["info"] == [head, False, False, "transformers", ["pruning", "transformers"], "apache-2.0", "owner"]
    sizes = {path: [len(blob.content), blob.oid, blob.sha256 if blob.lfs else None] for path, blob in files.items()}
    assert found["siblings"] == sizes
    assert sizes["folder/model.bin"][2]
    assert found["tree"] == sorted([*files, "folder", "folder/b"])
    assert found["folder"] == ["folder/b", "folder/model.bin"]
    assert found["paths"] == {"folder": ["RepoFolder", None], "folder/model.bin": ["RepoFile", first]}
    assert found["commits"] == [commit.oid for commit in hub.commits("owner/model")]
    assert len(hub.asked("GET", "/tree/main$")) == 4
    assert len(hub.asked("GET", "/commits/")) == 2
    assert found["rows"] == "rows" * 9
    assert found["settings"] == [True, "auto", None]
    assert found["exists"] == [False, False, True]
    assert hub.unanswered == []


def test_large_objects_go_up_in_parts(tmp_path):
    weights = random_bytes(3_500_000)
    written(tmp_path, {"model.safetensors": weights})
    with HubServer(part_size=2**20) as hub:
        hub.add_repository("owner/model")
        repo = {"repo_id": "owner/model"}
        run_client(hub, call, calls=[("upload_folder", repo | {"folder_path": str(tmp_path)})])
        assert [len(request.body) for request in hub.asked("PUT")] == [2**20] * 3 + [3_500_000 - 3 * 2**20]
        assert [request.status for request in hub.asked("POST", "complete_multipart|verify")] == [200, 200]
        assert hub.files("owner/model")["model.safetensors"] == weights


def test_refusals_raise_what_the_hub_makes_the_client_raise(tmp_path):
    written(tmp_path, {"x": b"x", "README.md": b"---\ntags: [\n---\n"})
    with HubServer() as hub:
        stranger, friend = hub.add_user("stranger"), hub.add_user("friend")
        hub.add_repository("owner/private", {"config.json": CONFIG}, private=True)
        hub.add_repository("owner/gated", {"config.json": CONFIG, "model.bin": b"m"}, gated=True)
        hub.add_repository("owner/open", {"config.json": CONFIG})
        hub.grant("owner/gated", "friend")
        cases: list[tuple[str, str | None, int | None, dict[str, Any]]] = [
            # the call, what it raises, with which status, its arguments
            ("hf_hub_download", "RepositoryNotFoundError", 401, {"repo_id": "owner/private", "token": False}),
            ("snapshot_download", "RepositoryNotFoundError", 401, {"repo_id": "owner/private", "token": False}),
            ("model_info", "RepositoryNotFoundError", 401, {"repo_id": "owner/private", "token": False}),
            ("hf_hub_download", "RepositoryNotFoundError", 404, {"repo_id": "owner/private", "token": stranger}),
            ("hf_hub_download", "RepositoryNotFoundError", 404, {"repo_id": "owner/absent"}),
            ("model_info", "RepositoryNotFoundError", 401, {"repo_id": "absent", "token": False}),
            ("hf_hub_download", "GatedRepoError", 401, {"repo_id": "owner/gated", "token": False}),
            ("hf_hub_download", "GatedRepoError", 403, {"repo_id": "owner/gated", "token": stranger}),
            ("snapshot_download", "GatedRepoError", 403, {"repo_id": "owner/gated", "token": stranger}),
            ("auth_check", "GatedRepoError", 403, {"repo_id": "owner/gated", "token": stranger}),
            ("hf_hub_download", None, None, {"repo_id": "owner/gated", "filename": "model.bin", "token": friend}),
            ("hf_hub_download", None, None, {"repo_id": "owner/private"}),
            ("hf_hub_download", "EntryNotFoundError", 404, {"filename": "absent.json"}),
            ("hf_hub_download", "RevisionNotFoundError", 404, {"revision": "absent"}),
            ("model_info", "RevisionNotFoundError", 404, {"revision": "0" * 40}),
            ("model_info", "HfHubHTTPError", 401, {"token": "hf_wrong"}),
            ("whoami", "HfHubHTTPError", 401, {"token": "hf_wrong"}),
            ("create_repo", "HfHubHTTPError", 403, {"repo_id": "owner/new", "token": stranger}),
            ("upload_file", "HfHubHTTPError", 403, {"path_or_fileobj": "x", "path_in_repo": "x", "token": stranger}),
            ("upload_file", "ValueError", None, {"path_or_fileobj": "README.md", "path_in_repo": "README.md"}),
            ("delete_file", "EntryNotFoundError", 404, {"path_in_repo": "absent"}),
            ("delete_file", "HfHubHTTPError", 412, {"path_in_repo": "config.json", "parent_commit": "0" * 40}),
        ]
        before = hub.repository("owner/open").refs.copy()
        calls = []
        for name, _, _, arguments in cases:
            arguments = arguments if name == "whoami" else {"repo_id": "owner/open"} | arguments
            if name == "hf_hub_download":
                arguments.setdefault("filename", "config.json")
            calls.append((name, arguments))
        outcomes = run_client(hub, call, home=tmp_path, calls=calls)["outcomes"]
        for (name, error, status, arguments), outcome in zip(cases, outcomes, strict=True):
            raised = outcome if isinstance(outcome, dict) else {"raised": [None], "status": None}
            assert error in raised["raised"], (name, arguments, outcome)
            assert raised["status"] == status, (name, arguments, outcome)
            if error == "HfHubHTTPError":
                assert raised["raised"][0] == "HfHubHTTPError"
        assert hub.repository("owner/open").refs == before
        assert hub.unanswered == []


def test_the_client_waits_and_tries_again(tmp_path):
    weights, small = {"path_in_repo": "model.bin", "path_or_fileobj": "model.bin"}, {"filename": "config.json"}
    written(tmp_path, {"model.bin": random_bytes(1000)})
    with HubServer() as hub:
        hub.add_repository("owner/model", {"config.json": CONFIG, "other.json": b"{}", "third.json": b"[]"})
        hub.fail("HEAD", "/resolve/main/config", status=429, retry_after=7, times=2)
        hub.fail("GET", "/resolve/main/config", status=429, retry_after=20)
        hub.fail("GET", "/resolve/main/other", status=503)
        hub.fail("GET", "^/api/models", status=503)
        hub.fail("POST", "/preupload/", status=503, retry_after=40)
        hub.fail("PUT", "^/storage/uploads", status=503)
        hub.fail("HEAD", "/resolve/main/third", status=403, gated=True)
        repo = {"repo_id": "owner/model"}
        result = run_client(
            hub,
            call,
            home=tmp_path,
            without_waiting=True,
            calls=[
                ("hf_hub_download", repo | small),
                ("hf_hub_download", repo | {"filename": "other.json"}),
                ("hf_hub_download", repo | {"filename": "other.json"}),
                ("model_info", repo),
                ("upload_file", repo | weights),
                ("hf_hub_download", repo | {"filename": "third.json"}),
            ],
        )
        config, other, other_again, info, upload, third = result["outcomes"]
        assert Path(config).read_bytes() == CONFIG
        assert other["raised"][0] == info["raised"][0] == "HfHubHTTPError"
        assert other["status"] == info["status"] == 503
        assert Path(other_again).read_bytes() == b"{}"
        assert upload.endswith(hub.commits("owner/model")[0].oid)
        assert third["raised"][0] == "GatedRepoError"
        assert result["slept"] == [8, 21, 41, 1]  # one second more than Retry-After says, or one
        assert [request.status for request in hub.asked("HEAD", "config")] == [429, 429, 200]
        assert [request.status for request in hub.asked("PUT")] == [503, 200]
        assert hub.files("owner/model")["model.bin"] == random_bytes(1000)


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path):
    mib = 2**20
    weights, text = random_bytes(21 * mib), random_bytes(5000, 1)
    with HubServer() as hub:
        hub.add_repository("owner/model", {"model.safetensors": weights, "merges.txt": text})
        hub.cut("^/storage/objects", after_bytes=15 * mib)
        hub.cut("/merges.txt$", after_bytes=100, times=2)
        repo = {"repo_id": "owner/model"}
        calls = [("hf_hub_download", repo | {"filename": name}) for name in ("model.safetensors", "merges.txt")]
        result = run_client(hub, call, home=tmp_path, without_waiting=True, calls=calls)
        assert [Path(path).read_bytes() for path in result["outcomes"]] == [weights, text]
        requests = hub.asked("GET", "^/storage/objects")
        # The client writes 10 MiB at a time, and what it has not written it asks for again.
        assert [request.headers.get("range") for request in requests] == [None, f"bytes={10 * mib}-"]
        assert [request.status for request in requests] == [200, 206]
        assert [request.sent for request in requests] == [15 * mib, 11 * mib]
        assert [request.sent for request in hub.asked("GET", "merges")] == [100, 100, 5000]
        assert result["slept"] == [1, 1, 1]


def test_ranges_are_those_asked_for():
    content = random_bytes(1000)
    source = """
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen
        found = []
        for wanted in ranges:
            try:
                with urlopen(Request(url, headers={"Range": wanted})) as answer:
                    found.append([answer.status, answer.headers["Content-Range"], answer.read().hex()])
            except HTTPError as error:
                found.append([error.code, error.headers["Content-Range"], ""])
        return found
    """
    with HubServer() as hub:
        hub.add_repository("owner/model", {"model.bin": content})
        ranges = ["bytes=10-19", "bytes=990-", "bytes=-5", "bytes=995-2000", "bytes=1000-"]
        found = run_client(hub, source, url=f"{hub.endpoint}/owner/model/resolve/main/model.bin", ranges=ranges)
    assert found == [
        [206, "bytes 10-19/1000", content[10:20].hex()],
        [206, "bytes 990-999/1000", content[990:].hex()],
        [206, "bytes 995-999/1000", content[-5:].hex()],
        [206, "bytes 995-999/1000", content[-5:].hex()],
        [416, "bytes */1000", ""],
    ]


def test_an_upload_that_is_cut_does_not_send_again_what_is_stored(tmp_path):
    files = {"a.safetensors": random_bytes(50_000), "b.safetensors": random_bytes(2_000_000, 1), "config.json": CONFIG}
    written(tmp_path / "folder", files)
    small, large = (hashlib.sha256(files[name]).hexdigest() for name in ("a.safetensors", "b.safetensors"))
    with HubServer() as hub:
        hub.add_repository("owner/model")
        hub.cut(f"uploads/.*/{large}", after_bytes=300_000, times=6)  # as often as the client tries
        hub.cut("/commit/main", after_bytes=100)
        upload = ("upload_folder", {"repo_id": "owner/model", "folder_path": str(tmp_path / "folder")})
        result = run_client(hub, call, calls=[upload] * 3, without_waiting=True)
        first, second, third = result["outcomes"]
        assert first["raised"][0] == "RuntimeError"
        assert "b.safetensors" in first["text"]
        assert second["raised"][0] in ("WriteError", "ReadError", "RemoteProtocolError")
        assert third.endswith(hub.commits("owner/model")[0].oid)
        assert [request.status for request in hub.asked("PUT", small)] == [200]
        assert [request.status for request in hub.asked("PUT", large)] == [None] * 6 + [200]
        assert [len(request.body) < 2_000_000 for request in hub.asked("PUT", large)] == [True] * 6 + [False]
        assert [request.status for request in hub.asked("POST", "/commit/")] == [None, 200]
        assert len(hub.commits("owner/model")) == 2
        found = hub.files("owner/model")
        assert {name: found[name] for name in files} == files


def test_somebody_else_acts_in_between(tmp_path):
    written(tmp_path, {"x": b"mine"})
    upload = ("upload_file", {"repo_id": "owner/model", "path_or_fileobj": "x", "path_in_repo": "x"})
    with HubServer() as hub:
        hub.add_repository("owner/model")
        theirs: list[str] = []
        hub.meanwhile("POST", "/commit/main", lambda: theirs.append(hub.commit("owner/model", {"y": b"theirs"})))
        hub.fail("POST", "/commit/main", status=503)  # refused before anybody could act
        refused, mine = run_client(hub, call, home=tmp_path, calls=[upload] * 2)["outcomes"]
        assert refused["status"] == 503
        assert mine.endswith(hub.commits("owner/model")[0].oid)
        assert [hub.commits("owner/model")[0].parent] == theirs
        assert [repository.repo_id for repository in hub.repositories] == ["owner/model"]


def proposed(guest_token: str) -> dict[str, Any]:
    """A pull request by somebody who may not write, merged by the owner."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    guest, owner, repo = HfApi(token=guest_token), HfApi(), "owner/model"
    operations = [CommitOperationAdd("model.bin", b"proposed"), CommitOperationDelete("config.json")]
    proposal = guest.create_commit(repo, operations, commit_message="Better", commit_description="Much", create_pr=True)
    path = guest.hf_hub_download(repo, "model.bin", revision=proposal.pr_revision)
    before = [path for path in owner.list_repo_files(repo) if path != ".gitattributes"]
    details = owner.get_discussion_details(repo, proposal.pr_num)
    owner.merge_pull_request(repo, proposal.pr_num)
    empty = owner.create_pull_request(repo, title="Nothing yet")
    owner.upload_file(path_or_fileobj=b"1", path_in_repo="1", repo_id=repo, revision=empty.git_reference)
    return {
        "url": proposal.pr_url,
        "oid": proposal.oid,
        "content": open(path, "rb").read().decode(),
        "before": before,
        "details": [details.title, details.author, details.status, details.is_pull_request, details.target_branch],
        "statuses": [[each.num, each.status] for each in owner.get_repo_discussions(repo)],
        "refs": [ref.ref for ref in owner.list_repo_refs(repo, include_pull_requests=True).pull_requests],
    }


def test_pull_requests(tmp_path):
    with HubServer() as hub:
        guest = hub.add_user("guest")
        base = hub.add_repository("owner/model", {"config.json": CONFIG})
        found = run_client(hub, proposed, home=tmp_path, guest_token=guest)
        assert found["url"] == f"{hub.endpoint}/owner/model/discussions/1"
        assert found["content"] == "proposed"
        assert found["before"] == ["config.json"]
        assert found["details"] == ["Better", "guest", "open", True, "refs/heads/main"]
        assert found["statuses"] == [[1, "merged"], [2, "open"]]
        assert found["refs"] == ["refs/pr/1", "refs/pr/2"]
        assert [commit.oid for commit in hub.commits("owner/model", "refs/pr/1")][:2] == [found["oid"], base]
        merged = hub.commits("owner/model")[0]
        assert (merged.title, merged.parent, merged.author) == ("Better (#1)", base, "owner")
        assert hub.files("owner/model").keys() == {".gitattributes", "model.bin"}
        assert hub.files("owner/model", "refs/pr/2")["1"] == b"1"
        assert hub.unanswered == []


def test_what_was_downloaded_is_there_offline(tmp_path):
    repo = {"repo_id": "owner/model"}
    calls = [("snapshot_download", repo), ("hf_hub_download", repo | {"filename": "model.bin"})]
    absent = ("hf_hub_download", repo | {"filename": "absent.json"})
    with HubServer() as hub:
        hub.add_repository("owner/model", {"config.json": CONFIG, "model.bin": b"m" * 99})
        online = run_client(hub, call, home=tmp_path / "home", calls=calls)["outcomes"]
        hub.commit("owner/model", {"config.json": b"{}"})
        asked = len(hub.requests)
        offline = run_client(hub, call, home=tmp_path / "home", offline=True, calls=[*calls, absent])["outcomes"]
        assert len(hub.requests) == asked
        assert offline[:2] == online
        assert read(online[0])["config.json"] == CONFIG
        assert "LocalEntryNotFoundError" in offline[2]["raised"]
    gone = run_client(hub, call, home=tmp_path / "home", calls=calls)["outcomes"]  # online, but there is no server any more
    assert gone == online


def used_by_transformers(stranger: str) -> dict[str, Any]:
    """A configuration loaded from a private repository and pushed to a new one."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained("owner/private")
    old = AutoConfig.from_pretrained("owner/private", revision="old")
    try:
        AutoConfig.from_pretrained("owner/private", token=stranger, cache_dir="elsewhere")
        refused = ""
    except OSError as error:
        refused = str(error)
    loaded.push_to_hub("owner/pushed", private=True, commit_message="Push", tags=["pruning"])
    loaded.push_to_hub("owner/pushed", revision="other")
    again = AutoConfig.from_pretrained("owner/pushed", revision="other")
    return {"sizes": [config.hidden_size for config in (loaded, old, again)], "refused": refused}


def test_transformers_loads_and_pushes():
    with HubServer() as hub:
        old = hub.add_repository("owner/private", {"config.json": CONFIG.replace(b"24", b"12")}, private=True)
        hub.repository("owner/private").refs["refs/tags/old"] = old
        hub.commit("owner/private", {"config.json": CONFIG})
        found = run_client(hub, used_by_transformers, stranger=hub.add_user("stranger"))
        assert found["sizes"] == [24, 12, 24]
        assert "not a valid model identifier" in found["refused"]
        assert hub.repository("owner/pushed").private
        assert [commit.title for commit in hub.commits("owner/pushed")] == ["Push", "initial commit"]
        pushed = hub.files("owner/pushed")
        assert json.loads(pushed["config.json"])["hidden_size"] == 24
        assert b"- pruning" in pushed["README.md"]
        assert hub.unanswered == []
