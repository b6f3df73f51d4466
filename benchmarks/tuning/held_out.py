"""Tuned settings beside others, on held-out questions: python -m benchmarks.tuning.held_out OUTPUT

The small trained model answers the held-out questions of Shapes-VQA under each of some settings, from one pass of the vision
tower. OUTPUT gets answers.csv, a line a question with whether each answers it right; and paired.csv: what some settings win
and lose against others on the same questions, with McNemar's exact p, two-sided. Stopped, it has the questions that it has.
"""

import csv
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import open_source
from hivtp_hf.evaluation.answering import PartWork
from hivtp_hf.evaluation.data import EvaluationData, checked_data, normalised
from hivtp_hf.evaluation.paired_answers import mcnemar
from hivtp_hf.evaluation.prompts import prompt_of
from hivtp_hf.evaluation.variants import UNPRUNED, Variant

_BATCH = 16
_NINTH, _QUARTER = {"method": "hivtp", "retention_ratio": 1 / 9}, {"method": "vflowopt", "retention_ratio": 1 / 4}
# What was tuned is from the runs beside this file, with seed 0 on 30 questions.
SETTINGS: dict[str, dict[str, Any]] = {
    "hivtp, 6 to 8, the default": {**_NINTH, "importance_layers": [6, 7, 8]},
    "hivtp, 4 to 6, by labels": {**_NINTH, "importance_layers": [4, 5, 6]},
    "hivtp, tuned layers": {**_NINTH, "importance_layers": [0, 1, 2, 3]},
    "hivtp, tuned layers and regions": {**_NINTH, "importance_layers": [3], "regions": 4},
    "vflowopt, published": _QUARTER,
    "vflowopt, tuned": {
        **_QUARTER,
        "sink_threshold": 46.176227144826804,
        "entropy_weight": 1.0,
        "recycling_cell_side": 3.0,
        "first_stage_ratio": 0.3609627218065637,
        "second_stage_ratio": 1.0,
    },
}
PAIRS = (
    ("hivtp, tuned layers", "hivtp, 6 to 8, the default"),
    ("hivtp, tuned layers", "hivtp, 4 to 6, by labels"),
    ("hivtp, tuned layers and regions", "hivtp, 6 to 8, the default"),
    ("hivtp, tuned layers and regions", "hivtp, 4 to 6, by labels"),
    ("hivtp, 4 to 6, by labels", "hivtp, 6 to 8, the default"),
    ("vflowopt, tuned", "vflowopt, published"),
)


def answered(data: EvaluationData) -> Iterator[dict[int, list[bool]]]:
    """Part by part whether questions are answered right: of every row by the unpruned model, then under all settings."""
    source = open_source(str(CHECKPOINT))
    model, processor = (load({"method": UNPRUNED}) for load in (source.load_model, source.load_processor))
    plan = [Variant(UNPRUNED, Fraction(1), VisualTokenPruningConfig(method=UNPRUNED))]
    for number, settings in enumerate(SETTINGS.values()):
        pruning = VisualTokenPruningConfig(**settings)
        plan.append(Variant(pruning.method, Fraction(settings["retention_ratio"]).limit_denominator(100), pruning, number))
    prompts = [prompt_of(processor, row.question) for row in data.rows]
    work = PartWork(model.float(), processor, plan, data, prompts, _BATCH, 8)
    for part in data.parts(_BATCH):
        rows = [row for group in part for row in group.rows]
        found: dict[int, list[bool]] = {row: [] for row in rows}
        for result in work.results(part, lambda number: None):
            for row, answer in zip(rows, result["answers"], strict=True):
                found[row].append(normalised(answer) == normalised(data.rows[row].answer))
        yield found


def paired(right: dict[str, list[bool]], types: list[str]) -> Iterator[tuple[Any, ...]]:
    """Of every pair, for all questions, counts and others: n, how many both answer right each, won, lost and p."""
    for first, second in PAIRS:
        for kind in ("all", "count", "others"):
            both = [
                (one, other)
                for one, other, of_type in zip(right[first], right[second], types, strict=True)
                if kind == "all" or (of_type == "count") == (kind == "count")
            ]
            won, lost = sum(one > other for one, other in both), sum(one < other for one, other in both)
            ours, theirs = (sum(of_pair[side] for of_pair in both) for side in (0, 1))
            yield first, second, kind, len(both), ours, theirs, won, lost, f"{mcnemar(won, lost):.3g}"


def main(output: Path, questions: Annotated[int, typer.Option(min=1, help="So many of the first ones.")] = 2000) -> None:
    """Tuned settings beside others, on held-out questions."""
    data = checked_data("held-out", held_out_rows(questions), questions)
    output.mkdir(parents=True, exist_ok=True)
    names = ["unpruned", *SETTINGS]
    right: dict[str, list[bool]] = {name: [] for name in names}
    types: list[str] = []
    with open(output / "answers.csv", "w", newline="", encoding="utf-8") as file, tqdm(total=len(data.rows)) as progress:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "question_type", *names))
        for part in answered(data):
            for row, of_settings in part.items():
                writer.writerow((row + 1, data.rows[row].question_type, *map(int, of_settings)))
                types.append(data.rows[row].question_type)
                for name, is_right in zip(names, of_settings, strict=True):
                    right[name].append(is_right)
            file.flush()
            progress.update(len(part))
            with open(output / "paired.csv", "w", newline="", encoding="utf-8") as table:
                pairs = csv.writer(table, lineterminator="\n")
                pairs.writerow(("settings", "against", "questions", "n", "right", "right_against", "won", "lost", "p"))
                pairs.writerows(paired(right, types))
    for name, of_name in right.items():
        print(f"{name}: {sum(of_name)} of {len(of_name)}")


if __name__ == "__main__":
    typer.run(main)
