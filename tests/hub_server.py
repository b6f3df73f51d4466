"""A Hugging Face Hub on this machine, for tests of what is pushed to the Hub and loaded from it by the real client.

`HubServer` is a real HTTP server on loopback that speaks the part of the Hub's API which `huggingface_hub` uses for
repositories, commits, large files and downloads. Clients reach it through `HF_ENDPOINT`, in processes of their own:
`huggingface_hub` reads its environment at import, and `conftest.py` keeps the test process itself offline. See `run_client`.

It is our own because nothing on PyPI is such a server: `olah` (0.5.4) mirrors the real Hub and takes no pushes, and
`hf-local-hub` (3.0.0) is a client for a server that its wheel does not have. As on the Hub, large files live on another
host: the endpoint is 127.0.0.1, and downloads and uploads of LFS objects go to signed addresses on localhost, which refuse
the client's token. What differs from the Hub:

* no Xet: its headers and hashes are absent, so downloads are plain HTTP. Whether uploads use Xet the client decides alone,
  by whether hf_xet is installed; `HF_HUB_DISABLE_XET=1` in `HubServer.environment` makes it use LFS;
* the client tells a missing repository from a bad token by a 401's address only where that starts with https, so every such
  401 carries `X-Error-Code: RepoNotFound`;
* a model card's metadata has to be YAML, but its values are not checked.

A request that the server has no answer for gets 501 and is listed in `HubServer.unanswered`.
"""

import base64
import hashlib
import inspect
import json
import os
import re
import secrets
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

import hub_server_repositories as repositories
from forked import run_python
from hub_server_repositories import Blob, Commit, Discussion, Repository

_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_TYPES = {f"{repo_type}s": repo_type for repo_type in _PREFIXES}
_FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|\Z)", re.DOTALL)
# What an environment may hold that would lead a client elsewhere than to this server.
_STEERING = re.compile("(HF|HUGGING|HUGGINGFACE|TRANSFORMERS)_.*|.*_PROXY|XDG_CACHE_HOME", re.IGNORECASE)


@dataclass
class Request:
    """One request that came in, and what became of it."""

    method: str
    path: str  # unquoted, without the query
    headers: dict[str, str]  # names in lower case
    query: dict[str, list[str]]
    target: str = field(repr=False)  # as sent
    body: bytes = field(default=b"", repr=False)
    status: int | None = None  # None where the connection was cut before an answer
    sent: int = 0  # bytes of the answer's body

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class _Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class _Fault:
    method: str | None
    pattern: re.Pattern[str]
    times: int
    after_bytes: int = 0
    answer: _Answer = field(default_factory=_Answer)

    def concerns(self, request: Request) -> bool:
        return self.times > 0 and self.method in (None, request.method) and bool(self.pattern.search(request.path))


class _Refused(Exception):
    """An answer other than success, with the headers by which the client tells one refusal from another."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.answer = _refusal(status, message, code, headers)


def _refusal(status: int, message: str, code: str | None, headers: Mapping[str, str]) -> _Answer:
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers)
    return _Answer(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json"} | named)


class HubServer:
    """The Hub, for as long as the `with` block lasts.

    `token` belongs to the user `user`, who may write to the repositories of that name; `add_user` adds others. Files above
    `lfs_threshold` bytes or named by .gitattributes go through LFS, in parts where they are larger than `part_size`.
    Listings come in pages of `page_size`.
    """

    def __init__(
        self, user: str = "owner", *, lfs_threshold: int = 10 * 2**20, part_size: int = 5 * 2**30, page_size: int = 1000
    ) -> None:
        self.lfs_threshold, self.part_size, self.page_size = lfs_threshold, part_size, page_size
        self.requests: list[Request] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._users: dict[str, tuple[str, tuple[str, ...]]] = {}  # by token: a name and its organizations
        self._parts: dict[tuple[str, int], bytes] = {}
        self._faults: list[_Fault] = []
        self._meanwhile: list[tuple[str, re.Pattern[str], Callable[[], Any]]] = []
        self._lock = threading.RLock()
        self._secret = secrets.token_hex()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}/storage"
        self.user, self.token = user, self.add_user(user)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # What tests set up and look at.

    def add_user(self, name: str, organizations: tuple[str, ...] = ()) -> str:
        """Add a user; gives the user's token."""
        token = f"hf_{name}_{secrets.token_hex(8)}"
        self._users[token] = (name, organizations)
        return token

    def add_repository(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: str | bool = False,
        repo_type: str = "model",
    ) -> str:
        """Add a repository with the Hub's .gitattributes and `files`; gives the newest commit's hash."""
        repository = Repository(repo_id, repo_type, private, "manual" if gated is True else gated)
        attributes = Blob(repositories.DEFAULT_GITATTRIBUTES)
        with self._lock:
            self._repositories[repo_type, repo_id] = repository
            repository.commit("refs/heads/main", {".gitattributes": attributes}, "initial commit")
            if files:
                self.commit(repo_id, files, repo_type=repo_type)
        return repository.refs["refs/heads/main"]

    def commit(
        self,
        repo_id: str,
        changes: Mapping[str, bytes | None],
        *,
        revision: str = "main",
        title: str = "Upload files",
        repo_type: str = "model",
    ) -> str:
        """Commit to a repository without any client, as somebody else would; gives the commit's hash."""
        with self._lock:
            repository = self.repository(repo_id, repo_type)
            blobs = {path: None if content is None else Blob(content) for path, content in changes.items()}
            attributes = blobs.get(".gitattributes") or self._file(repository, revision, ".gitattributes")
            for path, blob in blobs.items():
                size = len(blob.content) if blob else 0
                if blob and repositories.goes_through_lfs(path, size, attributes.content, self.lfs_threshold):
                    blobs[path] = Blob(blob.content, lfs=True)
                    repository.objects[blob.sha256] = blob.content
            return self._commit(repository, revision, blobs, title).oid

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository itself: `refs`, `discussions`, `objects`, whether it is `private` ..."""
        return self._repositories[repo_type, repo_id]

    @property
    def repositories(self) -> list[Repository]:
        """All repositories."""
        return list(self._repositories.values())

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The content of all files at a branch, tag, hash or `refs/pr/N`."""
        return {path: blob.content for path, blob in self._found(repo_id, revision, repo_type).files.items()}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The commits up to `revision`, the newest first."""
        return self.repository(repo_id, repo_type).log(self._found(repo_id, revision, repo_type).oid)

    def grant(self, repo_id: str, user: str, *, repo_type: str = "model") -> None:
        """Let a user download from a gated repository."""
        self.repository(repo_id, repo_type).granted.add(user)

    def asked(self, method: str | None = None, pattern: str = "") -> list[Request]:
        """The requests so far of this method whose path has a match of the pattern."""
        return [r for r in list(self.requests) if method in (None, r.method) and re.search(pattern, r.path)]

    @property
    def unanswered(self) -> list[Request]:
        """Requests for something that the Hub may have, but this server has not."""
        return [request for request in list(self.requests) if request.status == HTTPStatus.NOT_IMPLEMENTED]

    def fail(
        self,
        method: str | None,
        path_pattern: str,
        *,
        status: int,
        times: int = 1,
        gated: bool = False,
        code: str | None = None,
        retry_after: int | None = None,
        message: str | None = None,
    ) -> None:
        """Refuse the next `times` requests of this method whose path has a match of the pattern.

        401 and 404 say that the repository was not found, unless it is said to be `gated` or `code` says something else,
        such as EntryNotFound.
        """
        code = code or ("GatedRepo" if gated else "RepoNotFound" if status in (401, 404) else None)
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        answer = _refusal(status, message or HTTPStatus(status).phrase, code, headers)
        self._faults.append(_Fault(method, re.compile(path_pattern), times, answer=answer))

    def cut(self, path_pattern: str, *, after_bytes: int, times: int = 1, method: str | None = None) -> None:
        """Cut the connection for the next `times` matching requests once `after_bytes` bytes of the body went over it.

        That is the answer's body for GET and else the request's. Shorter bodies pass, and do not count.
        """
        self._faults.append(_Fault(method, re.compile(path_pattern), times, after_bytes, _Answer(0)))

    def meanwhile(self, method: str, path_pattern: str, action: Callable[[], Any]) -> None:
        """Let somebody else act just before the next request of this method whose path has a match of the pattern is answered.

        Requests that are refused or cut off do not count.
        """
        self._meanwhile.append((method, re.compile(path_pattern), action))

    def environment(self, home: Path | str, *, token: str | bool | None = True, offline: bool = False) -> dict[str, str]:
        """The environment of a process whose Hub is this server and whose cache and settings are in `home`.

        It has the token given, the server's own for `True`, and none for `False`.
        """
        environment = {name: value for name, value in os.environ.items() if not _STEERING.fullmatch(name)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a Space to convert what it loads
            "NO_PROXY": "*",
        }
        if token:
            environment["HF_TOKEN"] = self.token if token is True else token
        return environment

    # What requests are answered with.

    def _take_fault(self, request: Request, kind: Callable[[_Fault], bool]) -> _Fault | None:
        with self._lock:
            fault = next((fault for fault in self._faults if kind(fault) and fault.concerns(request)), None)
            if fault:
                fault.times -= 1
            return fault

    def _answer(self, request: Request) -> _Answer:
        if fault := self._take_fault(request, lambda fault: fault.answer.status > 0):
            return fault.answer
        try:
            with self._lock:
                for awaited in list(self._meanwhile):
                    method, pattern, action = awaited
                    if method == request.method and pattern.search(request.path):
                        self._meanwhile.remove(awaited)
                        action()
                return self._route(request)
        except _Refused as refused:
            return refused.answer
        except Exception:
            traceback.print_exc()  # nothing that the Hub is asked may be an error here: an unforeseen request, or our mistake
            return _unanswered(request).answer

    def _route(self, request: Request) -> _Answer:
        parts = [unquote(part) for part in urlsplit(request.target).path.strip("/").split("/")]
        if parts[0] == "storage":
            return self._in_storage(request, parts[1:])
        if parts[0] != "api":
            repo_type = _TYPES.get(parts[0], "model")
            return self._outside_api(request, repo_type, parts[1:] if parts[0] in _TYPES else parts)
        match request.method, parts[1:]:
            case "GET", ["whoami-v2"]:
                return self._whoami(request)
            case "POST", ["validate-yaml"]:
                return self._validate_card(request.json["content"])
            case "POST", ["repos", "create"]:
                return self._create(request)
            case "DELETE", ["repos", "delete"]:
                repository = self._repository(request, *self._named(request), write=True)
                del self._repositories[repository.repo_type, repository.repo_id]
                return _json({})
            case "POST", ["complete_multipart", sha256]:
                return self._complete_multipart(request, sha256)
            case method, [kind, *rest] if kind in _TYPES:
                verbs = [index for index in (1, 2) if f"_on_{_spelled(method, rest[index:])}" in dir(type(self))]
                if verbs:
                    answer: Callable[..., _Answer] = getattr(self, f"_on_{_spelled(method, rest[verbs[-1] :])}")
                    return answer(request, _TYPES[kind], "/".join(rest[: verbs[-1]]), *rest[verbs[-1] + 1 :])
                if method == "GET" and len(rest) <= 2:
                    return self._on_get_revision(request, _TYPES[kind], "/".join(rest), "main")
        raise _unanswered(request)

    def _outside_api(self, request: Request, repo_type: str, parts: list[str]) -> _Answer:
        """Files as they are downloaded, and Git LFS."""
        path = "/".join(parts)
        if found := re.fullmatch(r"(.+)\.git/info/lfs/objects/(batch|verify)", path):
            answer = self._lfs_batch if found[2] == "batch" else self._lfs_verify
            return answer(request, repo_type, found[1])
        for index in (1, 2):
            if parts[index : index + 1] == ["resolve"] and len(parts) > index + 2 and request.method in ("GET", "HEAD"):
                revision, *names = parts[index + 1 :]
                if revision == "refs" and len(names) > 2:  # a reference whose slashes are not quoted
                    revision, names = "/".join([revision, *names[:2]]), names[2:]
                return self._resolve(request, repo_type, "/".join(parts[:index]), revision, "/".join(names))
        raise _unanswered(request)

    # Who asks, and for which repository.

    def _who(self, request: Request) -> str | None:
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user[0]

    def _belongs(self, user: str | None, namespace: str) -> bool:
        return any(namespace in (name, *organizations) for name, organizations in self._users.values() if name == user)

    def _repository(
        self, request: Request, repo_type: str, repo_id: str, *, write: bool = False, signed_in: bool = False
    ) -> Repository:
        """The repository, if whoever asks may see it, and may write to it where that is asked."""
        user = self._who(request)
        repository = self._repositories.get((repo_type, repo_id))
        if repository is None or (repository.private and not self._belongs(user, repository.namespace)):
            if user is None:
                raise _Refused(401, "Invalid username or password.", "RepoNotFound")
            raise _Refused(404, "Repository not found", "RepoNotFound")
        if user is None and (write or signed_in):
            raise _Refused(401, "Invalid username or password.", "RepoNotFound")
        if write and not self._belongs(user, repository.namespace):
            raise _Refused(403, f"Forbidden: you don't have write access to {repo_id}")
        return repository

    def _open_gate(self, request: Request, repository: Repository) -> None:
        user = self._who(request)
        if not repository.gated or user in repository.granted or self._belongs(user, repository.namespace):
            return
        restricted = f"Access to {repository.repo_type} {repository.repo_id} is restricted"
        if user is None:
            raise _Refused(401, f"{restricted}. You must have access to it and be authenticated to access it.", "GatedRepo")
        raise _Refused(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")

    def _at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _found(self, repo_id: str, revision: str, repo_type: str) -> Commit:
        commit = self.repository(repo_id, repo_type).find(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return commit

    def _file(self, repository: Repository, revision: str, path: str) -> Blob:
        commit = repository.find(revision)
        return (commit.files.get(path) if commit else None) or Blob(b"")

    def _url(self, repository: Repository) -> str:
        return f"{self.endpoint}/{_PREFIXES[repository.repo_type]}{repository.repo_id}"

    # The account and its repositories.

    def _whoami(self, request: Request) -> _Answer:
        user = self._who(request)
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        organizations = next(organizations for name, organizations in self._users.values() if name == user)
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": token})

    def _named(self, request: Request) -> tuple[str, str]:
        asked = request.json
        return asked.get("type") or "model", f"{asked.get('organization') or self._who(request)}/{asked['name']}"

    def _create(self, request: Request) -> _Answer:
        if self._who(request) is None:
            raise _Refused(401, "Invalid username or password.")
        repo_type, repo_id = self._named(request)
        namespace = repo_id.rpartition("/")[0]
        if not self._belongs(self._who(request), namespace):
            text = f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
            raise _Refused(403, text)
        exists = (repo_type, repo_id) in self._repositories
        if not exists:
            private = request.json.get("visibility") == "private" or bool(request.json.get("private"))
            self.add_repository(repo_id, private=private, repo_type=repo_type)
        answer = {"url": self._url(self.repository(repo_id, repo_type)), "name": repo_id, "id": repo_id}
        if exists:
            answer["error"] = f"You already created this {repo_type} repo"
        return _json(answer, status=409 if exists else 200)

    def _validate_card(self, content: str) -> _Answer:
        found = _FRONT_MATTER.match(content)
        if not found:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            metadata = yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        if not isinstance(metadata, dict):
            return _json({"errors": [{"message": "metadata must be an object"}], "warnings": []}, status=400)
        return _json({"errors": [], "warnings": []})

    def _on_put_settings(self, request: Request, repo_type: str, repo_id: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=True)
        asked = request.json
        if "visibility" in asked or "private" in asked:
            repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository.gated = asked.get("gated", repository.gated)
        return _json({"private": repository.private, "gated": repository.gated})

    def _on_get_auth_check(self, request: Request, repo_type: str, repo_id: str, write: str = "") -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=bool(write))
        self._open_gate(request, repository)
        return _json({})

    # What is in a repository.

    def _on_get_revision(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        commit = self._at(repository, revision)
        siblings: list[dict[str, Any]] = []
        for path, blob in commit.files.items():
            siblings.append({"rfilename": path})
            if request.asks("blobs"):
                siblings[-1] |= {"size": len(blob.content), "blobId": blob.oid}
                if blob.lfs:
                    lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                    siblings[-1]["lfs"] = lfs
        card = self._card(commit)
        info = {
            "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repository.namespace,
            "sha": commit.oid,
            "createdAt": _date(repository.log("main")[-1]),
            "lastModified": _date(commit),
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*(card.get("tags") or []), *filter(None, [card.get("library_name")])],
            "siblings": siblings,
            "usedStorage": sum(map(len, repository.objects.values())),
        }
        info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        info |= {"cardData": card} if card else {}
        expand = request.query.get("expand") or request.query.get("expand[]")
        if expand:
            info = {name: value for name, value in info.items() if name in ("_id", "id", *expand)}
        return _json(info)

    def _card(self, commit: Commit) -> dict[str, Any]:
        readme = commit.files.get("README.md")
        found = _FRONT_MATTER.match(readme.content.decode()) if readme else None
        with suppress(yaml.YAMLError):
            metadata = yaml.safe_load(found[1]) if found else None
            return json.loads(json.dumps(metadata, default=str)) if isinstance(metadata, dict) else {}
        return {}

    def _on_get_tree(self, request: Request, repo_type: str, repo_id: str, revision: str, *folder: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        commit = self._at(repository, revision)
        prefix = "".join(f"{name}/" for name in folder)
        if prefix and not any(path.startswith(prefix) for path in commit.files):
            raise _Refused(404, f'{prefix[:-1]} does not exist on "{revision}"', "EntryNotFound")
        entries = [
            entry for entry in self._entries(repository, commit, request.asks("expand")) if entry["path"] + "/" != prefix
        ]
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if not request.asks("recursive"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return self._page(request, entries)

    def _on_post_paths_info(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        commit = self._at(repository, revision)
        if "json" in request.headers.get("content-type", ""):
            paths, expand = request.json["paths"], bool(request.json.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        wanted = {path.rstrip("/") for path in paths}
        return _json([entry for entry in self._entries(repository, commit, expand) if entry["path"] in wanted])

    def _entries(self, repository: Repository, commit: Commit, expand: bool) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for path, oid in repositories.tree_hashes(commit.files).items():
            if path:
                entries.append({"type": "directory", "oid": oid, "size": 0, "path": path})
        for path, blob in commit.files.items():
            entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            if expand:
                log = repository.log(commit.oid)
                last = next(c for c in reversed(log) if c.files.get(path) == blob)
                entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": _date(last)}
            entries.append(entry)
        return sorted(entries, key=lambda entry: entry["path"])

    def _on_get_commits(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        log = repository.log(self._at(repository, revision).oid)
        items = [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": _date(c)}
            for c in log
        ]
        return self._page(request, items)

    def _page(self, request: Request, items: list[Any]) -> _Answer:
        """One page of a listing, with the address of the next as the Hub gives it."""
        start = int(request.query.get("cursor", ["0"])[0])
        answer = _json(items[start : start + self.page_size])
        if start + self.page_size < len(items):
            query = request.query | {"cursor": [str(start + self.page_size)]}
            address = f"{self.endpoint}{urlsplit(request.target).path}?{urlencode(query, doseq=True)}"
            answer.headers["Link"] = f'<{address}>; rel="next"'
        return answer

    def _resolve(self, request: Request, repo_type: str, repo_id: str, revision: str, path: str) -> _Answer:
        """A file: itself where git has it, or where to get it from storage."""
        repository = self._repository(request, repo_type, repo_id)
        self._open_gate(request, repository)
        commit = self._at(repository, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise _Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        name = quote(path.rpartition("/")[2])
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
        if not blob.lfs:
            return _ranged(request, blob.content, headers)
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
        headers["Location"] = self._signed(f"objects/{repository.repo_type}/{repo_id}/{blob.sha256}")
        return _Answer(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)

    # References.

    def _on_get_refs(self, request: Request, repo_type: str, repo_id: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        kinds |= {"pullRequests": "refs/pr/"} if request.asks("include_prs") else {}
        refs: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds}
        for kind, prefix in kinds.items():
            for ref, oid in repository.refs.items():
                if ref.startswith(prefix):
                    refs[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return _json(refs)

    def _on_post_branch(self, request: Request, repo_type: str, repo_id: str, branch: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=True)
        return self._new_ref(repository, f"refs/heads/{branch}", request.json.get("startingPoint") or "main")

    def _on_post_tag(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=True)
        return self._new_ref(repository, f"refs/tags/{request.json['tag']}", revision)

    def _new_ref(self, repository: Repository, ref: str, revision: str) -> _Answer:
        start = self._at(repository, revision)
        if ref in repository.refs:
            raise _Refused(409, f"Reference already exists: {ref}")
        repository.refs[ref] = start.oid
        return _json({"ref": ref})

    def _on_delete_branch(self, request: Request, repo_type: str, repo_id: str, branch: str) -> _Answer:
        return self._delete_ref(request, repo_type, repo_id, f"refs/heads/{branch}")

    def _on_delete_tag(self, request: Request, repo_type: str, repo_id: str, tag: str) -> _Answer:
        return self._delete_ref(request, repo_type, repo_id, f"refs/tags/{tag}")

    def _delete_ref(self, request: Request, repo_type: str, repo_id: str, ref: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=True)
        if ref == "refs/heads/main":
            raise _Refused(403, "Cannot delete the main branch")
        if repository.refs.pop(ref, None) is None:
            raise _Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return _json({})

    # Uploads.

    def _on_post_preupload(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        """How each file is to be uploaded, and whether it is there already."""
        creates = request.asks("create_pr")
        repository = self._repository(request, repo_type, repo_id, write=not creates, signed_in=True)
        commit = self._at(repository, revision)
        attributes = self._file(repository, revision, ".gitattributes").content
        gitignore = request.json.get("gitIgnore", self._file(repository, revision, ".gitignore").content.decode())
        answers = []
        for file in request.json["files"]:
            path, present = file["path"], commit.files.get(file["path"])
            lfs = repositories.goes_through_lfs(path, file["size"], attributes, self.lfs_threshold)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = repositories.ignored(path, gitignore)
            if present:
                answer["oid"] = present.sha256 if present.lfs else present.oid
            answers.append(answer)
        return _json({"files": answers, "commitOid": commit.oid})

    def _lfs_batch(self, request: Request, repo_type: str, repo_id: str) -> _Answer:
        asked = request.json
        repository = self._repository(request, repo_type, repo_id, write="ref" in asked, signed_in=True)
        if asked["operation"] != "upload":
            raise _unanswered(request)
        objects = []
        multipart = "multipart" in asked.get("transfers", [])
        for wanted in asked["objects"]:
            sha256, size = wanted["oid"], wanted["size"]
            objects.append({"oid": sha256, "size": size})
            if sha256 in repository.objects:
                continue  # no actions: there already
            place = f"uploads/{repo_type}/{repo_id}/{sha256}"
            upload: dict[str, Any] = {"href": self._signed(place)}
            if multipart and size > self.part_size:
                numbers = range(1, -(-size // self.part_size) + 1)
                upload["header"] = {"chunk_size": str(self.part_size)}
                upload["header"] |= {f"{number:05}": self._signed(f"{place}/{number}") for number in numbers}
                query = urlencode({"repo": f"{repo_type}/{repo_id}", "signature": self._signature(sha256)})
                upload["href"] = f"{self.endpoint}/api/complete_multipart/{sha256}?{query}"
            verify = {"href": f"{self._url(repository)}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        chosen = "multipart" if multipart else "basic"
        answer = _json({"transfer": chosen, "objects": objects})
        answer.headers["Content-Type"] = "application/vnd.git-lfs+json"
        return answer

    def _lfs_verify(self, request: Request, repo_type: str, repo_id: str) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, signed_in=True)
        stored = repository.objects.get(request.json["oid"])
        if stored is None or len(stored) != request.json["size"]:
            raise _Refused(404, "The object was not uploaded, or not all of it")
        return _json({})

    def _on_post_commit(self, request: Request, repo_type: str, repo_id: str, revision: str) -> _Answer:
        creates = request.asks("create_pr")
        repository = self._repository(request, repo_type, repo_id, write=not creates, signed_in=True)
        before = self._at(repository, revision)
        header: dict[str, Any] = {}
        changes: dict[str, Blob | None] = {}
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    header = value
                case "file":
                    content = base64.b64decode(value["content"])
                    if len(content) > self.lfs_threshold:
                        raise _Refused(400, f"{value['path']} is too large for git: please use Git LFS")
                    changes[value["path"]] = Blob(content)
                case "lfsFile":
                    if value["oid"] not in repository.objects:
                        raise _Refused(400, f"The LFS object of {value['path']} was not uploaded: {value['oid']}")
                    changes[value["path"]] = Blob(repository.objects[value["oid"]], lfs=True)
                case "deletedFile" | "deletedFolder":
                    changes[value["path"]] = None
                case other:
                    raise _Refused(400, f"Unknown operation: {other}")
        if not before.oid.startswith(header.get("parentCommit") or ""):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        title, message, author = header["summary"], header.get("description") or "", self._who(request) or ""
        number = len(repository.discussions) + 1
        ref = f"refs/pr/{number}" if creates else revision
        commit = self._commit(repository, ref, changes, title, message, author, base=before.oid if creates else "")
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self._url(repository)}/commit/{commit.oid}"}
        if creates:
            repository.open_discussion(title, message, author, base=before.oid)
            repository.refs[ref] = commit.oid
            answer["pullRequestUrl"] = f"{self._url(repository)}/discussions/{number}"
        return _json(answer)

    def _commit(
        self,
        repository: Repository,
        revision: str,
        changes: Mapping[str, Blob | None],
        title: str,
        message: str = "",
        author: str = "",
        base: str = "",
    ) -> Commit:
        """Commit, with .gitattributes naming every LFS file."""
        ref = revision if base else repository.ref_of(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise _Refused(400, f"{revision} is no branch to commit to")
        attributes = changes.get(".gitattributes") or self._file(repository, base or ref, ".gitattributes")
        large = [path for path, blob in changes.items() if blob and blob.lfs]
        tracked = repositories.track_by_lfs(large, attributes.content)
        if tracked != attributes.content:
            changes = {**changes, ".gitattributes": Blob(tracked)}
        try:
            return repository.commit(ref, changes, title, message, author, base)
        except repositories.MissingPath as missing:
            raise _Refused(404, f"A file with this name doesn't exist: {missing}", "EntryNotFound") from None

    # Storage, on its own host: addresses that are valid because they are signed.

    def _signature(self, path: str) -> str:
        return hashlib.sha256(f"{self._secret}/{path}".encode()).hexdigest()

    def _signed(self, path: str) -> str:
        return f"{self.storage}/{path}?signature={self._signature(path)}"

    def _check_signature(self, request: Request, path: str) -> None:
        if "authorization" in request.headers:
            raise _Refused(400, "Only one auth mechanism allowed")  # what S3 says
        if request.query.get("signature") != [self._signature(path)]:
            raise _Refused(403, "SignatureDoesNotMatch")

    def _in_storage(self, request: Request, parts: list[str]) -> _Answer:
        self._check_signature(request, "/".join(parts))
        match request.method, parts:
            case "GET" | "HEAD", ["objects", repo_type, namespace, name, sha256]:
                content = self.repository(f"{namespace}/{name}", repo_type).objects[sha256]
                return _ranged(request, content, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})
            case "PUT", ["uploads", repo_type, namespace, name, sha256]:
                self._store(repo_type, f"{namespace}/{name}", sha256, request.body)
            case "PUT", ["uploads", _, _, _, sha256, number]:
                self._parts[sha256, int(number)] = request.body
            case _:
                raise _unanswered(request)
        return _Answer(200, headers={"ETag": _md5(request.body)})

    def _store(self, repo_type: str, repo_id: str, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _Refused(400, "The content is not what its SHA-256 says")
        self.repository(repo_id, repo_type).objects[sha256] = content

    def _complete_multipart(self, request: Request, sha256: str) -> _Answer:
        self._check_signature(request, sha256)
        repo_type, _, repo_id = request.query["repo"][0].partition("/")
        parts = [(part["partNumber"], part["etag"]) for part in request.json["parts"]]
        stored = {number: content for (oid, number), content in self._parts.items() if oid == sha256}
        if request.json["oid"] != sha256 or parts != [(number, _md5(stored[number])) for number in sorted(stored)]:
            raise _Refused(400, "InvalidPart")
        self._store(repo_type, repo_id, sha256, b"".join(stored[number] for number in sorted(stored)))
        for number in stored:
            del self._parts[sha256, number]
        return _json({})

    # Discussions and pull requests.

    def _on_get_discussions(self, request: Request, repo_type: str, repo_id: str, number: str = "") -> _Answer:
        repository = self._repository(request, repo_type, repo_id)
        if not number:
            listed = [self._described(repository, discussion) for discussion in repository.discussions]
            return _json({"discussions": listed, "count": len(listed), "start": 0})
        discussion = self._discussion(repository, number)
        created, author = discussion.created.isoformat().replace("+00:00", ".000Z"), {"name": discussion.author}
        comment = {"edited": False, "hidden": False, "latest": {"raw": discussion.description}}
        event = {"id": f"{number:>024}", "type": "comment", "createdAt": created, "author": author, "data": comment}
        answer = self._described(repository, discussion) | {"events": [event]}
        if discussion.base:
            changes = {"base": "refs/heads/main", "mergeCommitId": discussion.merge_commit}
            answer |= {"changes": changes, "filesWithConflicts": [], "diff": ""}
        return _json(answer)

    def _on_post_discussions(
        self, request: Request, repo_type: str, repo_id: str, number: str = "", action: str = ""
    ) -> _Answer:
        repository = self._repository(request, repo_type, repo_id, write=bool(action), signed_in=True)
        user = self._who(request) or ""
        if action == "merge":
            repository.merge(self._discussion(repository, number), user)
            return _json({})
        if number:
            raise _unanswered(request)
        asked = request.json
        base = self._at(repository, "main").oid if asked.get("pullRequest") else None
        opened = repository.open_discussion(asked["title"], asked["description"], user, base)
        return _json({"num": opened.num, "url": f"{self._url(repository)}/discussions/{opened.num}"})

    def _discussion(self, repository: Repository, number: str) -> Discussion:
        found = [discussion for discussion in repository.discussions if str(discussion.num) == number]
        if not found:
            raise _Refused(404, "Discussion not found")
        return found[0]

    def _described(self, repository: Repository, discussion: Discussion) -> dict[str, Any]:
        return {
            "num": discussion.num,
            "title": discussion.title,
            "author": {"name": discussion.author},
            "createdAt": discussion.created.isoformat().replace("+00:00", ".000Z"),
            "status": discussion.status,
            "isPullRequest": discussion.base is not None,
            "repo": {"name": repository.repo_id, "type": repository.repo_type},
        }


def _json(content: Any, status: int = 200) -> _Answer:
    return _Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8"})


def _unanswered(request: Request) -> _Refused:
    return _Refused(HTTPStatus.NOT_IMPLEMENTED, f"This server has no answer to {request.method} {request.path}")


def _date(commit: Commit) -> str:
    return commit.date.isoformat().replace("+00:00", ".000Z")


def _md5(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _spelled(method: str, parts: list[str]) -> str:
    return f"{method}_{parts[0].replace('-', '_')}".lower() if parts else ""


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> _Answer:
    """The content, or the part of it that a Range header asks for."""
    size = len(content)
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not found or not any(found.groups()):
        return _Answer(200, content, headers)
    first = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
    if first > last:
        return _Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return _Answer(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away at any time
            super().handle_error(request, client_address)


class _Cut(Exception):
    """The connection is to be closed now."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def _serve(self) -> None:
        address = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(address.path), headers, parse_qs(address.query), self.path)
        self.server.hub.requests.append(request)
        try:
            if "transfer-encoding" in headers:  # storage takes no body whose length is not known, and the client sends none
                self.close_connection = True
                return self._send(request, _unanswered(request).answer)
            self._read_body(request)
            self._send(request, self.server.hub._answer(request))
        except _Cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _read_body(self, request: Request) -> None:
        """Read the body, or as much of it as comes before the connection is cut."""
        size = int(request.headers.get("content-length", 0))
        cut = self.server.hub._take_fault(request, lambda fault: not fault.answer.status and size > fault.after_bytes)
        request.body = self.rfile.read(cut.after_bytes if cut else size)
        if len(request.body) < size:
            raise _Cut  # by us or by the client

    def _send(self, request: Request, answer: _Answer) -> None:
        body = b"" if request.method == "HEAD" else answer.body
        cut = None
        if request.method == "GET":
            cut = self.server.hub._take_fault(request, lambda f: not f.answer.status and len(body) > f.after_bytes)
        request.status = answer.status
        request.sent = cut.after_bytes if cut else len(body)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(memoryview(body)[: request.sent])
        if cut:
            raise _Cut

    def log_message(self, format: str, *args: Any) -> None:
        pass


_PROGRAM = """
from __future__ import annotations
import json, sys

{source}

print(json.dumps({name}(**json.loads(sys.argv[1])), default=str))
"""


def run_client(
    hub: HubServer,
    client: Callable[..., Any] | str,
    *,
    home: Path | None = None,
    token: str | bool | None = True,
    offline: bool = False,
    **arguments: Any,
) -> Any:
    """What `client(**arguments)` returns in a process of its own whose Hub is `hub`.

    `home`, `token` and `offline` are those of `HubServer.environment`; without a home the client gets a new, empty one.
    Only the function's source goes there, so it must import what it uses; a client given as source is the body of such a
    function. Arguments and result travel as JSON.
    """
    if home is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_client(hub, client, home=Path(folder), token=token, offline=offline, **arguments)
    if isinstance(client, str):
        name = "client"
        source = f"def client({', '.join(arguments)}):\n{textwrap.indent(textwrap.dedent(client), '    ')}"
    else:
        name, source = client.__name__, textwrap.dedent(inspect.getsource(client))
    home.mkdir(parents=True, exist_ok=True)
    program = ["-c", _PROGRAM.format(source=source, name=name), json.dumps(arguments, default=str)]
    finished = run_python(program, home, hub.environment(home, token=token, offline=offline))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])
