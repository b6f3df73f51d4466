"""`VariantAnswers`: all answers under one variant, put together from the parts of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .image_groups import ImageGroup
from .variants import Variant


class VariantAnswers(NamedTuple):
    """What came out under one variant.

    Attributes:
        answers: of every row, as the model wrote it.
        patches, newlines: tokens of every row's image that entered the language model.
        prefill_seconds: of every batch, per question.
    """

    answers: list[str]
    patches: list[int]
    newlines: list[int]
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
        whole = VariantAnswers([""] * rows, [0] * rows, [0] * rows, [])
        for index, part in enumerate(parts):
            of_part = results[index][number]
            answers = iter(of_part["answers"])
            for group, patches, newlines in zip(part, of_part["patches"], of_part["newlines"], strict=True):
                for row in group.rows:
                    whole.answers[row], whole.patches[row], whole.newlines[row] = next(answers), patches, newlines
            whole.prefill_seconds.extend(of_part["prefill_seconds"])
        table.append(whole)
    return table
