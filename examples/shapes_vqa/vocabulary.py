"""The words of the task: what shapes can be, what signs say, and what answers there are."""

import itertools

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (245, 215, 50),
    "purple": (150, 50, 185),
    "cyan": (70, 210, 220),
}
KINDS = ("circle", "square", "triangle", "star", "cross")
# Not all ten: these look least alike at the size of a shape.
DIGITS = ("0", "1", "2", "4", "5", "7")
COUNTS = ("one", "two", "three", "four", "five")
QUESTION_TYPES = ("colour", "shape", "presence", "count", "relation", "digit")
# Asked in training alone: where a shape lies, as a step towards relations.
PLACE = "place"

# Asked about scenes with signs, which are scenes of their own.
READING = "reading"
# Those that look least alike when they are small. "a" is a word of questions.
LETTERS = ("c", "e", "h", "j", "k", "l", "p", "t", "u", "x")
CHARACTERS = (*DIGITS, *LETTERS)
CODE_LENGTH = 3
# A letter and a digit at least, so that no code is a word or a number.
CODES = tuple(
    "".join(code)
    for code in itertools.product(CHARACTERS, repeat=CODE_LENGTH)
    if not set(code) <= set(DIGITS) and not set(code) <= set(LETTERS)
)
