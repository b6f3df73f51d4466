"""Trains a reference model: python -m research.shapes_vqa.train --model shapes-qwen2_5-vl --output FOLDER

Stopped at any time, the same command goes on from the last stored step.
"""

import enum
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm

from examples.shapes_vqa.scenes import make_practice_scene, make_sign_practice_scene
from examples.shapes_vqa.splits import PRACTICE, TRAINING, VALIDATION
from examples.shapes_vqa.vocabulary import PLACE, QUESTION_TYPES, READING
from hivtp_hf.figures.plotting import can_plot

from .checkpoint import choose_layers
from .language_training import LanguageHeads, SeenImage, accuracy_by_type, answer_loss, seen_images
from .places import scale_places
from .reference_model import ReferenceModel
from .references import REFERENCES
from .stages import Stage, run_stage, store
from .tower_training import TowerBatch, TowerHeads, TowerScenes, dense_loss, loader, tower_batch
from .training_log import TrainingLog
from .training_plot import plot_training

# About one image. There are many that ask for presence, and they are learnt soon.
_MOST_QUESTIONS = {**dict.fromkeys(QUESTION_TYPES, 8), "presence": 3, PLACE: 2, READING: 8}

Model = enum.StrEnum("Model", {name: name for name in REFERENCES})


class Dtype(enum.StrEnum):
    """What is trained in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(frozen=True)
class Recipe:
    """How much is trained on what."""

    practice_steps: int = 1200
    tower_steps: int = 1400
    tower_batch: int = 16
    place_factor: float = 3.0
    images: int = 10000
    short_steps: int = 4000
    full_steps: int = 1500
    language_batch: int = 8
    background_share: float = 0.08
    validation_images: int = 300
    layer_scenes: int = 100

    def scaled(self, share: float) -> "Recipe":
        """A share of everything, for a try."""
        counts = ("practice_steps", "tower_steps", "images", "short_steps", "full_steps", "validation_images")
        return Recipe(**{**vars(self), **{name: max(2, round(share * getattr(self, name))) for name in counts}})


# A tower step of the Qwen-VL costs more, as some blocks attend over whole images, and its language model's less, as tokens are
# fewer.
RECIPES = {
    "shapes-llava-next": Recipe(images=14000),
    "shapes-qwen2_5-vl": Recipe(
        practice_steps=1800, tower_steps=2000, tower_batch=8, images=14000, short_steps=4000, full_steps=3000
    ),
}


def train(reference: ReferenceModel, folder: Path, device: torch.device, dtype: torch.dtype, seed: int, recipe: Recipe) -> None:
    """Trains, or goes on training, and writes the checkpoint into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state"
    state.mkdir(exist_ok=True)
    log = TrainingLog(folder / "training_log.csv")
    config = reference.make_config()
    processor, model = reference.make_processor(config), reference.make_model(config, seed)
    random = np.random.default_rng([PRACTICE, seed])
    scenes = [(make_practice_scene, make_sign_practice_scene)[i % 2]((PRACTICE, seed, i)) for i in range(64)]
    reference.set_starting_point(model, tower_batch(reference, processor, scenes).inputs, random)
    reference.train_faster(model)
    tower_heads = TowerHeads(config.vision_config.hidden_size, config.text_config.hidden_size)
    language_heads = LanguageHeads(config.text_config.hidden_size)
    model.to(device, dtype)
    for heads in (tower_heads, language_heads):
        heads.to(device)
    train_tower(reference, model, tower_heads, processor, state, log, recipe)
    if reference.has_base_tile:
        scale_places(model, processor.tokenizer, recipe.place_factor)
    train_language_model(reference, model, language_heads, processor, state, log, recipe, seed)
    reference.write(model, processor, folder / "checkpoint")
    if can_plot():
        plot_training(log, folder / "training.png")
    print(choose_layers(reference, folder / "checkpoint", recipe.layer_scenes))


def train_tower(
    reference: ReferenceModel,
    model: Any,
    heads: TowerHeads,
    processor: Any,
    state: Path,
    log: TrainingLog,
    recipe: Recipe,
) -> None:
    """Both stages of the vision tower and the projector."""
    trained = (*reference.tower_parts(model), heads)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)

    def batches(split: int, steps: int, first: int) -> Iterator[TowerBatch]:
        size = recipe.tower_batch
        return iter(loader(TowerScenes(reference, processor, range(first * size, steps * size), size, split)))

    for name, split, steps in (("practice", PRACTICE, recipe.practice_steps), ("tower", TRAINING, recipe.tower_steps)):
        run_stage(
            Stage(
                name,
                steps,
                1e-3,
                trained,
                functools.partial(batches, split, steps),
                lambda batch: dense_loss(reference, model, processor.tokenizer, heads, batch),
                steps_between_checks=50,
            ),
            state,
            log,
        )


def train_language_model(
    reference: ReferenceModel,
    model: Any,
    heads: LanguageHeads,
    processor: Any,
    state: Path,
    log: TrainingLog,
    recipe: Recipe,
    seed: int,
) -> None:
    """Both stages of the language model: few background tokens first, then all of them, as in use."""
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    images, unseen = _images(reference, model, processor, state, log, recipe)

    def batches(name: str, share: float, first: int) -> Iterator[list[SeenImage]]:
        size, step = recipe.language_batch, first
        while True:
            random = np.random.default_rng([seed, len(name), step])
            chosen = [images[index] for index in random.choice(len(images), size, replace=False)]
            yield [image.without_most_background(share, random) if share < 1 else image for image in chosen]
            step += 1

    def check() -> dict[str, float]:
        counts = accuracy_by_type(model, unseen)
        right, asked = (sum(count[index] for count in counts.values()) for index in range(2))
        return {**{name: of_type[0] / of_type[1] for name, of_type in counts.items()}, "all": right / asked}

    def loss(batch: list[SeenImage]) -> tuple[Tensor, dict[str, float]]:
        return answer_loss(model, heads, batch)

    stages = (
        ("language_short", recipe.short_steps, recipe.background_share, 1e-3),
        ("language", recipe.full_steps, 1.0, 5e-4),
    )
    for name, steps, share, rate in stages:
        of_stage = functools.partial(batches, name, share)
        stage = Stage(name, steps, rate, (model.model.language_model, heads), of_stage, loss, check, steps_between_checks=250)
        run_stage(stage, state, log)


def _images(
    reference: ReferenceModel, model: Any, processor: Any, state: Path, log: TrainingLog, recipe: Recipe
) -> tuple[list[SeenImage], list[SeenImage]]:
    """What the language model trains on, and what it is checked on; kept in a file, as the tower's pass takes minutes."""
    file = state / "features.pt"
    if not file.exists():
        started = time.perf_counter()
        training = range(10**6, 10**6 + recipe.images)  # not those that the tower was trained on
        images = list(tqdm(seen_images(reference, model, processor, TRAINING, training, _MOST_QUESTIONS), total=len(training)))
        one_each = dict.fromkeys((*QUESTION_TYPES, READING), 1)
        unseen = list(seen_images(reference, model, processor, VALIDATION, range(recipe.validation_images), one_each))
        store({"images": images, "unseen": unseen}, file)
        questions = sum(len(image.questions) for image in images)
        log.add("features", len(images), (time.perf_counter() - started) / 60, {"questions": questions})
    stored = torch.load(file, weights_only=False)
    return stored["images"], stored["unseen"]


def main(
    model: Annotated[Model, typer.Option(help="Which one.")],
    output: Annotated[Path, typer.Option(help="The folder for the checkpoint, its log and the state.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Dtype = Dtype.bfloat16,
    seed: int = 0,
    share: Annotated[float, typer.Option(help="Of every stage, for a try.")] = 1.0,
) -> None:
    """Trains a reference model; stopped at any time, the same command goes on from the last stored step."""
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    train(REFERENCES[model], output, torch.device(place), getattr(torch, dtype), seed, RECIPES[model].scaled(share))


if __name__ == "__main__":
    typer.run(main)
