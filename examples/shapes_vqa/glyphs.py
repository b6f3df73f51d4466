"""The characters on signs, capitals, from a picture that travels along: the same pixels whatever fonts are installed.

The faces are Aileron, which Pillow embeds (CC0), and three of DejaVu (`glyphs.LICENSE.txt`).
"""

import functools
from pathlib import Path

from PIL import Image

from .vocabulary import CHARACTERS

ATLAS = Path(__file__).parent / "glyphs.png"
FACES = ("Aileron", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
# A character's square has so many pixels a side.
GLYPH = 48


@functools.cache
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as atlas:
        return atlas.convert("L")


@functools.cache
def glyph(character: str, face: int, height: int) -> Image.Image:
    """The mask of a character as high as told, cut to its ink at both sides."""
    left, top = GLYPH * CHARACTERS.index(character), GLYPH * face
    square = _atlas().crop((left, top, left + GLYPH, top + GLYPH))
    ink_left, _, ink_right, _ = square.getbbox() or (0, 0, GLYPH, GLYPH)
    ink = square.crop((ink_left, 0, ink_right, GLYPH))
    return ink.resize((max(1, round(height * ink.width / GLYPH)), height), Image.Resampling.BOX)
