"""Signs: coloured plates with a code of three characters, some of them small, some turned a little."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .glyphs import FACES, glyph
from .vocabulary import CODE_LENGTH, CODES, COLOURS

# Of a character, in pixels; how far from level a plate is turned, in degrees; and how many plates are turned.
SMALLEST, LARGEST = 9, 20
_MOST_TURNED, _SHARE_TURNED = 12.0, 0.5
# Of a character's height: from one character to the next, and the plate's margins.
_ADVANCE, _MARGIN_X, _MARGIN_Y = 0.9, 0.3, 0.3
# Edges are smoothed by drawing so many times larger.
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Sign:
    """One sign; its centre and the height of its characters are in pixels of the image.

    Attributes:
        code: what is written on it.
        colour: of the plate.
        x, y: its centre, whole pixels.
        height: of its characters.
        face: which of `FACES`.
        angle: by how many degrees it is turned, against the clock.
    """

    code: str
    colour: str
    x: int
    y: int
    height: int
    face: int
    angle: float

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the plate before it is turned."""
        return (CODE_LENGTH * _ADVANCE + 2 * _MARGIN_X) * self.height, (1 + 2 * _MARGIN_Y) * self.height

    @property
    def reach(self) -> tuple[float, float]:
        """How far it goes from its centre, across and down, turned as it is."""
        width, height = self.size
        cosine, sine = abs(math.cos(math.radians(self.angle))), abs(math.sin(math.radians(self.angle)))
        return (width * cosine + height * sine) / 2, (width * sine + height * cosine) / 2

    @property
    def character_area(self) -> float:
        """Of the place of a character, in pixels."""
        return _ADVANCE * self.height**2

    def on_plate(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the image lie on the plate: across and down from its centre, in heights of a character."""
        cosine, sine = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        across, down = x - self.x, y - self.y
        return (across * cosine - down * sine) / self.height, (across * sine + down * cosine) / self.height

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which points of the image lie on the plate."""
        across, down = self.on_plate(x, y)
        width, height = (side / self.height for side in self.size)
        return (abs(across) < width / 2) & (abs(down) < height / 2)

    def character_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which character points of the image lie on: its number in the code, -1 for none."""
        across, down = self.on_plate(x, y)
        number = np.floor(across / _ADVANCE + CODE_LENGTH / 2).astype(np.int64)
        return np.where((abs(down) < 0.5) & (number >= 0) & (number < CODE_LENGTH), number, -1)


def random_sign(colour: str, x: int, y: int, height: int, random: np.random.Generator) -> Sign:
    """A sign at a place: any code, any face, turned or not."""
    turned = random.random() < _SHARE_TURNED
    angle = float(random.uniform(-_MOST_TURNED, _MOST_TURNED)) if turned else 0.0
    return Sign(CODES[random.integers(len(CODES))], colour, x, y, height, int(random.integers(len(FACES))), angle)


def paint_sign(image: Image.Image, sign: Sign, random: np.random.Generator) -> None:
    """Paints a sign onto an image; its colour varies a little."""
    colour = tuple(int(np.clip(level + random.normal(0, 10), 0, 255)) for level in COLOURS[sign.colour])
    is_bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 130
    half = math.ceil(max(sign.reach)) + 1
    side = 2 * half * _OVERSAMPLING
    plate, ink = Image.new("L", (side, side)), Image.new("L", (side, side))
    width, height = (round(value * _OVERSAMPLING) for value in sign.size)
    left, top = (side - width) // 2, (side - height) // 2
    plate.paste(255, (left, top, left + width, top + height))
    tall = sign.height * _OVERSAMPLING
    for number, character in enumerate(sign.code):
        mask = glyph(character, sign.face, tall)
        # Wide characters are squeezed, so that none runs into the next.
        most = round(0.8 * _ADVANCE * tall)
        mask = mask if mask.width <= most else mask.resize((most, tall), Image.Resampling.BOX)
        middle = side / 2 + (number - (CODE_LENGTH - 1) / 2) * _ADVANCE * tall
        ink.paste(mask, (round(middle - mask.width / 2), (side - tall) // 2))
    at = sign.x - half, sign.y - half
    for mask, painted in ((plate, colour), (ink, (10, 10, 10) if is_bright else (250, 250, 250))):
        if sign.angle:
            mask = mask.rotate(sign.angle, Image.Resampling.BILINEAR)
        mask = mask.resize((2 * half, 2 * half), Image.Resampling.BOX)
        image.paste(painted, (*at, at[0] + 2 * half, at[1] + 2 * half), mask)
