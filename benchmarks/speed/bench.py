"""What every part of the benchmark is given."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .images import Images, random_images, token_layout
from .interleaving import interleave
from .models import Models
from .presets import Preset
from .stopwatch import Stopwatch
from .variants import Variant, ours_variant

Result = TypeVar("Result")

# Where neighbours hold the processor, the wall clock runs on. That of the process stands still, and adds up its threads.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Settings:
    """What is to be measured: a preset's defaults, and what was asked for instead."""

    preset: Preset
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    images: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    new_tokens: tuple[int, ...]
    repeats: int | None
    clock: str = "wall"

    @property
    def lead_method(self) -> str:
        return self.methods[0]

    @property
    def middle_ratio(self) -> float:
        return sorted(self.ratios)[len(self.ratios) // 2]

    def repeats_of(self, part: str) -> int:
        return self.preset.repeats[part] if self.repeats is None else self.repeats


@dataclass(frozen=True)
class Bench:
    """Settings, models, and someone to tell.

    Attributes:
        say: takes a line about what happens.
        missing: what cannot be measured here, in sentences.
    """

    settings: Settings
    models: Models
    say: Callable[[str], None]
    missing: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.models.device

    def stopwatch(self) -> Stopwatch:
        """One for this device, by the clock that the settings name."""
        return Stopwatch(self.device, CLOCKS[self.settings.clock])

    def lacks(self, sentence: str) -> None:
        """Says and notes what is not measured."""
        self.say(sentence)
        self.missing.append(sentence)

    def images(self, size: tuple[int, int], batch: int = 1) -> Images:
        return random_images(self.models.config, size, batch, self.device, self.models.dtype)

    def ours(self, size: tuple[int, int], methods: Iterable[str], ratios: Iterable[float]) -> list[Variant]:
        """Our variants of an image size. Where a ratio rounds down to no cell of a tile, there is nothing to measure."""
        ratios = list(ratios)
        found = [ours_variant(self.models, size, method, ratio) for method in methods for ratio in ratios]
        newlines = token_layout(self.models.config, size).num_newlines
        return [variant for variant in found if variant.image_tokens > newlines]

    def in_turn(self, runs: Mapping[Any, Callable[[], Result]], part: str) -> dict[Any, list[Result]]:
        """All of the runs, interleaved, as often as the settings say of the part."""
        warm_up = list(runs) if self.settings.preset.thorough else list(runs)[:1]
        return interleave(runs, self.settings.repeats_of(part), warm_up)
