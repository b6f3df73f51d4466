"""Draws the characters of signs anew: python -m research.shapes_vqa.glyph_atlas

It writes examples/shapes_vqa/glyphs.png from the font that Pillow embeds and those that matplotlib ships, whose rasters differ
between releases. So the picture is committed, and scenes are drawn from it.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.shapes_vqa.glyphs import ATLAS, FACES, GLYPH
from examples.shapes_vqa.vocabulary import CHARACTERS
from hivtp_hf.files import atomic_write


def draw_atlas(fonts: Path) -> Image.Image:
    """A row a face, a column a character; each fills the height of its square and stands in the middle.

    Args:
        fonts: the folder of matplotlib's font files.
    """
    faces = {
        name: ImageFont.load_default(size=400) if name == "Aileron" else ImageFont.truetype(fonts / f"{name}.ttf", 400)
        for name in FACES
    }
    atlas = Image.new("L", (GLYPH * len(CHARACTERS), GLYPH * len(FACES)))
    for row, font in enumerate(faces.values()):
        for column, character in enumerate(CHARACTERS):
            written = character.upper()
            left, top, right, bottom = font.getbbox(written)
            ink = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(ink).text((-left, -top), written, fill=255, font=font)
            ink = ink.crop(ink.getbbox())
            width = min(GLYPH, round(GLYPH * ink.width / ink.height))
            ink = ink.resize((width, GLYPH), Image.Resampling.BOX)
            atlas.paste(ink, (column * GLYPH + (GLYPH - width) // 2, row * GLYPH))
    # Signs are drawn smaller than this, so that edges come out smooth from black and white as well.
    return atlas.point(lambda level: 255 * (level >= 128)).convert("1", dither=Image.Dither.NONE)


def main() -> None:
    import matplotlib

    atlas = draw_atlas(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    atomic_write(ATLAS, lambda unfinished: atlas.save(unfinished, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
