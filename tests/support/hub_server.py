"""A Hugging Face Hub on this machine, for tests of what is pushed to the Hub and loaded from it by the real client.

`HubServer` is a real HTTP server on loopback that speaks the part of the Hub's API which our pushes, transformers' own and
downloads use; nothing on PyPI is such a server. Clients reach it through `HF_ENDPOINT`, in processes of their own:
`huggingface_hub` reads its environment at import, and `conftest.py` keeps the test process itself offline. See `run_client`.

As on the Hub, large files live on another host: the endpoint is 127.0.0.1, and downloads and uploads of LFS objects go to
signed addresses on localhost, which refuse the client's token. What differs from the Hub:

* no Xet, which `HubServer.environment` switches off in the client: large files go by plain HTTP, in one part;
* listings come in one page, and downloads begin from the start;
* what goes through LFS is said by a file's suffix and size, not by the repository's .gitattributes;
* every 401 for a missing repository carries `X-Error-Code: RepoNotFound`, as the client knows it by its address only where
  that starts with https.

A request that the server has no answer for gets 501 and is listed in `HubServer.unanswered`.
"""

import base64
import fnmatch
import inspect
import json
import os
import re
import secrets
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from forked import run_python
from hub_server_repositories import GITATTRIBUTES, Commit, Repository, goes_through_lfs, oid_of, pointer_to, sha256_of

_FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|\Z)", re.DOTALL)
# What an environment may hold that would lead a client elsewhere than to this server.
_STEERING = re.compile("(HF|HUGGING|HUGGINGFACE|TRANSFORMERS)_.*|.*_PROXY|XDG_CACHE_HOME", re.IGNORECASE)
_IN_API = "/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)"
_OUTSIDE_API = "/((?:datasets/)?[^/]+/[^/]+)"
# Methods, addresses as they are sent, and what answers them; groups are unquoted and handed over.
_ROUTES = (
    ("POST", "/api/validate-yaml", "_validate_card"),
    ("POST", "/api/repos/create", "_create"),
    ("GET", f"{_IN_API}(?:/revision/([^/]+))?", "_info"),
    ("GET", f"{_IN_API}/tree/([^/]+)(?:/(.+))?", "_tree"),
    ("POST", f"{_IN_API}/paths-info/([^/]+)", "_paths_info"),
    ("GET", f"{_IN_API}/refs", "_refs"),
    ("POST", f"{_IN_API}/branch/([^/]+)", "_new_branch"),
    ("POST", f"{_IN_API}/preupload/([^/]+)", "_preupload"),
    ("POST", f"{_IN_API}/commit/([^/]+)", "_commit_of_client"),
    ("POST", rf"{_OUTSIDE_API}\.git/info/lfs/objects/batch", "_lfs_batch"),
    ("GET|HEAD", f"{_OUTSIDE_API}/resolve/([^/]+)/(.+)", "_resolve"),
    ("GET", "/storage/(objects)/(.+)/([^/]+)", "_storage"),
    ("PUT", "/storage/(uploads)/(.+)/([^/]+)", "_storage"),
)


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
class _Event:
    """What happens to the next `times` matching requests before they are answered, or while bytes are on their way."""

    method: str | None
    pattern: re.Pattern[str]
    times: int = 1
    action: Callable[[], Any] | None = None
    cut_after: int = 0  # bytes, where there is no action

    def concerns(self, request: Request) -> bool:
        return self.times > 0 and self.method in (None, request.method) and bool(self.pattern.search(request.path))


class _Refused(Exception):
    """An answer other than success, with the headers by which the client tells one refusal from another."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers
        self.answer = _json({"error": message}, status, **named)


class HubServer:
    """The Hub, for as long as the `with` block lasts.

    `token` belongs to the user `user`, who may write to the repositories of that name; `add_user` adds others.
    """

    def __init__(self, user: str = "owner") -> None:
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}
        self._users: dict[str, str] = {}  # by token
        self._events: list[_Event] = []
        self._lock = threading.RLock()
        self._secret = secrets.token_hex()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self._storage_address = f"http://localhost:{port}/storage"
        self.token = self.add_user(user)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # What tests set up and look at.

    def add_user(self, name: str) -> str:
        """Add a user; gives the user's token."""
        token = f"hf_{name}_{secrets.token_hex(8)}"
        self._users[token] = name
        return token

    def add_repository(self, repo_id: str, files: Mapping[str, bytes] | None = None, **access: bool) -> str:
        """Add a repository with a .gitattributes, as the Hub makes it, and `files`; gives the newest commit's hash.

        `repo_id` is `owner/name` or `datasets/owner/name`. `access` says whether it is `private` or `gated`; else everybody may
        see it.
        """
        repository = Repository(repo_id, **access)
        with self._lock:
            self._repositories[repo_id] = repository
            repository.commit("refs/heads/main", {".gitattributes": GITATTRIBUTES}, "initial commit")
            if files:
                self.commit(repo_id, files)
        return repository.refs["refs/heads/main"]

    def commit(self, repo_id: str, changes: Mapping[str, bytes | None], *, revision: str = "main") -> str:
        """Commit to a repository without any client, as somebody else would; gives the commit's hash."""
        with self._lock:
            repository = self.repository(repo_id)
            return repository.commit(repository.ref_of(revision) or revision, changes, "Upload files").oid

    def repository(self, repo_id: str) -> Repository:
        """The repository itself: `refs`, `pull_requests`, `objects`, whether it is `private` ..."""
        return self._repositories[repo_id]

    @property
    def repositories(self) -> list[Repository]:
        """All repositories."""
        return list(self._repositories.values())

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of all files at a branch, tag, hash or `refs/pr/N`."""
        return dict(self.commits(repo_id, revision)[0].files)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to `revision`, the newest first."""
        return self.repository(repo_id).log(revision)

    def asked(self, method: str | None = None, pattern: str = "") -> list[Request]:
        """The requests so far of this method whose path has a match of the pattern."""
        return [r for r in list(self.requests) if method in (None, r.method) and re.search(pattern, r.path)]

    @property
    def unanswered(self) -> list[Request]:
        """Requests for something that the Hub may have, but this server has not."""
        return [request for request in list(self.requests) if request.status == HTTPStatus.NOT_IMPLEMENTED]

    def fail(
        self, method: str | None, path_pattern: str, *, status: int, times: int = 1, retry_after: int | None = None
    ) -> None:
        """Refuse the next `times` requests of this method whose path has a match of the pattern."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

        def refuse() -> None:
            raise _Refused(status, HTTPStatus(status).phrase, **headers)

        self._events.append(_Event(method, re.compile(path_pattern), times, refuse))

    def cut(self, path_pattern: str, *, after_bytes: int, times: int = 1) -> None:
        """Cut the connection for the next `times` matching requests once `after_bytes` bytes of the body went over it.

        That is the answer's body for GET and else the request's. Shorter bodies pass, and do not count.
        """
        self._events.append(_Event(None, re.compile(path_pattern), times, cut_after=after_bytes))

    def meanwhile(self, method: str, path_pattern: str, action: Callable[[], Any]) -> None:
        """Let somebody else act before the next request of this method whose path has a match of the pattern is answered."""
        self._events.append(_Event(method, re.compile(path_pattern), action=action))

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

    def _take(self, request: Request, kind: Callable[[_Event], bool]) -> _Event | None:
        with self._lock:
            event = next((event for event in self._events if kind(event) and event.concerns(request)), None)
            if event:
                event.times -= 1
            return event

    def _cut_after(self, request: Request, size: int) -> int:
        """After how many of `size` bytes the connection is cut: after all of them, if it is not."""
        event = self._take(request, lambda event: event.action is None and size > event.cut_after)
        return event.cut_after if event else size

    def _answer(self, request: Request) -> _Answer:
        try:
            with self._lock:
                if (event := self._take(request, lambda event: event.action is not None)) and event.action:
                    event.action()
                return self._route(request)
        except _Refused as refused:
            return refused.answer
        except Exception:
            traceback.print_exc()  # nothing that the Hub is asked may be an error here: an unforeseen request, or our mistake
            return _unanswered(request).answer

    def _route(self, request: Request) -> _Answer:
        for methods, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, urlsplit(request.target).path)
            if found and request.method in methods.split("|"):
                answer: Callable[..., _Answer] = getattr(self, name)
                return answer(request, *(group and unquote(group) for group in found.groups()))
        raise _unanswered(request)

    # Who asks, and for which repository.

    def _who(self, request: Request) -> str | None:
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, request: Request, repo_id: str) -> Repository:
        """The repository, if whoever asks may see it."""
        user = self._who(request)
        repository = self._repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.namespace):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, request: Request, repo_id: str, write: bool = True) -> Repository:
        """The repository, if whoever asks may write to it; everybody who may see it may open a pull request."""
        repository, user = self._repository(request, repo_id), self._who(request)
        if write and not request.asks("create_pr") and user != repository.namespace:
            raise _Refused(403, f"Forbidden: you don't have write access to {repo_id}")
        return repository

    def _at(self, repository: Repository, revision: str | None) -> Commit:
        commit = repository.find(revision or "main")
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _create(self, request: Request) -> _Answer:
        asked, user = request.json, self._who(request)
        namespace = asked.get("organization") or user
        repo_id = f"{namespace}/{asked['name']}"
        if user != namespace:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        exists = repo_id in self._repositories
        if not exists:
            self.add_repository(repo_id, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.endpoint}/{repo_id}"}, status=409 if exists else 200)

    def _validate_card(self, request: Request) -> _Answer:
        found = _FRONT_MATTER.match(request.json["content"])
        try:
            valid = found is None or isinstance(yaml.safe_load(found[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the metadata is no YAML object"}]
        return _json({"errors": errors, "warnings": []}, status=200 if valid else 400)

    # What is in a repository.

    def _info(self, request: Request, repo_id: str, revision: str | None = None) -> _Answer:
        repository = self._repository(request, repo_id)
        commit = self._at(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        name = repo_id.removeprefix("datasets/")
        return _json({"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> _Answer:
        commit = self._at(self._repository(request, repo_id), revision)
        prefix = f"{folder}/" if folder else ""
        entries = [entry for entry in _entries(commit) if entry["path"].startswith(prefix)]
        if not request.asks("recursive"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return _json(entries)

    def _paths_info(self, request: Request, repo_id: str, revision: str) -> _Answer:
        commit = self._at(self._repository(request, repo_id), revision)
        wanted = parse_qs(request.body.decode())["paths"]
        return _json([entry for entry in _entries(commit) if entry["path"] in wanted])

    def _refs(self, request: Request, repo_id: str) -> _Answer:
        repository = self._repository(request, repo_id)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/", "pullRequests": "refs/pr/"}
        refs: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds}
        for kind, prefix in kinds.items():
            for ref, oid in repository.refs.items():
                if ref.startswith(prefix):
                    refs[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return _json(refs)

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> _Answer:
        """A file: itself where git has it, or where to get it from storage."""
        repository = self._repository(request, repo_id)
        user = self._who(request)
        if repository.gated and user != repository.namespace:
            raise _Refused(403 if user else 401, f"Access to {repo_id} is restricted.", "GatedRepo")
        commit = self._at(repository, revision)
        content = commit.files.get(path)
        if content is None:
            raise _Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid_of(path, content)}"'}
        if not goes_through_lfs(path, len(content)):
            return _Answer(200, content, headers)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256_of(content)}"'}
        headers["Location"] = self._signed("objects", repository, sha256_of(content))
        return _Answer(302, b"", headers)

    # Uploads.

    def _new_branch(self, request: Request, repo_id: str, branch: str) -> _Answer:
        repository = self._writable(request, repo_id)
        start = self._at(repository, request.json.get("startingPoint"))
        ref = f"refs/heads/{branch}"
        repository.refs[ref] = start.oid
        return _json({"ref": ref})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> _Answer:
        """How each file is to be uploaded, whether .gitignore leaves it out, and whether it is there already."""
        repository = self._writable(request, repo_id)
        commit = self._at(repository, revision)
        ignored = request.json.get("gitIgnore", commit.files.get(".gitignore", b"").decode()).split()
        answers = []
        for file in request.json["files"]:
            path, large = file["path"], goes_through_lfs(file["path"], file["size"])
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatchcase(path, pattern) for pattern in ignored)
            if path in commit.files:
                present = commit.files[path]
                answer["oid"] = sha256_of(present) if large else oid_of(path, present)
            answers.append(answer)
        return _json({"files": answers, "commitOid": commit.oid})

    def _lfs_batch(self, request: Request, repo_id: str) -> _Answer:
        asked = request.json
        repository = self._writable(request, repo_id, write="ref" in asked)
        objects = []
        for wanted in asked["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repository.objects:  # without actions: there already
                objects[-1]["actions"] = {"upload": {"href": self._signed("uploads", repository, wanted["oid"])}}
        return _json({"transfer": "basic", "objects": objects})

    def _commit_of_client(self, request: Request, repo_id: str, revision: str) -> _Answer:
        repository = self._writable(request, repo_id)
        before = self._at(repository, revision)
        header: dict[str, Any] = {}
        changes: dict[str, bytes | None] = {}
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    header = value
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changes[value["path"]] = repository.objects[value["oid"]]
                case "deletedFile":
                    changes[value["path"]] = None
                case _:
                    raise _unanswered(request)
        if not before.oid.startswith(header.get("parentCommit") or ""):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        number = len(repository.pull_requests) + 1
        ref = f"refs/pr/{number}" if request.asks("create_pr") else repository.ref_of(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise _Refused(400, f"{revision} is no branch to commit to")
        commit = repository.commit(ref, changes, header["summary"], header.get("description") or "", before.oid)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit.oid}"}
        if request.asks("create_pr"):
            repository.pull_requests.append(self._who(request) or "")
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo_id}/discussions/{number}"
        return _json(answer)

    # Storage, on its own host: addresses that are valid because they are signed.

    def _signed(self, kind: str, repository: Repository, sha256: str) -> str:
        return f"{self._storage_address}/{kind}/{repository.repo_id}/{sha256}?signature={self._secret}"

    def _storage(self, request: Request, kind: str, repo_id: str, sha256: str) -> _Answer:
        if "authorization" in request.headers:
            raise _Refused(400, "Only one auth mechanism allowed")  # what S3 says
        if request.query.get("signature") != [self._secret]:
            raise _Refused(403, "SignatureDoesNotMatch")
        objects = self.repository(repo_id).objects
        if kind == "objects":
            return _Answer(200, objects[sha256], {"ETag": f'"{sha256}"'})
        if sha256_of(request.body) != sha256:
            raise _Refused(400, "The content is not what its SHA-256 says")
        objects[sha256] = request.body
        return _Answer()


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """The folders and files of a commit, as listings name them."""
    folders = {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}
    entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "path": path} for path in sorted(folders)]
    for path, content in commit.files.items():
        entry = {"type": "file", "oid": oid_of(path, content), "size": len(content), "path": path}
        if goes_through_lfs(path, len(content)):
            entry["lfs"] = {"oid": sha256_of(content), "size": len(content), "pointerSize": len(pointer_to(content))}
        entries.append(entry)
    return entries


def _json(content: Any, status: int = 200, **headers: str) -> _Answer:
    return _Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


def _unanswered(request: Request) -> _Refused:
    return _Refused(HTTPStatus.NOT_IMPLEMENTED, f"This server has no answer to {request.method} {request.path}")


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client may go away at any time; our own mistakes are answered with 501


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def _serve(self) -> None:
        address = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(address.path), headers, parse_qs(address.query), self.path)
        self.server.hub.requests.append(request)
        size = int(headers.get("content-length", 0))
        request.body = self.rfile.read(self.server.hub._cut_after(request, size))
        if len(request.body) < size:  # cut by us or by the client
            self.close_connection = True
        else:
            self._send(request, self.server.hub._answer(request))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, request: Request, answer: _Answer) -> None:
        body = b"" if request.method == "HEAD" else answer.body
        end = self.server.hub._cut_after(request, len(body)) if request.method == "GET" else len(body)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(body[:end])
        self.close_connection = self.close_connection or end < len(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


_PROGRAM = """
from __future__ import annotations
import json, sys

{source}

print(json.dumps({name}(**json.loads(sys.argv[1])), default=str))
"""


def program(client: Callable[..., Any] | str, **arguments: Any) -> list[str]:
    """Arguments for Python that run a function, of which only the source goes along, and print as JSON what it returns.

    The function must import what it uses; a client given as source is the body of such a function.
    """
    if isinstance(client, str):
        name = "client"
        source = f"def client({', '.join(arguments)}):\n{textwrap.indent(textwrap.dedent(client), '    ')}"
    else:
        name, source = client.__name__, textwrap.dedent(inspect.getsource(client))
    return ["-c", _PROGRAM.format(source=source, name=name), json.dumps(arguments, default=str)]


def run_client(
    hub: HubServer,
    client: Callable[..., Any] | str,
    *,
    home: Path | None = None,
    token: str | bool | None = True,
    offline: bool = False,
    **arguments: Any,
) -> Any:
    """What `client(**arguments)` returns in a process of its own whose Hub is `hub`; see `program`.

    `home`, `token` and `offline` are those of `HubServer.environment`; without a home the client gets a new, empty one.
    """
    with tempfile.TemporaryDirectory() as empty:
        home = home or Path(empty)
        home.mkdir(parents=True, exist_ok=True)
        finished = run_python(program(client, **arguments), home, hub.environment(home, token=token, offline=offline))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])
