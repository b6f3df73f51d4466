"""The runs of examples/lmms_eval.sh as a table: python examples/lmms_eval_table.py FOLDER

Every score stands beside its share of stock's. The last column is the mean of these shares. `blind` is the model without any
visual token: what is above it was seen.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

STOCK, BLIND = "stock", "blind"
# Which numbers of a task make its score, as papers quote it: MME's is the sum of both parts.
SCORES = {
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "pope": ("pope_f1_score",),
    "gqa": ("exact_match",),
    "mmbench_en_dev_static": ("gpt_eval_score",),
    "textvqa_val": ("exact_match",),
    "scienceqa_img": ("exact_match",),
    "vqav2_val": ("exact_match",),
    "seedbench": ("seed_image",),
    "shapes_vqa": ("accuracy",),
}


class Run(NamedTuple):
    """One run.

    Attributes:
        name: of its folder.
        tokens: patch tokens and newlines of an image on average; None where no image was asked about.
        scores: of every task, as lmms-eval wrote them.
    """

    name: str
    tokens: float | None
    scores: dict[str, float]


def runs_in(folder: Path) -> list[Run]:
    """The runs of a folder, stock first and blind second, from the newest results of each.

    Raises:
        ValueError: where stock is missing, and for a task or a number that is not known.
    """
    runs = {}
    for own in sorted(path for path in folder.iterdir() if path.is_dir()):
        results = sorted(own.rglob("*_results.json"), key=lambda path: path.name)
        if results:
            runs[own.name] = _run(own.name, json.loads(results[-1].read_text(encoding="utf-8")))
    if STOCK not in runs:
        raise ValueError(f"{folder} has no results of a run called {STOCK!r}, which all others are held against. Run it first.")
    first = [runs.pop(name) for name in (STOCK, BLIND) if name in runs]
    return [*first, *runs.values()]


def _run(name: str, results: dict[str, Any]) -> Run:
    scores = {}
    for task, numbers in results["results"].items():
        if task not in SCORES:
            raise ValueError(f"{name}: the task {task!r} has no score here; known are {', '.join(SCORES)}. Add it to SCORES.")
        missing = [wanted for wanted in SCORES[task] if f"{wanted},none" not in numbers]
        if missing:
            raise ValueError(f"{name}: the task {task!r} has no number {missing[0]!r}, only {', '.join(numbers)}.")
        scores[task] = sum(numbers[f"{wanted},none"] for wanted in SCORES[task])
    measured = results.get("throughput", {})
    tokens = [measured.get(f"avg_retained_{kind}_tokens") for kind in ("patch", "newline", "class")]
    return Run(name, None if None in tokens else sum(tokens), scores)


def table(runs: list[Run]) -> str:
    """A Markdown table, a line a run."""
    stock = runs[0]
    tasks = list(stock.scores)
    lines = [f"| run | tokens | {' | '.join(tasks)} | mean |", f"|{'---|' * (len(tasks) + 3)}"]
    for run in runs:
        if list(run.scores) != tasks:
            raise ValueError(f"{run.name} has the tasks {', '.join(run.scores)}; {stock.name} has {', '.join(tasks)}.")
        shares = [run.scores[task] / stock.scores[task] if stock.scores[task] else float("nan") for task in tasks]
        cells = [f"{run.scores[task]:.4g} ({share:.1%})" for task, share in zip(tasks, shares, strict=True)]
        tokens = "" if run.tokens is None else f"{run.tokens:.0f}"
        lines.append(f"| {run.name} | {tokens} | {' | '.join(cells)} | {sum(shares) / len(shares):.1%} |")
    return "\n".join(lines)


def main(folder: Annotated[Path, typer.Argument(help="What examples/lmms_eval.sh has written.")]) -> None:
    """The runs of examples/lmms_eval.sh as a table: every score, and its share of stock's."""
    try:
        print(table(runs_in(folder)))
    except (OSError, ValueError) as error:
        sys.exit(f"lmms_eval_table: {error}")


if __name__ == "__main__":
    typer.run(main)
