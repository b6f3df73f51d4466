"""What pruning is held to, and whether a run's rows keep it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .decode import DECODE
from .import_time import LOADING
from .memory import ALONE_PEAK, EXTRA_PEAK, PREFILL_PEAK
from .prefill import KV_CACHE, TIME_TO_FIRST_TOKEN
from .presets import Preset
from .rows import RATIO, Row
from .vision import SCORING_AND_SELECTION
from .weights import OVER

MET, MISSED, NOT_MEASURED, NOT_JUDGED = "met", "missed", "not measured", "not judged"


def _any(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Target:
    """A bound on a quantity of ours.

    Attributes:
        name: for people.
        quantity: the rows' quantity.
        most: the largest median that keeps the target.
        unit: of the bound.
        concerns: whether a row of the quantity, of ours, is bound.
        device: the only kind of device that it is for, or None for every one.
        of_time: whether it means nothing for shapes that are not real.
    """

    name: str
    quantity: str
    most: float
    unit: str = RATIO
    concerns: Callable[[Row], bool] = _any
    device: str | None = None
    of_time: bool = True


@dataclass(frozen=True)
class Judgement:
    """A target, the verdict, the row that lies furthest from it, and how many rows keep it."""

    target: Target
    verdict: str
    worst: Row | None = None
    kept: int = 0
    rows: int = 0

    @property
    def is_settled(self) -> bool:
        """Whether all of the worst row's interval lies on the verdict's side."""
        if self.worst is None or self.worst.low is None or self.worst.high is None:
            return True
        return self.worst.high <= self.target.most or self.worst.low > self.target.most


TARGETS = (
    Target("tower with scoring and selection / stock's tower", "tower over stock", 1.03, device="cpu"),
    Target(
        "scoring and selection together, one image of 672 x 672",
        SCORING_AND_SELECTION,
        0.002,
        "s",
        concerns=lambda row: row.image == "672 x 672",
        device="cuda",
    ),
    Target("tower with scoring and selection / published way", "tower over published way", 0.6, device="cpu"),
    Target(
        "time to first token / limit",
        f"{TIME_TO_FIRST_TOKEN} over limit",
        1.03,
        concerns=lambda row: row.method != "gprune",
    ),
    Target(
        "time to first token / limit, gprune",
        f"{TIME_TO_FIRST_TOKEN} over limit",
        1.10,
        concerns=lambda row: row.method == "gprune",
    ),
    # "Equal" for a time means that the medians agree within one percent.
    Target("decode per token / limit", f"{DECODE} over limit", 1.01),
    Target("KV cache / limit", f"{KV_CACHE} over limit", 1.0, of_time=False),
    Target("extra peak memory over stock's vision pass", EXTRA_PEAK, 256 * 2**20, "bytes", of_time=False),
    Target("peak memory of scoring and selection alone", ALONE_PEAK, 256 * 2**20, "bytes", of_time=False),
    *(
        Target(f"{quantity}, with weights and positions / without", f"{quantity} {OVER}", 1.05, of_time=takes_time)
        for quantity, takes_time in ((TIME_TO_FIRST_TOKEN, True), (DECODE, True), (PREFILL_PEAK, False), (KV_CACHE, False))
    ),
    Target(
        "counting placeholders / stock's preprocessing, known size",
        "added counting over stock's preprocessing",
        0.01,
        concerns=lambda row: row.note == "ours",
    ),
    Target(
        "counting placeholders / stock's preprocessing, new size",
        "added counting over stock's preprocessing",
        0.01,
        concerns=lambda row: row.note != "ours",
    ),
    Target("import of hivtp_hf after what it needs", "import of hivtp_hf after what it needs", 0.05, "s", of_time=False),
    Target(f"{LOADING}, configuration or processor", LOADING, 0.3, "s", of_time=False),
)


def judge(rows: Sequence[Row], preset: Preset, device: torch.device) -> list[Judgement]:
    """The judgement of every target: met where all rows that it binds keep it by their medians."""
    judgements = []
    for target in TARGETS:
        bound = [
            row
            for row in rows
            if row.quantity == target.quantity and row.variant in ("", "ours", "weighted") and target.concerns(row)
        ]
        if target.device not in (None, device.type):
            judgements.append(Judgement(target, f"{NOT_JUDGED}: for {'a GPU' if target.device == 'cuda' else 'a CPU'}"))
        elif not bound:
            judgements.append(Judgement(target, NOT_MEASURED))
        else:
            worst = max(bound, key=lambda row: row.median)
            kept = sum(row.median <= target.most for row in bound)
            verdict = MET if kept == len(bound) else MISSED
            if target.of_time and not preset.real_shapes:
                verdict = f"{NOT_JUDGED}: shapes are not real"
            judgements.append(Judgement(target, verdict, worst, kept, len(bound)))
    return judgements
