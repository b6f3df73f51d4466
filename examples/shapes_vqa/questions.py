"""Questions about a scene, and their balance: without the image, every answer to a question is about as likely as another."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .scenes import Scene, Shape
from .signs import Sign
from .vocabulary import CODES, COLOURS, COUNTS, DIGITS, KINDS, PLACE, READING

# Two shapes lie left and right of each other, or above and below, if their centres are so far apart, in pixels.
_CLEARLY_APART = 24
# By so many questions an answer may be ahead of the rarest one of its form. Without any, rare answers would hold up the rest.
_MOST_AHEAD = 4


class Question(NamedTuple):
    """A question about an image.

    Attributes:
        type: one of `QUESTION_TYPES`, `READING` or `PLACE`.
        text, answer: as the model reads and says them; the answer is one word, or what is written on a sign.
        form: what questions have in common that have the same answers to choose from.
        choices: those answers.
    """

    type: str
    text: str
    answer: str
    form: str
    choices: tuple[str, ...]


def questions_about(scene: Scene) -> list[Question]:
    """All questions that a scene answers, without any balance. Where there are signs, all are about them."""
    if scene.signs:
        return list(_reading(scene))
    return [question for ask in (_colour, _shape, _presence, _count, _relation, _digit, _place) for question in ask(scene)]


def _only(scene: Scene, attribute: str) -> Iterator[Shape]:
    """The shapes that are told from all others by an attribute alone."""
    number = Counter(getattr(shape, attribute) for shape in scene.shapes)
    return (shape for shape in scene.shapes if number[getattr(shape, attribute)] == 1)


def _colour(scene: Scene) -> Iterator[Question]:
    for shape in _only(scene, "kind"):
        yield Question("colour", f"What colour is the {shape.kind}?", shape.colour, "colour", tuple(COLOURS))


def _shape(scene: Scene) -> Iterator[Question]:
    for shape in _only(scene, "colour"):
        yield Question("shape", f"Which shape is {shape.colour}?", shape.kind, "shape", KINDS)


def _presence(scene: Scene) -> Iterator[Question]:
    there = {(shape.colour, shape.kind) for shape in scene.shapes}
    colours, kinds = {colour for colour, _ in there}, {kind for _, kind in there}
    # A pair that is not there is hard to tell where both its parts are, in other shapes, and easy where neither is.
    hard, easy = "presence, hard", "presence, easy"
    for colour in COLOURS:
        for kind in KINDS:
            answer = "yes" if (colour, kind) in there else "no"
            forms = (hard, easy) if answer == "yes" else (hard,) if colour in colours and kind in kinds else (easy,)
            for form in forms:
                yield Question("presence", f"Is there a {colour} {kind}?", answer, form, ("yes", "no"))


def _count(scene: Scene) -> Iterator[Question]:
    yield Question("count", "How many shapes are there?", COUNTS[len(scene.shapes) - 1], "count of all", COUNTS)
    for attribute in ("kind", "colour"):
        for value, number in Counter(getattr(shape, attribute) for shape in scene.shapes).items():
            if number <= 3:
                text = f"How many {value} shapes are there?"
                yield Question("count", text, COUNTS[number - 1], f"count by {attribute}", COUNTS[:3])


def _relation(scene: Scene) -> Iterator[Question]:
    shapes = list(_only(scene, "kind"))
    for first in shapes:
        for second in shapes:
            for axis, (before, behind) in (("x", ("left", "right")), ("y", ("above", "below"))):
                distance = getattr(first, axis) - getattr(second, axis)
                if abs(distance) < _CLEARLY_APART:
                    continue
                words = f"{before} or {behind} of" if axis == "x" else f"{before} or {behind}"
                text = f"Is the {first.kind} {words} the {second.kind}?"
                yield Question("relation", text, before if distance < 0 else behind, f"relation {axis}", (before, behind))


def _digit(scene: Scene) -> Iterator[Question]:
    for shape in _only(scene, "kind"):
        if shape.digit is not None:
            yield Question("digit", f"Which digit is on the {shape.kind}?", shape.digit, "digit", DIGITS)


def _reading(scene: Scene) -> Iterator[Question]:
    for name, sign in _named_signs(scene.signs):
        yield Question(READING, f"What is written on the {name} sign?", sign.code, READING, CODES)


def _named_signs(signs: Sequence[Sign]) -> Iterator[tuple[str, Sign]]:
    """Signs by their colour, and by their place where one is clearly outermost of several."""
    colours = Counter(sign.colour for sign in signs)
    yield from ((sign.colour, sign) for sign in signs if colours[sign.colour] == 1)
    if len(signs) == 1:
        return
    for axis, (before, behind) in (("x", ("left", "right")), ("y", ("top", "bottom"))):
        along = sorted(signs, key=lambda sign: getattr(sign, axis))
        for name, (outermost, next_one) in ((before, along[:2]), (behind, along[:-3:-1])):
            if abs(getattr(outermost, axis) - getattr(next_one, axis)) >= _CLEARLY_APART:
                yield name, outermost


def _place(scene: Scene) -> Iterator[Question]:
    for shape in _only(scene, "kind"):
        for axis, middle, (before, behind) in (
            ("x", scene.width / 2, ("left", "right")),
            ("y", scene.height / 2, ("above", "below")),
        ):
            distance = getattr(shape, axis) - middle
            if abs(distance) >= _CLEARLY_APART / 2:
                answer = before if distance < 0 else behind
                yield Question(PLACE, f"Is the {shape.kind} {before} or {behind}?", answer, f"place {axis}", (before, behind))


class Balance:
    """Chooses questions so that types, and within each form the answers, stay equally frequent.

    It remembers what was chosen, so the same scenes in the same order give the same questions.
    """

    def __init__(self) -> None:
        self._answers: dict[str, Counter[str]] = {}

    def choose(self, scene: Scene, most: Mapping[str, int], random: np.random.Generator) -> list[Question]:
        """Questions about a scene: of each type that is named at most so many."""
        asked = questions_about(scene)
        chosen: list[Question] = []
        for question_type, number in most.items():
            of_type = [question for question in asked if question.type == question_type]
            of_type = [of_type[index] for index in random.permutation(len(of_type))]
            taken: list[Question] = []
            for question in of_type:
                given = self._answers.setdefault(question.form, Counter())
                rarest = min(given[answer] for answer in question.choices)
                if len(taken) < number and given[question.answer] <= rarest + _MOST_AHEAD:
                    given[question.answer] += 1
                    taken.append(question)
            chosen += taken
        return chosen
