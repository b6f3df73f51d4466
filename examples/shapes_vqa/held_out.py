"""The held-out questions, by which the reference model is judged; for `hivtp evaluate`."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hivtp_hf.evaluation import Row

from .questions import Balance, Question
from .scenes import Scene, draw, make_scene, make_sign_scene
from .splits import TEST
from .vocabulary import QUESTION_TYPES, READING

# One question of a type about an image, so that an interval rests on as many images as it counts questions.
_MOST = dict.fromkeys(QUESTION_TYPES, 1)


class HeldOut(NamedTuple):
    """A held-out question, and the number and scene of its image."""

    number: int
    scene: Scene
    question: Question


def held_out_questions(number: int, split: int = TEST) -> Iterator[HeldOut]:
    """So many questions about scenes of a split, as many of each type as of another: the same ones each time."""
    balance, random, asked = Balance(), np.random.default_rng([split]), Counter[str]()
    most, index = math.ceil(number / len(QUESTION_TYPES)), 0
    while sum(asked.values()) < number:
        scene = make_scene((split, index))
        for question in balance.choose(scene, _MOST, random):
            if asked[question.type] < most and sum(asked.values()) < number:
                asked[question.type] += 1
                yield HeldOut(index, scene, question)
        index += 1


def one_a_scene(asked: Iterable[HeldOut]) -> Iterator[HeldOut]:
    """Of every scene one question, of the next type in the alphabet after that of the scene before where it has one."""
    last = ""
    for _, of_scene in itertools.groupby(asked, lambda one: one.number):
        first, *others = of_scene
        chosen = min((one for one in (first, *others) if one.question.type > last), key=_type_of, default=first)
        last = chosen.question.type
        yield chosen


def _type_of(asked: HeldOut) -> str:
    return asked.question.type


def held_out_reading(number: int, split: int = TEST) -> Iterator[HeldOut]:
    """So many questions for what is written on signs, one about an image: the same ones each time."""
    balance, random, asked, index = Balance(), np.random.default_rng([split]), 0, 0
    while asked < number:
        scene = make_sign_scene((split, index))
        for question in balance.choose(scene, {READING: 1}, random):
            asked += 1
            yield HeldOut(index, scene, question)
        index += 1


def held_out_rows(number: int) -> Iterator[Row]:
    """The same questions as rows; images are drawn when they are asked for."""
    for index, scene, question in held_out_questions(number):
        yield Row(
            image=functools.partial(draw, scene),
            image_name=f"test-{index}",
            question=question.text,
            answer=question.answer,
            question_type=question.type,
        )
