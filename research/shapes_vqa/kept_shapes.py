"""How much of the shapes methods keep, beside how a run counts them: python -m research.shapes_vqa.kept_shapes RUN"""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from examples.shapes_vqa.vocabulary import COUNTS

from .dense_targets import dense_targets
from .llava_next_model import LlavaNextReference
from .recorded_runs import UNPRUNED, Chosen, RecordedRun, kept_of_scenes

# What the run's model is without pruning.
_STOCK = LlavaNextReference()


class KeptShapes(NamedTuple):
    """What a method at a ratio keeps of the shapes in some scenes.

    Attributes:
        lost: the share of shapes of which no cell is kept.
        kept_of_shape: the share of shapes' cells that is kept.
        on_shapes: the share of kept cells that show a shape.
    """

    lost: float
    kept_of_shape: float
    on_shapes: float


def kept_shapes(run: RecordedRun, number: int) -> dict[Chosen, KeptShapes]:
    """What the methods of a run keep of the shapes in so many of its scenes, the first ones."""
    scenes = dict(itertools.islice(run.scenes.items(), number))
    met, on_shapes, every = Counter[Chosen](), Counter[Chosen](), Counter[Chosen]()
    shapes = cells = 0
    for index, kept in kept_of_scenes(scenes, run.settings):
        scene = scenes[index]
        targets = dense_targets(scene, _STOCK.layout_of(None, scene.height, scene.width))
        shapes += len(scenes[index].shapes)
        cells += int((targets.shape >= 0).sum())
        for chosen, (_, indices) in kept.items():
            kept_shape = targets.shape[torch.isin(targets.positions, indices)]
            on_shape = kept_shape[kept_shape >= 0]
            met[chosen] += len(on_shape.unique())
            on_shapes[chosen] += len(on_shape)
            every[chosen] += len(kept_shape)
    return {
        chosen: KeptShapes(1 - met[chosen] / shapes, on_shapes[chosen] / cells, on_shapes[chosen] / every[chosen])
        for chosen in run.settings
    }


class CountErrors(NamedTuple):
    """Of the counts that the unpruned model gets right, the shares that come out too low and too high."""

    too_low: float
    too_high: float


def count_errors(run: RecordedRun) -> dict[Chosen, CountErrors]:
    """How every method of a run miscounts; words that are no number are neither."""
    errors: dict[Chosen, list[int]] = {chosen: [] for chosen in run.settings}
    for asked, answers in zip(run.asked, run.answers, strict=True):
        if asked.question.type != "count" or not answers[Chosen(UNPRUNED, 1.0)].correct:
            continue
        right = COUNTS.index(asked.question.answer)
        for chosen, of_method in errors.items():
            said = answers[chosen].prediction.strip().lower()
            of_method.append(COUNTS.index(said) - right if said in COUNTS else 0)
    return {
        chosen: CountErrors(_share([error < 0 for error in of_method]), _share([error > 0 for error in of_method]))
        for chosen, of_method in errors.items()
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def table_text(kept: dict[Chosen, KeptShapes], errors: dict[Chosen, CountErrors]) -> str:
    """Both as one Markdown table, in percent."""
    lines = ["| method | ratio | shapes lost | of a shape kept | of what is kept, on shapes | counts too low | too high |"]
    lines.append("|---|---|---|---|---|---|---|")
    for chosen, of_shapes in kept.items():
        shares = " | ".join(f"{100 * share:.0f}" for share in (*of_shapes, *errors[chosen]))
        lines.append(f"| {chosen.method} | {chosen.ratio:.3f} | {shares} |")
    return "\n".join(lines)


def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run of `hivtp evaluate` on the project's own questions.")],
    scenes: Annotated[int, typer.Option(min=1, help="So many scenes for what is kept.")] = 200,
) -> None:
    """How much of the shapes methods keep, beside how a run counts them."""
    try:
        recorded = RecordedRun(run)
    except ValueError as error:
        sys.exit(f"kept_shapes: {error}")
    print(table_text(kept_shapes(recorded, scenes), count_errors(recorded)))


if __name__ == "__main__":
    typer.run(main)
