"""`hivtp convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints import convert_checkpoint, open_source
from .printing import say
from .pruning_options import with_pruning_options


@with_pruning_options
def convert(
    source: Annotated[str, typer.Argument(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="Write no weights, but where they are: at a commit of SOURCE, or in its folder."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET if it exists.")] = False,
    *,
    pruning: dict[str, Any],
) -> None:
    """Make a pruned checkpoint of SOURCE: configuration, processor, code, and its weights untouched.

    With --config-only it has no weights, and loading takes them from SOURCE, of the commit that it has now. Converted in turn,
    such a checkpoint becomes a complete one.

    Settings that are not given are those of SOURCE, or the defaults where it is a stock checkpoint.
    """
    folder = convert_checkpoint(
        source, target, pruning, revision=revision, cache_dir=cache_dir, config_only=config_only, force=force
    )
    say(str(folder), "green")
    base = open_source(str(folder)).base
    say("It is complete." if base is None else f"It has no weights: loading takes those of {base}.")
    if base is not None and base.is_local:
        say("That is a folder, so it loads on this machine alone. To push it, convert the checkpoint on the Hub instead.")
    say("It loads with from_pretrained: with hivtp_hf imported, or with trust_remote_code=True alone.")
