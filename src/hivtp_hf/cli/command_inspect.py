"""`hivtp inspect`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..inspection import CheckpointReport, inspect_checkpoint
from .pruning_options import with_pruning_options

# Every pinpoint shape of LLaVA-NeXT occurs.
_SIZES = ((672, 672), (480, 640), (300, 451), (1000, 300), (100, 1000))


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
    sizes = [_size_of_text(text) for text in size or ()] + [_size_of_image(path) for path in images or ()]
    report = inspect_checkpoint(checkpoint, sizes or list(_SIZES), pruning, revision=revision, cache_dir=cache_dir)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_table(report)


def _size_of_text(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,10})x(\d{1,10})", text.strip())
    if match is None:
        raise ValueError(f"`--size` is {text!r}; it must be HEIGHTxWIDTH in pixels, such as 480x640.")
    return int(match[1]), int(match[2])


def _size_of_image(path: Path) -> tuple[int, int]:
    from PIL import Image, ImageOps  # needed for images alone

    with Image.open(path) as image:
        width, height = ImageOps.exif_transpose(image).size  # as transformers sees it
    return height, width


def _print_table(report: CheckpointReport) -> None:
    console = Console()
    settings = ", ".join(f"{name} {value}" for name, value in report.pruning_config.items())
    console.print(f"[bold]{report.checkpoint}[/] ({report.model_type})\n{settings}\n", highlight=False)
    table = Table(caption=f"Language model alone, on one image's tokens, stock and pruned. Cache in {report.cache_dtype}.")
    table.add_column("height x width", no_wrap=True)
    for heading in ("tokens", "kept", "newlines", "TFLOPs", "kept", "KV MiB", "kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.sizes:
        table.add_row(
            f"{row.height} x {row.width}",
            str(row.stock_tokens),
            str(row.retained_tokens),
            str(row.newlines),
            f"{row.stock_prefill_flops / 1e12:.3g}",
            f"{row.prefill_flops / 1e12:.3g}",
            f"{row.stock_kv_bytes / 2**20:.4g}",
            f"{row.kv_bytes / 2**20:.4g}",
        )
    console.print(table)
