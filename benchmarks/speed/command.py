"""The command line: python -m benchmarks.speed --preset cpu"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ratio_argument import ratio

from .dtype_choice import DTYPE_NAMES
from .presets import PRESETS
from .run import PARTS, run_benchmark
from .summary import Report, table
from .wording import JUDGEMENT_HEADINGS, judgement_cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; ends with status 2 and a sentence where it cannot."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = vars(parser.parse_args(given))
    try:
        report, paths = run_benchmark(**options, command=" ".join(("python -m benchmarks.speed", *given)), say=_say)
    except ValueError as error:
        parser.error(str(error))
    print_judgements(report)
    print(*paths, sep="\n")


def print_judgements(report: Report) -> None:
    """The table of targets, by rich where it is installed."""
    lines = [judgement_cells(judgement) for judgement in report.judgements]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(table(JUDGEMENT_HEADINGS, lines))
        return
    shown = Table(*JUDGEMENT_HEADINGS, title=f"{report.environment.preset} on {report.environment.device}")
    for cells in lines:
        verdict = cells[-1]
        colour = "green" if verdict.startswith("met") else "red" if verdict.startswith("missed") else "dim"
        shown.add_row(*cells[:-1], f"[{colour}]{verdict}[/]")
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    presets = "; ".join(f"{preset.name}: {preset.description}" for preset in PRESETS.values())
    parser.add_argument("--preset", default="cpu", help=f"{presets} (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:1 and so on; the preset's own by default")
    parser.add_argument(
        "--dtype", default="auto", help=f"one of {', '.join(DTYPE_NAMES)}; auto is the faster one (%(default)s)"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of hivtp_hf; the first one leads")
    parser.add_argument("--ratios", nargs="+", type=ratio, metavar="RATIO", help="such as 0.5 or 2/9")
    parser.add_argument("--images", nargs="+", type=_size, metavar="HEIGHTxWIDTH", help="such as 672x672; the first one leads")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="of the throughput")
    parser.add_argument("--new-tokens", nargs="+", type=int, metavar="N", help="of decode and throughput")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds of each part; each part's own by default")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"parts to measure, of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("bench_output"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--commit", help="of the code, where there is no git folder to ask")
    return parser


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 672x672 (height x width)") from None
    return height, width


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
