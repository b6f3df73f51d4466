"""Training in stages that can be stopped at any time: each goes on from its last stored step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hivtp_hf.files import atomic_write

from .mixed_precision import MasterWeights
from .training_log import TrainingLog

_STEPS_OF_WARM_UP = 100
_LEAST_RATE = 0.02


@dataclass(frozen=True)
class Stage:
    """A part of training.

    Attributes:
        name: of its files and in the log.
        steps: how many there are.
        learning_rate: at its height; it rises for a hundred steps and falls like a cosine.
        trained: modules whose parameters change; everything that a stored state holds.
        batches: all batches from a step on, the same ones whenever it is asked.
        loss: of a batch, and figures for the log.
        check: figures of data that is not trained on, asked from time to time.
        steps_between_checks: how often.
    """

    name: str
    steps: int
    learning_rate: float
    trained: Sequence[nn.Module]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Any], tuple[Tensor, dict[str, float]]]
    check: Callable[[], dict[str, float]] = field(default=dict)
    steps_between_checks: int = 200


def run_stage(stage: Stage, folder: Path, log: TrainingLog) -> None:
    """Runs a stage to its end, from where its file in the folder says it stopped."""
    file = folder / f"{stage.name}.pt"
    weights = MasterWeights(stage.trained, stage.learning_rate)
    first = 0
    if file.exists():
        state = torch.load(file, map_location="cpu")
        weights.load_state_dict(state["weights"])
        first = state["step"]
        log.drop_after(stage.name, first)
    bar = tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step")
    started, figures = time.perf_counter(), []
    for step, batch in zip(range(first, stage.steps), stage.batches(first), strict=False):
        loss, right = stage.loss(batch)
        loss.backward()
        weights.step(_rate(step, stage.steps))
        figures.append({"loss": loss.item(), **right})
        bar.update()
        done = step + 1
        if done % stage.steps_between_checks == 0 or done == stage.steps:
            means = {name: _mean(figure.get(name, math.nan) for figure in figures) for name in figures[-1]}
            checked = stage.check()
            minutes = (time.perf_counter() - started) / 60
            log.add(stage.name, done, minutes, {**means, **checked})
            bar.set_postfix({name: f"{value:.3f}" for name, value in (checked or means).items()})
            started, figures = time.perf_counter(), []
            store({"step": done, "weights": weights.state_dict()}, file)
    bar.close()


def _rate(step: int, steps: int) -> float:
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _STEPS_OF_WARM_UP) * (_LEAST_RATE + (1 - _LEAST_RATE) * falling)


def _mean(values: Iterator[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def store(state: dict[str, Any], file: Path) -> None:
    """Writes a file that is there whole or as it was before."""
    atomic_write(file, lambda unfinished: torch.save(state, unfinished))
