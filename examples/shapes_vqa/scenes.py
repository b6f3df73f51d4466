"""Scenes: shapes and signs that do not overlap, at sizes that make every pinpoint shape and un-padding occur."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .backgrounds import background
from .signs import LARGEST, SMALLEST, Sign, paint_sign, random_sign
from .vocabulary import COLOURS, DIGITS, KINDS

TILE = 96
# Crops (rows, columns) and how often scenes have about their proportions.
_PROPORTIONS = {(2, 2): 0.5, (1, 2): 0.2, (2, 1): 0.2, (1, 3): 0.05, (3, 1): 0.05}
_LEAST_RADIUS, _LARGEST_RADIUS = 13, 20
# Edges are smoothed by drawing so many times larger.
_OVERSAMPLING = 4
# The seeds of scenes with signs end with it, so that those of scenes without stay what they were.
_WITH_SIGNS = 29
_MOST_SIGNS = 4


@dataclass(frozen=True)
class Shape:
    """One coloured shape; its centre and the radius of the circle around it are in pixels of the image."""

    kind: str
    colour: str
    digit: str | None
    x: float
    y: float
    radius: float

    @property
    def digit_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of its digit."""
        half_height = 0.62 * self.radius
        return self.x - 0.7 * half_height, self.y - half_height, self.x + 0.7 * half_height, self.y + half_height


@dataclass(frozen=True)
class Scene:
    """What an image shows; `draw` makes the image."""

    height: int
    width: int
    shapes: tuple[Shape, ...]
    seed: tuple[int, ...]
    signs: tuple[Sign, ...] = ()


def make_scene(seed: Sequence[int]) -> Scene:
    """A scene of one to five shapes, all of it decided by the seed."""
    random = np.random.default_rng(list(seed))
    height, width = _image_size(random)
    number = int(random.integers(1, 6))
    # Some scenes have few kinds and colours, so that counts above one occur.
    kinds = random.permutation(KINDS)[: random.choice((2, 4, 5))].tolist()
    colours = random.permutation(list(COLOURS))[: random.choice((2, 5, 6))].tolist()
    return Scene(height, width, _placed(height, width, number, kinds, colours, 0.6, random), tuple(seed))


def make_practice_scene(seed: Sequence[int]) -> Scene:
    """A scene as full of shapes with digits as it gets: of the same number of pixels there is more to learn."""
    random = np.random.default_rng(list(seed))
    height, width = _image_size(random)
    shapes = _placed(height, width, 40, KINDS, list(COLOURS), 0.85, random, most_tries=120)
    return Scene(height, width, shapes, tuple(seed))


def make_sign_scene(seed: Sequence[int]) -> Scene:
    """A scene of one to four signs of different colours, and up to two shapes; all of it decided by the seed."""
    random = np.random.default_rng([*seed, _WITH_SIGNS])
    height, width = _image_size(random)
    colours = random.permutation(list(COLOURS)).tolist()
    signs = _placed_signs(height, width, int(random.integers(1, _MOST_SIGNS + 1)), colours, random)
    number = int(random.integers(0, 3))
    shapes = [
        shape
        for shape in _placed(height, width, number, KINDS, list(COLOURS), 0.6, random)
        if not any(_touches(sign, shape.x, shape.y, shape.radius, shape.radius) for sign in signs)
    ]
    return Scene(height, width, tuple(shapes), (*seed, _WITH_SIGNS), signs)


def make_sign_practice_scene(seed: Sequence[int]) -> Scene:
    """A scene as full of signs as it gets: of the same number of pixels there is more to learn."""
    random = np.random.default_rng([*seed, _WITH_SIGNS])
    height, width = _image_size(random)
    colours = [str(random.choice(list(COLOURS))) for _ in range(40)]
    return Scene(height, width, (), (*seed, _WITH_SIGNS), _placed_signs(height, width, 40, colours, random, most_tries=120))


def _placed_signs(
    height: int, width: int, number: int, colours: Sequence[str], random: np.random.Generator, most_tries: int = 200
) -> tuple[Sign, ...]:
    """Up to so many signs that do not overlap, each of the next colour; at least one."""
    signs: list[Sign] = []
    for attempt in range(most_tries):
        if len(signs) == number:
            break
        # Smaller as it becomes hard to find room.
        largest = LARGEST - round((LARGEST - SMALLEST) * attempt / most_tries)
        x, y = int(random.integers(0, width)), int(random.integers(0, height))
        sign = random_sign(colours[len(signs)], x, y, int(random.integers(SMALLEST, largest + 1)), random)
        across, down = (value + 1 for value in sign.reach)
        is_inside = across <= x <= width - across and down <= y <= height - down
        if is_inside and not any(_touches(other, x, y, across, down) for other in signs):
            signs.append(sign)
    return tuple(signs)


def _touches(sign: Sign, x: float, y: float, across: float, down: float) -> bool:
    """Whether a box around a point comes within two pixels of a sign's."""
    sign_across, sign_down = sign.reach
    return abs(sign.x - x) < sign_across + across + 2 and abs(sign.y - y) < sign_down + down + 2


def _image_size(random: np.random.Generator) -> tuple[int, int]:
    """Height and width near those of a pinpoint, so that images are scaled little and padded a bit."""
    rows, columns = list(_PROPORTIONS)[random.choice(len(_PROPORTIONS), p=list(_PROPORTIONS.values()))]
    scale = random.uniform(0.9, 1.15)
    stretch = random.uniform(0.88, 1.0)
    height, width = rows * TILE * scale, columns * TILE * scale
    if random.random() < 0.5:
        height *= stretch
    else:
        width *= stretch
    return round(height), round(width)


def _placed(
    height: int,
    width: int,
    number: int,
    kinds: Sequence[str],
    colours: Sequence[str],
    digit_share: float,
    random: np.random.Generator,
    most_tries: int = 400,
) -> tuple[Shape, ...]:
    """Up to so many shapes at random places where none is yet; as many as asked for unless tries run out."""
    shapes: list[Shape] = []
    for attempt in range(most_tries):
        if len(shapes) == number:
            break
        # Smaller as it becomes hard to find room.
        largest = _LARGEST_RADIUS - (_LARGEST_RADIUS - _LEAST_RADIUS) * attempt / most_tries
        radius = random.uniform(_LEAST_RADIUS, largest)
        x, y = random.uniform(radius + 1, width - radius - 1), random.uniform(radius + 1, height - radius - 1)
        if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + 2 for other in shapes):
            kind, colour = str(random.choice(kinds)), str(random.choice(colours))
            digit = str(random.choice(DIGITS)) if random.random() < digit_share else None
            shapes.append(Shape(kind, colour, digit, x, y, radius))
    return tuple(shapes)


def draw(scene: Scene) -> Image.Image:
    """The image of a scene: the same pixels for the same scene."""
    random = np.random.default_rng([*scene.seed, 1])
    image = Image.fromarray(background(scene.height, scene.width, random))
    for shape in scene.shapes:
        colour = tuple(int(np.clip(level + random.normal(0, 10), 0, 255)) for level in COLOURS[shape.colour])
        _paint(image, _outline(shape.kind), shape, colour)
        if shape.digit is not None:
            is_bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 130
            _paint_digit(image, shape, (10, 10, 10) if is_bright else (250, 250, 250))
    for sign in scene.signs:
        paint_sign(image, sign, random)
    return image


@functools.cache
def _outline(kind: str) -> tuple[tuple[float, float], ...]:
    """Corners of a kind of shape around (0, 0), within a radius of 1; areas are alike. Empty for a circle."""
    if kind == "circle":
        return ()
    if kind == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if kind == "triangle":
        return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
    if kind == "star":
        corners = [(1.1 if i % 2 == 0 else 0.5, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
        return tuple((r * math.cos(angle), r * math.sin(angle)) for r, angle in corners)
    arm = 0.36
    return tuple(
        (x, y)
        for x, y in (
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        )
    )


def _paint(image: Image.Image, outline: Sequence[tuple[float, float]], shape: Shape, colour: tuple[int, ...]) -> None:
    left, top = math.floor(shape.x - 1.2 * shape.radius), math.floor(shape.y - 1.2 * shape.radius)
    side = math.ceil(2.4 * shape.radius) + 2
    mask = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
    x, y, radius = ((value * _OVERSAMPLING) for value in (shape.x - left, shape.y - top, shape.radius))
    pen = ImageDraw.Draw(mask)
    if outline:
        pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in outline], fill=255)
    else:
        pen.ellipse((x - 0.9 * radius, y - 0.9 * radius, x + 0.9 * radius, y + 0.9 * radius), fill=255)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    image.paste(colour, (left, top, left + side, top + side), mask)


@functools.cache
def _digit_mask(digit: str, width: int, height: int) -> Image.Image:
    """A digit that fills a box of so many pixels."""
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = font.getbbox(digit, stroke_width=4)
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), digit, fill=255, font=font, stroke_width=4)
    return mask.resize((width, height), Image.Resampling.BOX)


def _paint_digit(image: Image.Image, shape: Shape, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = shape.digit_box
    width, height = round(right - left), round(bottom - top)
    # A "1" is as tall as the others and narrower.
    width = max(3, round(0.6 * width)) if shape.digit == "1" else width
    at = round(shape.x - width / 2), round(top)
    image.paste(colour, (*at, at[0] + width, at[1] + height), _digit_mask(shape.digit or "", width, height))
