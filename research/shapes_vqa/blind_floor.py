"""What can be answered without looking: python -m research.shapes_vqa.blind_floor

The guess is the answer that was right most often for the same words, in questions of the training split. It is what a model
that is blind to the image can learn at best, and the floor under every accuracy.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from examples.shapes_vqa.held_out import held_out_questions, held_out_reading
from examples.shapes_vqa.questions import Balance, Question
from examples.shapes_vqa.scenes import make_scene, make_sign_scene
from examples.shapes_vqa.splits import TRAINING
from examples.shapes_vqa.vocabulary import QUESTION_TYPES, READING
from hivtp_hf.evaluation.metrics import wilson_interval

HELD_OUT, HELD_OUT_READING = 2000, 334
_TRAINING_SCENES = 6000
_MOST = dict.fromkeys(QUESTION_TYPES, 2)
_MOST_READING = {READING: 8}


class FloorRow(NamedTuple):
    """Of a question type, or of "all": how many questions there are, how many blind guesses are right, and chance."""

    question_type: str
    n: int
    correct: int
    chance: float


def blind_floor(known: Iterable[Question], asked: Iterable[Question]) -> list[FloorRow]:
    """A row for all questions and one for each type.

    Args:
        known: questions whose answers are learnt, without their images.
        asked: questions to guess; one that was never met counts as wrong.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        answers[question.text][question.answer] += 1
    n, right, chance = Counter[str](), Counter[str](), defaultdict[str, float](float)
    for question in asked:
        guesses = answers[question.text].most_common(1)
        for kind in ("all", question.type):
            n[kind] += 1
            right[kind] += bool(guesses) and guesses[0][0] == question.answer
            chance[kind] += 1 / len(question.choices)
    return [
        FloorRow(kind, n[kind], right[kind], chance[kind] / n[kind]) for kind in ("all", *QUESTION_TYPES, READING) if n[kind]
    ]


def training_questions(scenes: int) -> Iterable[Question]:
    """Questions about the first scenes of the training split, balanced as those that are trained on."""
    balance, random = Balance(), np.random.default_rng([TRAINING])
    for index in range(scenes):
        yield from balance.choose(make_scene((TRAINING, index)), _MOST, random)


def training_reading(scenes: int) -> Iterable[Question]:
    """Questions about the first scenes with signs of the training split."""
    balance, random = Balance(), np.random.default_rng([TRAINING])
    for index in range(scenes):
        yield from balance.choose(make_sign_scene((TRAINING, index)), _MOST_READING, random)


def main() -> None:
    rows = blind_floor(training_questions(_TRAINING_SCENES), (asked.question for asked in held_out_questions(HELD_OUT)))
    # Signs are in scenes of their own, so that the rows above stay what they were; "all" counts them out.
    reading = (asked.question for asked in held_out_reading(HELD_OUT_READING))
    rows += blind_floor(training_reading(_TRAINING_SCENES), reading)[1:]
    print("| questions | n | blind guess, 95 % interval | chance |\n|---|---|---|---|")
    for row in rows:
        low, high = wilson_interval(row.correct, row.n)
        share = f"{row.correct / row.n:.1%} ({low:.1%} to {high:.1%})"
        print(f"| {row.question_type} | {row.n} | {share} | {row.chance:.1%} |")


if __name__ == "__main__":
    main()
