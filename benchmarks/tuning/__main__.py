"""Whether what `hivtp tune` maximises ranks settings as right answers do: python -m benchmarks.tuning OUTPUT

Random settings of `hivtp` at one retention ratio, beside the default layers and those of the small trained model's checkpoint.
Of each the three objectives on calibration questions, one an image, and how many questions of the split "validation" are
answered right. No tuning takes part. OUTPUT gets values.csv: a line a setting, and of every objective the mean over the first
images, by their number; and correlations.csv: Spearman's rank correlation with right answers over the random settings, for
groups of images that do not meet. Stopped, it has the questions that it has. About 15 minutes on one core. Needs
`pip install -e ".[dev]"`.
"""

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from examples.shapes_vqa.held_out import HeldOut, held_out_questions, one_a_scene
from examples.shapes_vqa.reference import CHECKPOINT
from examples.shapes_vqa.scenes import draw
from examples.shapes_vqa.splits import CALIBRATION, VALIDATION
from examples.shapes_vqa.vocabulary import QUESTION_TYPES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import open_source
from hivtp_hf.evaluation import Row
from hivtp_hf.evaluation.answering import PartWork
from hivtp_hf.evaluation.data import EvaluationData, checked_data, normalised
from hivtp_hf.evaluation.prompts import prompt_of
from hivtp_hf.evaluation.variants import UNPRUNED, Variant
from hivtp_hf.tuning.calibration import CalibrationPasses
from hivtp_hf.tuning.objectives import OBJECTIVES
from hivtp_hf.tuning.search_space import SearchSpace
from hivtp_hf.tuning.study import Study, Trial

NUMBERS_OF_IMAGES = (5, 10, 30, 100)
_BATCH = 16
# Beside random settings.
_NAMED = {"default": {"importance_layers": [6, 7, 8]}, "checkpoint's own": {"importance_layers": [4, 5, 6]}}


def rows_of(split: int, asked: Iterable[HeldOut]) -> Iterator[Row]:
    """Questions of a split as rows."""
    for index, scene, question in asked:
        yield Row(draw(scene), f"{split}-{index}", question.text, question.answer, question.type)


def calibration(number: int) -> EvaluationData:
    """Questions about so many images of the split that chooses."""
    asked = one_a_scene(held_out_questions(len(QUESTION_TYPES) * number, CALIBRATION))
    return checked_data("calibration", rows_of(CALIBRATION, asked), number)


def random_settings(space: SearchSpace, number: int, seed: int = 0) -> list[VisualTokenPruningConfig]:
    """Points of a space that mean something, drawn as a search draws its first ones."""
    study = Study(space.parameters, seed)
    found: list[VisualTokenPruningConfig] = []
    while len(found) < number:
        point = study.next_point()
        if point is None:
            break
        study.trials.append(Trial(point, {}, None, None, 0.0, "only drawn"))
        try:
            found.append(space.settings(point))
        except ValueError:
            continue
    return found


def right_answers(
    model: Any, processor: Any, settings: Sequence[Any], data: EvaluationData, ratio: Fraction
) -> Iterator[tuple[int, list[int]]]:
    """Part by part how many questions were asked so far, and answered right: by the unpruned model, then under all settings."""
    plan = [
        Variant(UNPRUNED, Fraction(1), VisualTokenPruningConfig(method=UNPRUNED)),
        *(Variant(one.method, ratio, one, number) for number, one in enumerate(settings)),
    ]
    prompts = [prompt_of(processor, row.question) for row in data.rows]
    work, right, asked = PartWork(model, processor, plan, data, prompts, _BATCH, 8), [0] * len(plan), 0
    with tqdm(total=len(plan) * len(data.rows), desc="Answering") as progress:
        for part in data.parts(_BATCH):
            rows = [row for group in part for row in group.rows]
            for number, result in enumerate(work.results(part, progress.update)):
                right[number] += sum(
                    normalised(answer) == normalised(data.rows[row].answer)
                    for answer, row in zip(result["answers"], rows, strict=True)
                )
            asked += len(rows)
            yield asked, right


def main(
    output: Path,
    settings: Annotated[int, typer.Option(min=3, help="So many random ones.")] = 30,
    questions: Annotated[int, typer.Option(min=1, help="Of the split validation.")] = 2000,
    images: Annotated[int, typer.Option(min=5, help="Of the split calibration.")] = NUMBERS_OF_IMAGES[-1],
    ratio: Annotated[str, typer.Option(help="Share of patch tokens to keep.")] = "1/9",
) -> None:
    """Whether what is maximised ranks settings as right answers do."""
    source, share = open_source(str(CHECKPOINT)), Fraction(ratio)
    model, processor = (load({"method": UNPRUNED}) for load in (source.load_model, source.load_processor))
    model = model.float()
    base = VisualTokenPruningConfig(retention_ratio=float(share))
    space = SearchSpace(base, None, (), model.model.encoder_facts(), model.config.get_text_config().num_hidden_layers)
    drawn = [*(base.replace(**named) for named in _NAMED.values()), *random_settings(space, settings)]
    names = [*_NAMED, *map(str, range(1, len(drawn) - len(_NAMED) + 1))]

    data = calibration(images)
    values: dict[str, list[tuple[float, ...]]] = {}
    for name, objective in OBJECTIVES.items():
        passes = CalibrationPasses(model, processor, data, objective, base, space.layers, _BATCH, 4.0, 8)
        with tqdm(total=(1 + len(drawn)) * images, desc=name) as progress:
            passes.refer(progress.update)
            values[name] = [passes.measure(one, progress.update).values for one in drawn]
    asked = checked_data("validation", rows_of(VALIDATION, held_out_questions(questions, VALIDATION)), None)
    output.mkdir(parents=True, exist_ok=True)
    for number, right in right_answers(model, processor, drawn, asked, share):
        write_values(output / "values.csv", dict(zip(names, drawn, strict=True)), values, number, right)
        write_correlations(output / "correlations.csv", values, right)
    print((output / "correlations.csv").read_text(encoding="utf-8"))


def write_values(
    path: Path,
    settings: Mapping[str, VisualTokenPruningConfig],
    values: Mapping[str, Sequence[Sequence[float]]],
    questions: int,
    right: Sequence[int],
) -> None:
    """Writes a line for each of some settings, after one for the unpruned model.

    Args:
        path: of the file.
        settings: by name.
        values: of every objective and of all settings those of all images.
        questions: how many were asked.
        right: how many the unpruned model answers, then all settings.
    """
    images = len(next(iter(values.values()))[0])
    numbers = [number for number in NUMBERS_OF_IMAGES if number <= images]
    columns = [f"{name}_{number}" for name in values for number in numbers]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("settings", "layers", "regions", "questions", "right", *columns))
        writer.writerow(("unpruned", "", "", questions, right[0], *[""] * len(columns)))
        for place, (name, one) in enumerate(settings.items()):
            means = [statistics.fmean(of[place][:number]) for of in values.values() for number in numbers]
            layers = "+".join(map(str, one.importance_layers))
            writer.writerow((name, layers, one.regions, questions, right[1 + place], *(f"{mean:.6f}" for mean in means)))


def write_correlations(path: Path, values: Mapping[str, Sequence[Sequence[float]]], right: Sequence[int]) -> None:
    """Writes a line for every objective and number of images, over the random settings. Arguments as `write_values`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("objective", "images", "groups", "mean", "lowest", "highest"))
        for name, of_settings in values.items():
            for number in NUMBERS_OF_IMAGES:
                if number > len(of_settings[0]):
                    continue
                found = correlations(of_settings[len(_NAMED) :], right[1 + len(_NAMED) :], number)
                cells = (statistics.fmean(found), min(found), max(found))
                writer.writerow((name, number, len(found), *(f"{cell:.3f}" for cell in cells)))


def correlations(values: Sequence[Sequence[float]], right: Sequence[int], number: int) -> list[float]:
    """The rank correlation of an objective with right answers, for each group of so many images.

    Args:
        values: of every setting those of all images.
        right: of every setting how many answers are right.
        number: images of a group.
    """
    groups = range(len(values[0]) // number)
    means = [[statistics.fmean(of[group * number : (group + 1) * number]) for of in values] for group in groups]
    return [float(spearmanr(of_group, right).statistic) for of_group in means]


if __name__ == "__main__":
    typer.run(main)
