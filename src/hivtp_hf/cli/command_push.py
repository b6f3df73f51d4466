"""`hivtp push`."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import push_checkpoint
from .printing import say


def push(
    target: Annotated[Path, typer.Argument(help="The folder of a pruned checkpoint, as `hivtp convert` makes it.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub; made if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse one that is public.")
    ] = False,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Push no weights, as its base has the same ones; take away those there.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch to commit to, made if it does not exist; or refs/pr/N, a pull request.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
) -> None:
    """Push TARGET to the Hub, in one commit: it then loads from there with trust_remote_code alone.

    All files of the folder are pushed that are not hidden, README.md as well. Files there that would change what loads, and are
    not in TARGET, are taken away: weights, configuration, tokenizer, chat templates.

    All is checked before anything is sent. After an interruption, run the same command again: it goes on where it was.

    The token is HF_TOKEN, or that of `hf auth login`.
    """
    pushed = push_checkpoint(target, repo_id, private=private, config_only=config_only, revision=revision, create_pr=create_pr)
    say(pushed.url, "green")
    if not pushed.is_new:
        say("It has this checkpoint already. Nothing was changed" + (", and no pull request opened." if create_pr else "."))
    if pushed.removed:
        say(f"Taken away there: {', '.join(pushed.removed)}")
    if pushed.pull_request is not None:
        say(f"Pull request: {pushed.pull_request}", "green")
    loading = f'"{pushed.repo_id}", revision="{pushed.commit}", trust_remote_code=True'
    say(f"AutoModelForImageTextToText.from_pretrained({loading})")
