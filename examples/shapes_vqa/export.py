"""Questions and images as files: python -m examples.shapes_vqa.export FOLDER

The folder is one that `hivtp evaluate --data` takes: images, and a table questions.csv.
"""

import csv
import enum
import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from hivtp_hf.files import staged_folder

from .held_out import held_out_questions, held_out_reading, one_a_scene
from .scenes import draw
from .splits import CALIBRATION, CONFIRMATION, TEST, VALIDATION
from .vocabulary import QUESTION_TYPES

SPLITS = {"test": TEST, "validation": VALIDATION, "calibration": CALIBRATION, "confirmation": CONFIRMATION}
# One of each type.
_MOST_A_SCENE = len(QUESTION_TYPES)
Split = enum.StrEnum("Split", list(SPLITS))


def export(folder: Path, number: int, split: str, one_an_image: bool = False, reading: int = 0) -> None:
    """Writes so many questions of a split, so many more about signs, and the images that they are about.

    Args:
        folder: that is made.
        number: of questions.
        split: by its name.
        one_an_image: whether no two of them are about one image.
        reading: how many more are about what is written on signs, each about an image of its own.

    Raises:
        ValueError: for a folder that exists.
    """
    with staged_folder(folder) as stage:
        (stage / "images").mkdir()
        with (stage / "questions.csv").open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(("image", "question", "answer", "question_type"))
            about_shapes = held_out_questions(number, SPLITS[split])
            if one_an_image:
                about_shapes = itertools.islice(one_a_scene(held_out_questions(_MOST_A_SCENE * number, SPLITS[split])), number)
            asked = [(f"{split}-{one.number}", one) for one in about_shapes]
            asked += [(f"{split}-signs-{one.number}", one) for one in held_out_reading(reading, SPLITS[split])]
            for name, (_, scene, question) in asked:
                image = f"images/{name}.png"
                if not (stage / image).exists():
                    draw(scene).save(stage / image)
                writer.writerow((image, question.text, question.answer, question.type))


def main(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    questions: Annotated[int, typer.Option(min=1)] = 2000,
    split: Split = Split.test,
    one_an_image: Annotated[bool, typer.Option("--one-an-image", help="No two questions are about one image.")] = False,
    reading: Annotated[int, typer.Option(min=0, help="So many more, about what is written on signs.")] = 0,
) -> None:
    """Questions and images as files, for `hivtp evaluate --data`."""
    try:
        export(folder, questions, split.value, one_an_image, reading)
    except ValueError as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    typer.run(main)
