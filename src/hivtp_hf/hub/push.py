"""`push_checkpoint`: a pruned checkpoint on the Hub, whole from one commit to the next."""

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..checkpoints.repository_names import is_repository
from .hub_refusals import explained_refusals, patiently
from .local_checkpoint import LocalCheckpoint, is_weight_file, open_local_checkpoint
from .pushed_card import with_card, with_notice
from .pushed_files import check_no_token
from .weightless_push import is_same_file, without_weights

_TITLE = "Upload checkpoint with visual token pruning"
# Beside weights: what transformers reads where it finds it. Of a former push it would go on to change what loads.
_READ_BY_TRANSFORMERS = (
    *("*config.json", "*.jinja", "*.model", "chat_template*.json", "tokenizer*.json", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja", "custom_generate/*.py"),
)


class PushedCheckpoint(NamedTuple):
    """What has been pushed.

    Attributes:
        url: the repository's page.
        repo_id: its name, `owner/name`.
        commit: the hash of the commit that has the checkpoint.
        pull_request: the page of the pull request that was opened, or None.
        removed: the files of the repository that the commit took away.
        is_new: whether there was anything to change; otherwise the commit is the newest one that was there.
    """

    url: str
    repo_id: str
    commit: str
    pull_request: str | None
    removed: tuple[str, ...]
    is_new: bool


class _Place(NamedTuple):
    """Where the checkpoint goes: the branch as it is before the push."""

    branch: str
    is_new: bool
    head: str | None
    files: dict[str, RepoFile]


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    config_only: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    show_progress: bool = True,
) -> PushedCheckpoint:
    """Pushes a pruned checkpoint, which then loads from the Hub with `trust_remote_code` alone.

    All is checked before anything is sent, and one commit makes all changes, so that the repository always holds one whole
    checkpoint: the former or this one. That commit also takes away what a former push left and would change what loads. Weights
    that are there already are not sent again; neither is, after an interruption, what had arrived.

    Nothing in the folder is executed or changed.

    Args:
        folder: a pruned checkpoint, complete or without weights, as `convert_checkpoint` or `save_pretrained` make it.
        repo_id: `owner/name` on the Hub. The repository is made where it does not exist.
        private: makes a new repository private, and refuses one that is public.
        config_only: pushes a complete checkpoint without its weights. config.json then names the one that has them, at its
            newest commit: what the model card names as `base_model`, whose weights must be the same, byte for byte. Needed,
            too, to push a checkpoint without weights in place of a complete one, whose weights that takes away.
        revision: a branch to commit to, which is made where it does not exist, or `refs/pr/N` for an open pull request; the
            main branch by default.
        create_pr: opens a pull request, which needs no access for writing.
        token: as for `huggingface_hub.HfApi`; None takes HF_TOKEN, or the one of `hf auth login`.
        show_progress: whether bars tell how far it is.

    Raises:
        ValueError: for a folder that is no whole pruned checkpoint, whose base lies on this machine, which has links that lead
            out of it or holds the token; and for arguments that are out of range or do not fit the repository.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the Hub refuses or cannot be reached.
    """
    _check_arguments(repo_id, revision, create_pr)
    checkpoint = with_card(open_local_checkpoint(Path(folder)), repo_id)
    secret = _token_in_use(token)
    check_no_token(checkpoint.files, checkpoint.weights, secret)
    api = HfApi(token=secret)
    with _progress_bars(show_progress):
        if config_only and checkpoint.base is None:
            checkpoint, base = without_weights(checkpoint, api)
            checkpoint = with_notice(checkpoint, base, repo_id)
        if checkpoint.base is not None and checkpoint.base.name == repo_id:
            raise ValueError(f"{repo_id} is the base itself and would lose its weights; push to another repository.")
        with explained_refusals(repo_id):
            _make_repository(api, repo_id, private, create_pr)
            place = _look_at(api, repo_id, revision)
            if checkpoint.base is not None and not config_only:
                _check_that_no_weights_go(repo_id, place)
            return _commit(api, repo_id, place, checkpoint, create_pr)


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool) -> None:
    if not is_repository(repo_id):
        raise ValueError(
            f"`repo_id` is {repo_id!r}; it must be owner/name, of letters, digits and single '-', '_' or '.' between them."
        )
    if revision is not None and create_pr:
        raise ValueError("A pull request goes to the main branch; give `--pr` (create_pr) or `--revision`, not both.")
    if revision is not None and (not revision or re.fullmatch("[0-9a-f]{40}", revision)):
        raise ValueError(f"`revision` is {revision!r}; it must be the name of a branch, as a commit cannot be changed.")


def _token_in_use(token: str | bool | None) -> str:
    found = get_token() if token is None or token is True else token
    if not found:
        raise ValueError("A push needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    return found


def _make_repository(api: HfApi, repo_id: str, private: bool, create_pr: bool) -> None:
    """Makes the repository where there is none; a ValueError where it is public but must not be."""
    try:
        info = patiently(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        if create_pr:
            raise ValueError(
                f"{repo_id} does not exist, or the token in use may not see it, so no pull request can be opened there. Check "
                "the name, or push without `--pr` (create_pr) to make the repository."
            ) from None
        # Left open, it is what the owner has set for new repositories.
        patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        info = patiently(lambda: api.model_info(repo_id))
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so `--private` (private=True) cannot be kept, and nothing was uploaded. Make it "
            "private in its settings, or push to another repository."
        )


def _look_at(api: HfApi, repo_id: str, revision: str | None) -> _Place:
    refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
    branch = revision or "main"
    if branch not in heads and branch in {name for tag in refs.tags for name in (tag.name, tag.ref)}:
        raise ValueError(f"`revision` is {branch!r}, which is a tag of {repo_id} and cannot be changed. Name a branch.")
    if branch not in heads and branch.startswith("refs/"):
        raise ValueError(
            f"`revision` is {branch!r}, which {repo_id} does not have. Name a branch, or an open pull request; a new one is "
            "opened by `--pr` (create_pr=True)."
        )
    head = heads.get(branch, heads.get("main"))
    tree = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head)))
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return _Place(branch, branch not in heads, head, files)


def _check_that_no_weights_go(repo_id: str, place: _Place) -> None:
    there = sorted(filter(is_weight_file, place.files))
    if there:
        raise ValueError(
            f"{repo_id} has weights ({there[0]}), and this checkpoint has none, but names a base. To let it take the weights "
            "away, give `--config-only` (config_only=True); to keep them, push to another repository."
        )


def _commit(api: HfApi, repo_id: str, place: _Place, checkpoint: LocalCheckpoint, create_pr: bool) -> PushedCheckpoint:
    """Sends what is not there yet, and then makes all changes in one commit.

    `HfApi.upload_folder` (huggingface_hub 2.4) cannot take its place. With hf_xet, which is installed by default, it commits in
    parts: where the Hub refuses a commit several times, a part of the checkpoint may go in without the rest, and a pull request
    stays open and empty. With or without hf_xet, it leaves out what a .gitignore of the repository names, without a word.
    """
    additions = []
    for name, content in checkpoint.files.items():
        there = place.files.get(name)
        if there is None or there.lfs is None or isinstance(content, bytes) or not is_same_file(content, there):
            additions.append(CommitOperationAdd(name, content if isinstance(content, bytes) else os.fspath(content)))
    stale = sorted(name for name in place.files if name not in checkpoint.files and _changes_what_loads(name))
    # Files first: a new branch appears when nothing but the commit is missing. No .gitignore counts.
    patiently(
        lambda: api.preupload_lfs_files(
            repo_id,
            additions,
            revision="main" if place.is_new else place.branch,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content="",
        )
    )
    if place.is_new:
        patiently(lambda: api.create_branch(repo_id, branch=place.branch, revision=place.head, exist_ok=True))
    info = patiently(
        lambda: api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=_TITLE,
            commit_description=f"Taken away, as no part of the checkpoint any more: {', '.join(stale)}." if stale else None,
            revision=place.branch,
            create_pr=create_pr,
            parent_commit=place.head,  # what is stale was found out there; and a commit whose answer is lost is not made twice
        )
    )
    page = f"{api.endpoint}/{repo_id}" + ("" if place.branch == "main" else f"/tree/{quote(place.branch, safe='')}")
    is_new = place.is_new or info.oid != place.head
    return PushedCheckpoint(page, repo_id, info.oid, info.pr_url, tuple(stale) if is_new else (), is_new)


def _changes_what_loads(name: str) -> bool:
    if is_weight_file(name):
        return True
    patterns = [pattern for pattern in _READ_BY_TRANSFORMERS if pattern.count("/") == name.count("/")]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's own bars, which are one switch for the whole process."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
