"""`hivtp push`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..hub import push_checkpoint


def push(
    target: Annotated[Path, typer.Argument(help="The folder of a pruned checkpoint, as `hivtp convert` makes it.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub; made if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse one that is public.")
    ] = False,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Leave out the weights: its base on the Hub has the same ones.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
) -> None:
    """Push TARGET to the Hub, in one commit: it then loads from there with trust_remote_code alone.

    All is checked before anything is sent. After an interruption, run the same command again: it goes on where it was.

    The token is HF_TOKEN, or that of `hf auth login`.
    """
    pushed = push_checkpoint(target, repo_id, private=private, config_only=config_only, revision=revision, create_pr=create_pr)
    console = Console()

    def say(text: str, style: str | None = None) -> None:
        # Not as markup, and not broken into lines: it is there to be copied.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(pushed.url, "green")
    if pushed.pull_request is not None:
        say(f"Pull request: {pushed.pull_request}", "green")
    loading = f'"{pushed.repo_id}", revision="{pushed.commit}", trust_remote_code=True'
    say(f"AutoModelForImageTextToText.from_pretrained({loading})")
