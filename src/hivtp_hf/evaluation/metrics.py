"""Accuracy by method, ratio and type of question: the rows of metrics.csv."""

import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from .answer_text import normalised
from .answers_table import VariantAnswers
from .evaluation_data import ALL, EvaluationData
from .variants import Variant
from .wilson import wilson_interval


class MetricsRow(NamedTuple):
    """One method at one ratio, on the questions of one type.

    Attributes:
        method: "none" is the unpruned model.
        ratio: the share of patch tokens that was asked for; for "base-only" and "downsample" the share that was really used, of
            all images together.
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
    pooled: dict[tuple[str, Fraction | None], list[int]] = {}
    for number, variant in enumerate(plan):
        pooled.setdefault(variant.group, []).append(number)

    metrics = []
    for (method, _), members in pooled.items():
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
