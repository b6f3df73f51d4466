"""The command line: python -m benchmarks.speed --preset cpu"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hivtp_hf.evaluation.variants import parsed_ratios

from .dtype_choice import DTYPE_NAMES
from .presets import PRESETS
from .run import PARTS, run_benchmark
from .summary import Report
from .wording import JUDGEMENT_HEADINGS, judgement_cells

_PRESETS = "; ".join(f"{preset.name}: {preset.description}" for preset in PRESETS.values())


def main(
    preset: Annotated[str, typer.Option(help=_PRESETS)] = "cpu",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:1 and so on; the preset's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPE_NAMES)}; auto is the faster one.")] = "auto",
    methods: Annotated[str | None, typer.Option(help="Of hivtp_hf, with commas between; the first one leads.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Such as 0.5 or 2/9, with commas between.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Such as 672x672; may be repeated, and the first one leads."),
    ] = None,
    batches: Annotated[list[int] | None, typer.Option(help="Of the throughput; may be repeated.")] = None,
    new_tokens: Annotated[list[int] | None, typer.Option(help="Of decode and throughput; may be repeated.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds of each part; each part's own by default.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or process: processor time, for a CPU that others use too (give OMP_NUM_THREADS=1).")
    ] = "wall",
    only: Annotated[list[str] | None, typer.Option(help=f"A part to measure, of {', '.join(PARTS)}; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = Path("bench_output"),
    commit: Annotated[str | None, typer.Option(help="Of the code, where there is no git folder to ask.")] = None,
) -> None:
    """Speed and memory, beside stock and beside the limit."""
    try:
        report, paths = run_benchmark(
            preset,
            device=device,
            dtype=dtype,
            methods=None if methods is None else [name.strip() for name in methods.split(",")],
            ratios=None if ratios is None else [float(ratio) for ratio in parsed_ratios(ratios)],
            # Without any typer gives an empty list, which here would mean none at all.
            images=[_size(text) for text in images or ()] or None,
            batches=batches or None,
            new_tokens=new_tokens or None,
            repeats=repeats,
            clock=clock,
            only=only or None,
            output=output,
            commit=commit,
            command=" ".join(("python -m benchmarks.speed", *sys.argv[1:])),
            say=_say,
        )
    except ValueError as error:
        sys.exit(f"benchmarks.speed: {error}")
    print_judgements(report)
    print(*paths, sep="\n")


def print_judgements(report: Report) -> None:
    """The table of targets."""
    shown = Table(*JUDGEMENT_HEADINGS, title=f"{report.environment.preset} on {report.environment.device}")
    for cells in map(judgement_cells, report.judgements):
        verdict = cells[-1]
        colour = "green" if verdict.startswith("met") else "red" if verdict.startswith("missed") else "dim"
        shown.add_row(*cells[:-1], f"[{colour}]{verdict}[/]")
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"`--images` is {text!r}; it must be HEIGHTxWIDTH in pixels, such as 672x672.") from None
    return height, width


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
