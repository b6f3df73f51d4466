"""What a run found: the answers under every variant, accuracy by method, ratio and type of question, and both as tables."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..files import atomic_write
from .data import ALL, EvaluationData, ImageGroup, normalised
from .variants import Variant

_Z = statistics.NormalDist().inv_cdf((1 + 0.95) / 2)
_PREDICTION_COLUMNS = (
    *("row", "image", "question_type", "question", "answer", "method", "ratio", "seed"),
    *("prediction", "correct", "agrees", "patch_tokens", "newline_tokens", "weights_and_positions", "tokens_per_layer"),
    "asked_ratio",
)


class VariantAnswers(NamedTuple):
    """What came out under one variant.

    Attributes:
        answers: of every row, as the model wrote it.
        patches, newlines: tokens of every row's image that entered the language model.
        tokens_per_layer: of every row's image what a layer of the language model sees, the mean of all layers.
        prefill_seconds: of every batch, per question.
    """

    answers: list[str]
    patches: list[int]
    newlines: list[int]
    tokens_per_layer: list[float]
    prefill_seconds: list[float]


def answers_of_variants(
    plan: Sequence[Variant], parts: Sequence[Sequence[ImageGroup]], results: Mapping[int, Any]
) -> list[VariantAnswers]:
    """The answers under every variant, in the order of the plan and of the rows.

    Args:
        plan: the variants.
        parts: of the data.
        results: of every part, by its number, what `PartWork.results` returned.
    """
    rows = sum(len(group.rows) for part in parts for group in part)
    table = []
    for number in range(len(plan)):
        whole = VariantAnswers([""] * rows, [0] * rows, [0] * rows, [0.0] * rows, [])
        for index, part in enumerate(parts):
            of_part = results[index][number]
            answers = iter(of_part["answers"])
            counts = (of_part[name] for name in ("patches", "newlines", "tokens_per_layer"))
            for group, patches, newlines, per_layer in zip(part, *counts, strict=True):
                for row in group.rows:
                    whole.answers[row], whole.patches[row], whole.newlines[row] = next(answers), patches, newlines
                    whole.tokens_per_layer[row] = per_layer
            whole.prefill_seconds.extend(of_part["prefill_seconds"])
        table.append(whole)
    return table


class MetricsRow(NamedTuple):
    """One method at one ratio, on the questions of one type.

    Attributes:
        method: "none" is the unpruned model.
        ratio: the share of patch tokens that was asked for; for "base-only", "downsample" and what is pruned after it the share
            that was really used, of all images together.
        question_type: "all" for all questions.
        n: answers: as many as questions, and three times as many for "random", whose seeds are pooled. Answers to one question
            are not independent, so that its interval is rather too narrow.
        correct: of them right.
        accuracy: their share.
        ci_low, ci_high: Wilson's 95 % interval for it.
        patch_tokens, newline_tokens: that entered the language model of a question's image, on average over the answers. A
            class token, which LLaVA-1.5 may keep, is neither.
        agreement: the share of answers that are the unpruned model's to the same question.
        prefill_ms: milliseconds of the language model's layers on the whole prompt, per question: the median over batches.
        weights_and_positions: which of the two the language model was told of: "published" (neither), "weights", "positions" or
            "both".
        tokens_per_layer: of a question's image that a layer of the language model sees, on average over layers and answers. A
            class token and newlines are among them. Without `stages` it is what entered.
    """

    method: str
    ratio: float
    question_type: str
    n: int
    correct: int
    accuracy: float
    ci_low: float
    ci_high: float
    patch_tokens: float
    newline_tokens: float
    agreement: float
    prefill_ms: float
    weights_and_positions: str
    tokens_per_layer: float


def metrics_rows(data: EvaluationData, plan: Sequence[Variant], table: Sequence[VariantAnswers]) -> list[MetricsRow]:
    """The metrics of a run, in the order of the plan; of each method and ratio all questions first, then every type.

    Args:
        data: that was asked.
        plan: the variants, of which the first is the unpruned model.
        table: the answers under each of them.
    """
    right = [normalised(row.answer) for row in data.rows]
    unpruned = [normalised(answer) for answer in table[0].answers]
    ratios = ratios_of_variants(data, plan, table)
    pooled: dict[tuple[str, Fraction | None, str], list[int]] = {}
    for number, variant in enumerate(plan):
        pooled.setdefault(variant.group, []).append(number)

    metrics = []
    for (method, _, weights_and_positions), members in pooled.items():
        prefill = statistics.median(seconds for number in members for seconds in table[number].prefill_seconds)
        for question_type in (ALL, *data.question_types):
            rows = [index for index, row in enumerate(data.rows) if question_type in (ALL, row.question_type)]
            answers = [(normalised(table[number].answers[row]), row) for number in members for row in rows]
            correct = sum(answer == right[row] for answer, row in answers)
            low, high = wilson_interval(correct, len(answers))
            metrics.append(
                MetricsRow(
                    method,
                    ratios[plan[members[0]]],
                    question_type,
                    len(answers),
                    correct,
                    correct / len(answers),
                    low,
                    high,
                    statistics.fmean(table[number].patches[row] for number in members for row in rows),
                    statistics.fmean(table[number].newlines[row] for number in members for row in rows),
                    sum(answer == unpruned[row] for answer, row in answers) / len(answers),
                    1000 * prefill,
                    weights_and_positions,
                    statistics.fmean(table[number].tokens_per_layer[row] for number in members for row in rows),
                )
            )
    return metrics


def ratios_of_variants(
    data: EvaluationData, plan: Sequence[Variant], table: Sequence[VariantAnswers]
) -> Mapping[Variant, float]:
    """The ratio that results name for every variant: the one asked for, or the share of patch tokens that was used."""
    first_rows = {row.image_name: index for index, row in reversed(list(enumerate(data.rows)))}.values()

    def patches(answers: VariantAnswers) -> int:
        return sum(answers.patches[row] for row in first_rows)

    return {
        variant: patches(answers) / patches(table[0]) if variant.ratio_is_measured else float(variant.ratio or 1)
        for variant, answers in zip(plan, table, strict=True)
    }


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Both ends of Wilson's 95 % interval for a share, of `correct` among `n`; ValueError unless 0 <= correct <= n > 0.

    It holds all shares p for which the observed one lies within z standard errors sqrt(p (1 - p) / n).
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
    Statistical Association 22 (1927), 209-212; recommended for small and large samples by Brown, Cai and DasGupta, Interval
    estimation for a binomial proportion, Statistical Science 16 (2001), 101-133.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no share; give a number of trials above 0 and of successes from 0 up to it.")
    share = correct / n
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At both extremes the formula gives 0 and 1 but for rounding.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


def write_metrics(path: Path, metrics: Sequence[MetricsRow]) -> None:
    """Writes a line for every method, ratio, choice of weights and positions, and type of question."""
    _write(path, MetricsRow._fields, metrics)


def write_predictions(path: Path, data: EvaluationData, plan: Sequence[Variant], table: Sequence[VariantAnswers]) -> None:
    """Writes a line for every answer.

    Rows count from 1, `correct` and `agrees` are 0 or 1, `seed` is that of a random draw. `asked_ratio` is empty where none was
    asked for, and else the one that methods have in common whose `ratio` is measured.
    """
    ratios = ratios_of_variants(data, plan, table)

    def lines() -> Iterable[Sequence[Any]]:
        for index, row in enumerate(data.rows):
            for variant, answers in zip(plan, table, strict=True):
                answer = normalised(answers.answers[index])
                yield (
                    *(index + 1, row.image_name, row.question_type, row.question, row.answer),
                    *(variant.method, ratios[variant], "" if variant.seed is None else variant.seed, answers.answers[index]),
                    *(int(answer == normalised(row.answer)), int(answer == normalised(table[0].answers[index]))),
                    *(answers.patches[index], answers.newlines[index], variant.weights_and_positions),
                    *(answers.tokens_per_layer[index], "" if variant.ratio is None else float(variant.ratio)),
                )

    _write(path, _PREDICTION_COLUMNS, lines())


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    def write(unfinished: Path) -> None:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(_ShortLineEnds(file))
            writer.writerow(columns)
            writer.writerows([_shown(value) for value in line] for line in lines)

    atomic_write(path, write)


class _ShortLineEnds:
    r"""Lines ending in \n alone, written as if in \r\n: csv would otherwise leave an answer's \r without quotes."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def _shown(value: Any) -> Any:
    """Numbers with as many digits as mean something."""
    return f"{value:.6g}" if isinstance(value, float) else value
