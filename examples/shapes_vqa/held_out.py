"""The held-out questions, by which the reference model is judged; for `hivtp evaluate`."""

import functools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from hivtp_hf.evaluation import Row

from .questions import Balance
from .scenes import draw, make_scene
from .splits import TEST
from .vocabulary import QUESTION_TYPES

_MOST_OF_A_TYPE = 2


def held_out_rows(number: int) -> Iterator[Row]:
    """So many questions about scenes of the test split, as many of each type as of another: the same ones each time."""
    balance, random, asked = Balance(), np.random.default_rng([TEST]), Counter()
    most, index = math.ceil(number / len(QUESTION_TYPES)), 0
    while sum(asked.values()) < number:
        scene = make_scene((TEST, index))
        for question in balance.choose(scene, _MOST_OF_A_TYPE, random):
            if asked[question.type] < most and sum(asked.values()) < number:
                asked[question.type] += 1
                yield Row(
                    image=functools.partial(draw, scene),
                    image_name=f"test-{index}",
                    question=question.text,
                    answer=question.answer,
                    question_type=question.type,
                )
        index += 1
