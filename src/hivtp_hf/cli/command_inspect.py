"""`hivtp inspect`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..checkpoints.inspection import EXAMPLE_SIZES, CheckpointReport, inspect_checkpoint
from ..pruning.base_checkpoint import BaseCheckpoint
from .image_files import read_image
from .printing import say
from .pruning_options import with_pruning_options


@with_pruning_options
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Images whose sizes are to be counted.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="A size to count, HEIGHTxWIDTH in pixels; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    *,
    pruning: dict[str, Any],
) -> None:
    """Show the settings of CHECKPOINT, and what they keep and save: tokens, prefill FLOPs and KV bytes, stock against pruned.

    Settings that are given are tried in place of the checkpoint's own. No weights are read.
    """
    sizes = [_size_of_text(text) for text in size or ()]
    sizes += [read_image(path, "counted").size[::-1] for path in images or ()]
    report = inspect_checkpoint(checkpoint, sizes or EXAMPLE_SIZES, pruning, revision=revision, cache_dir=cache_dir)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_table(report)


def _size_of_text(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,10})x(\d{1,10})", text.strip())
    if match is None:
        raise ValueError(f"`--size` is {text!r}; it must be HEIGHTxWIDTH in pixels, such as 480x640.")
    return int(match[1]), int(match[2])


def _print_table(report: CheckpointReport) -> None:
    say(f"{report.checkpoint} ({report.model_type})")
    if report.base_model is not None:
        base = BaseCheckpoint.coerce(report.base_model)
        say(f"no weights of its own: they are those of {base}")
    if report.remote_code is not None:
        say(_remote_code(report.remote_code))
    say(", ".join(f"{name} {value}" for name, value in report.pruning_config.items()))
    # The unit that leaves no zeros in front.
    unit, name = (1e12, "TFLOPs") if max(row.stock_prefill_flops for row in report.sizes) >= 1e11 else (1e9, "GFLOPs")
    caption = f"Language model alone, on one image's tokens. Cache in {report.cache_dtype}."
    layers = [str(stage["layer"]) for stage in report.sizes[0].stages]
    if layers:
        caption += f" Kept: tokens that enter, then those that go on from layer {' and '.join(layers)}; their mean over layers."
    table = Table(box=box.SIMPLE, caption=caption)
    table.add_column("height x width", no_wrap=True)
    # Both do not fit into 80 columns.
    third = "\nmean" if layers else "new-\nlines"
    headings = ("tokens\nstock", "\nkept", third, f"{name}\nstock", "\nkept", "KV MiB\nstock", "\nkept")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.sizes:
        table.add_row(
            f"{row.height} x {row.width}",
            str(row.stock_tokens),
            "\n".join(map(str, (row.retained_tokens, *(stage["tokens"] for stage in row.stages)))),
            f"{row.average_retention:.1%}" if layers else str(row.newlines),
            _short(row.stock_prefill_flops / unit),
            _short(row.prefill_flops / unit),
            _short(row.stock_kv_bytes / 2**20),
            _short(row.kv_bytes / 2**20),
        )
    Console().print(table)


def _remote_code(code: dict[str, Any]) -> str:
    """What there is to know before the code of a checkpoint is trusted."""
    commit = f" at commit {code['commit']}" if code["commit"] else ""
    written = f"remote code of hivtp_hf {code['version']}{commit}, family {code['family']}"
    if not code["is_unchanged"]:
        return f"{written}; CHANGED since it was written"
    return f"{written}; {'the same as' if code['is_current'] else 'another than'} that of the installed release"


def _short(number: float) -> str:
    """At least three digits of a number, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else f"{number:.5f}"
