"""`hivtp compare`."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .printing import say

if TYPE_CHECKING:
    from ..evaluation.paired_answers import Comparison


def compare(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run of `hivtp evaluate`.")],
    method: Annotated[
        str | None, typer.Argument(help="A method of the run, such as hivtp; hivtp:both for one of several ways.")
    ] = None,
    against: Annotated[list[str] | None, typer.Argument(help="Methods that it is compared with, written alike.")] = None,
    other_run: Annotated[
        Path | None, typer.Option(help="A run on the same questions, or more of them, that AGAINST are methods of.")
    ] = None,
    question_type: Annotated[
        str | None, typer.Option("--type", help="Show questions of this type, and all others together, not every type.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A CSV file, rather than a table to read.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Show what METHOD wins and loses AGAINST others on the same questions, by ratio and type of question.

    Won are the questions that only METHOD answers, lost those that only the other one does; p is that of McNemar's exact test,
    two-sided. Without methods, every way of `--weights-and-positions` is compared with the published one.
    """
    # Imported here, as Pillow is needed for nothing else.
    from ..evaluation.paired_answers import check_target, compared, write_comparisons

    if output is not None:
        check_target(output, force)
    found = compared(run, method, against or (), other_run=other_run, question_type=question_type, say=say)
    if output is not None:
        write_comparisons(output, found, force=force)
        say(str(output), "green")
        return
    for (one, other), of_pair in itertools.groupby(found, lambda comparison: (comparison.method, comparison.against)):
        say(f"{one} against {other}")
        _print_table(of_pair)


def _print_table(comparisons: Iterable["Comparison"]) -> None:
    table = Table(box=box.SIMPLE, caption="Behind a slash: of the other one. p is not corrected for the number of tests.")
    # Fits into 80 columns.
    for heading in ("ratio", "tokens", "questions", "n", "right, %", "won / lost", "p"):
        is_text = heading == "questions"
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for one in comparisons:
        right, other_right = (f"{100 * number / one.n:.1f}" for number in (one.right, one.against_right))
        table.add_row(
            f"{float(one.asked_ratio):.3g}",
            f"{one.tokens:.0f} / {one.against_tokens:.0f}",
            one.question_type,
            str(one.n),
            f"{right} / {other_right}",
            f"{one.won} / {one.lost}",
            f"{one.p:.2g}",
        )
    Console().print(table)
