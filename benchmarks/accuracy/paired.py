"""What weights and positions win and lose against the published way: python -m benchmarks.accuracy.paired RUN

RUN is a folder of `hivtp evaluate --weights-and-positions published,...`. Where a run has other ways alone, `--published`
names one that has the published way on the same questions, or on more of them. Questions are paired, and p is that of McNemar's
exact test, two-sided: the chance of a split as uneven among the questions that only one of the two answers. Of "random" the
first seed is compared, since draws for one question are not independent.
"""

import csv
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from hivtp_hf.evaluation.variants import PUBLISHED, SEEDS

ALL, COUNTS, OTHERS = KINDS = ("all", "count", "others")
_COLUMNS = ("method", "ratio", "weights_and_positions", "questions", "n", "right", "published", "won", "lost", "p")


class Comparison(NamedTuple):
    """One way to tell the language model of kept tokens, against the published one, on the same questions.

    Attributes:
        method, ratio, weights_and_positions: of the way, as predictions.csv writes them.
        questions: "all", "count" for those of that type, or "others".
        n: how many.
        right, published: how many the two ways answer.
        won, lost: how many only this way answers, and only the published one.
        p: of McNemar's exact test.
    """

    method: str
    ratio: str
    weights_and_positions: str
    questions: str
    n: int
    right: int
    published: int
    won: int
    lost: int
    p: float


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p of so many against so many, where each is as likely: 1 where there are none."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)


def comparisons(lines: Iterable[Mapping[str, str]]) -> list[Comparison]:
    """All comparisons that the lines of a predictions.csv hold, in their order.

    Raises:
        ValueError: where none of them is of the published way beside another.
    """
    right: dict[tuple[str, str], dict[str, dict[str, bool]]] = {}
    types: dict[str, str] = {}
    for line in lines:
        if line["seed"] in ("", str(SEEDS[0])):
            types[line["row"]] = line["question_type"]
            ways = right.setdefault((line["method"], line["ratio"]), {})
            ways.setdefault(line["weights_and_positions"], {})[line["row"]] = line["correct"] == "1"
    found = [
        _compared((method, ratio, way, kind), answers, ways[PUBLISHED], types)
        for (method, ratio), ways in right.items()
        if PUBLISHED in ways
        for way, answers in ways.items()
        if way != PUBLISHED
        for kind in KINDS
    ]
    if not found:
        raise ValueError(
            "the run has nothing to compare. Give one of `hivtp evaluate --weights-and-positions published,both`, for example."
        )
    return found


def _compared(
    named: tuple[str, str, str, str], answers: Mapping[str, bool], published: Mapping[str, bool], types: Mapping[str, str]
) -> Comparison:
    rows = [row for row in answers if named[-1] == ALL or (types[row] == "count") == (named[-1] == COUNTS)]
    pairs = [(answers[row], published[row]) for row in rows]
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    both = pairs.count((True, True))
    return Comparison(*named, len(rows), both + won, both + lost, won, lost, mcnemar(won, lost))


def lines_beside(lines: list[dict[str, str]], others: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The lines of a run, and before them those of another's published way that are about the same questions.

    Raises:
        ValueError: where the other run lacks a question, or asks something else under its number.
    """
    asked = {line["row"]: _question(line) for line in lines}
    published = [line for line in others if line["weights_and_positions"] == PUBLISHED and line["row"] in asked]
    if {line["row"]: _question(line) for line in published} != asked:
        raise ValueError("the two runs were not asked the same questions. Give a run of the same data as `--published`.")
    return [*published, *lines]


def _question(line: Mapping[str, str]) -> list[str | None]:
    return [line.get(name) for name in ("image", "question", "answer")]


def _lines(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def main(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    published: Annotated[Path | None, typer.Option(help="The folder of another, for its published way.")] = None,
) -> None:
    """Prints a table as CSV."""
    try:
        lines = _lines(run)
        found = comparisons(lines if published is None else lines_beside(lines, _lines(published)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"paired: {error}")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([*comparison[:-1], f"{comparison.p:.2g}"] for comparison in found)


if __name__ == "__main__":
    typer.run(main)
