"""metrics.csv and predictions.csv."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .answer_text import normalised
from .answers_table import VariantAnswers
from .evaluation_data import EvaluationData
from .metrics import MetricsRow, ratios_of_variants
from .variants import Variant

_PREDICTION_COLUMNS = (
    *("row", "image", "question_type", "question", "answer", "method", "ratio", "seed"),
    *("prediction", "correct", "agrees", "patch_tokens", "newline_tokens"),
)


def write_metrics(path: Path, metrics: Sequence[MetricsRow]) -> None:
    """Writes a line for every method, ratio and type of question."""
    _write(path, MetricsRow._fields, metrics)


def write_predictions(path: Path, data: EvaluationData, plan: Sequence[Variant], table: Sequence[VariantAnswers]) -> None:
    """Writes a line for every answer: rows count from 1, `correct` and `agrees` are 0 or 1, `seed` is that of a random draw."""
    ratios = ratios_of_variants(data, plan, table)

    def lines() -> Iterable[Sequence[Any]]:
        for index, row in enumerate(data.rows):
            for variant, answers in zip(plan, table, strict=True):
                answer = normalised(answers.answers[index])
                yield (
                    *(index + 1, row.image_name, row.question_type, row.question, row.answer),
                    *(variant.method, ratios[variant], "" if variant.seed is None else variant.seed, answers.answers[index]),
                    *(int(answer == normalised(row.answer)), int(answer == normalised(table[0].answers[index]))),
                    *(answers.patches[index], answers.newlines[index]),
                )

    _write(path, _PREDICTION_COLUMNS, lines())


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    def write(unfinished: Path) -> None:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([_shown(value) for value in line] for line in lines)

    write_whole(path, write)


def _shown(value: Any) -> Any:
    """Numbers with as many digits as mean something."""
    return f"{value:.6g}" if isinstance(value, float) else value
