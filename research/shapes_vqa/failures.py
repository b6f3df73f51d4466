"""Overlays of what a run got wrong: python -m research.shapes_vqa.failures RUN FOLDER

For each type of question the first ones that the unpruned model answers right and a method does not, drawn with what every
method keeps and says.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from examples.shapes_vqa.scenes import draw
from hivtp_hf.figures import draw_comparison

from .recorded_runs import UNPRUNED, Chosen, RecordedRun, kept_of_scenes


def failed_questions(run: RecordedRun, chosen: Chosen, most: int) -> Iterator[int]:
    """Indices of the first questions, so many of each type, that a method gets wrong and the unpruned model does not."""
    met = Counter[str]()
    for index, (asked, answers) in enumerate(zip(run.asked, run.answers, strict=True)):
        if answers[Chosen(UNPRUNED, 1.0)].correct and not answers[chosen].correct and met[asked.question.type] < most:
            met[asked.question.type] += 1
            yield index


def draw_failures(run: RecordedRun, folder: Path, chosen: Chosen, most: int) -> None:
    """Draws the failures of a method at a ratio, a file each, and prints what was asked and said."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {other: pruning for other, pruning in run.settings.items() if other.ratio == chosen.ratio}
    failed = list(failed_questions(run, chosen, most))
    kept = dict(kept_of_scenes({run.asked[index].number: run.asked[index].scene for index in failed}, settings))
    for index in failed:
        asked, answers = run.asked[index], run.answers[index]
        columns = {f"{other.method}: {answers[other].prediction}": [shown] for other, shown in kept[asked.number].items()}
        path = folder / f"{chosen.method}_{asked.question.type}_{index + 1}.png"
        draw_comparison(draw(asked.scene), [f"{chosen.ratio:.0%}"], columns).save(path)
        print(f"{path}: {asked.question.text} {asked.question.answer}, not {answers[chosen].prediction}")


def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run of `hivtp evaluate` on the project's own questions.")],
    folder: Annotated[Path, typer.Argument(help="Where pictures go.")],
    method: str = "hivtp",
    ratio: Annotated[float, typer.Option(help="One of the run's.")] = 2 / 9,
    number: Annotated[int, typer.Option(min=1, help="So many of each type.")] = 2,
) -> None:
    """Overlays of what a run got wrong."""
    try:
        recorded = RecordedRun(run)
    except ValueError as error:
        sys.exit(f"failures: {error}")
    near = [chosen for chosen in recorded.settings if abs(chosen.ratio - ratio) < 1e-3 and chosen.method == method]
    if not near:
        known = ", ".join(f"{chosen.method} at {chosen.ratio:.4g}" for chosen in recorded.settings)
        sys.exit(f"failures: the run has no {method!r} at {ratio:.4g}; it has {known}.")
    draw_failures(recorded, folder, near[0], number)


if __name__ == "__main__":
    typer.run(main)
