"""Questions and images as files: python -m examples.shapes_vqa.export FOLDER

The folder is one that `hivtp evaluate --data` takes: images, and a table questions.csv.
"""

import argparse
import csv
from pathlib import Path

from hivtp_hf.files import staged_folder

from .held_out import held_out_questions
from .scenes import draw
from .splits import CALIBRATION, TEST, VALIDATION

SPLITS = {"test": TEST, "validation": VALIDATION, "calibration": CALIBRATION}


def export(folder: Path, number: int, split: str) -> None:
    """Writes so many questions of a split, and the images that they are about.

    Raises:
        ValueError: for a folder that exists.
    """
    with staged_folder(folder) as stage:
        (stage / "images").mkdir()
        with (stage / "questions.csv").open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(("image", "question", "answer", "question_type"))
            for index, scene, question in held_out_questions(number, SPLITS[split]):
                image = f"images/{split}-{index}.png"
                if not (stage / image).exists():
                    draw(scene).save(stage / image)
                writer.writerow((image, question.text, question.answer, question.type))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--questions", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(%(default)s)")
    options = parser.parse_args()
    if options.questions < 1:
        parser.error(f"--questions is {options.questions}; it must be 1 or more.")
    try:
        export(options.folder, options.questions, options.split)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
