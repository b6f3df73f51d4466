"""`Variant`: one way to shorten what the language model sees; and which of them a run compares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..methods import METHODS
from ..pruning_config import VisualTokenPruningConfig

UNPRUNED, RANDOM = "none", "random"
# Two that need no selector: the base tile alone, and the image shrunk to the same number of tokens.
BASE_ONLY, DOWNSAMPLE = "base-only", "downsample"
COMPARED = (UNPRUNED, *(name for name in METHODS if name != UNPRUNED), BASE_ONLY, DOWNSAMPLE)
# Of the method "random", whose results are pooled over them.
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """One way to shorten what the language model sees.

    Attributes:
        method: one of `COMPARED`.
        ratio: that was asked for; None for the base tile alone, whose share follows from the images.
        settings: of a method of the registry, the ratio among them.
        seed: of a random draw.
        grid: cells per side of a shrunken tile.
    """

    method: str
    ratio: Fraction | None
    settings: VisualTokenPruningConfig | None = None
    seed: int | None = None
    grid: int | None = None

    @property
    def group(self) -> tuple[str, Fraction | None]:
        """What results are pooled by: draws of one ratio belong together."""
        return self.method, self.ratio

    @property
    def ratio_is_measured(self) -> bool:
        """Whether results name the share of tokens that was really used, rather than the ratio that was asked for."""
        return self.settings is None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", ratio {float(self.ratio):.6g}"
        return f"method {self.method}{ratio}" + ("" if self.seed is None else f", seed {self.seed}")


def chosen_methods(text: str | None) -> tuple[str, ...]:
    """The methods of a list such as "hivtp,random", in the order of `COMPARED` and always with "none"; None means all.

    Raises:
        ValueError: for an unknown name.
    """
    if text is None:
        return COMPARED
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in COMPARED:
            raise ValueError(f"`--methods` is {text!r}, in which {name!r} is unknown; give some of {', '.join(COMPARED)}.")
    return tuple(name for name in COMPARED if name in (UNPRUNED, *names))


def planned_variants(
    methods: Sequence[str], ratios: Sequence[Fraction], settings: Mapping[str, VisualTokenPruningConfig], grid: int
) -> list[Variant]:
    """All that a run compares, the unpruned model first.

    Args:
        methods: of `COMPARED`.
        ratios: above 0 and at most 1, largest first; at 1 every method is the unpruned model, which runs once.
        settings: of every method of the registry among them.
        grid: cells per side of a tile.
    """
    pruned = [ratio for ratio in ratios if ratio < 1]
    plan = [Variant(UNPRUNED, Fraction(1), VisualTokenPruningConfig(method=UNPRUNED))]
    for method in methods:
        if method == BASE_ONLY:
            plan.append(Variant(BASE_ONLY, None))
        elif method == DOWNSAMPLE:
            by_grid: dict[int, Variant] = {}  # ratios that mean the same shrunken tile run once
            for ratio in pruned:
                shrunken = shrunken_grid(grid, ratio)
                by_grid.setdefault(shrunken, Variant(DOWNSAMPLE, ratio, grid=shrunken))
            plan += by_grid.values()
        elif method != UNPRUNED:
            for ratio in pruned:
                of_ratio = settings[method].replace(retention_ratio=float(ratio))
                seeds = SEEDS if method == RANDOM else (None,)
                for seed in seeds:
                    drawn = of_ratio if seed is None else of_ratio.replace(seed=seed)
                    plan.append(Variant(method, ratio, drawn, seed))
    return plan


def shrunken_grid(grid: int, ratio: Fraction) -> int:
    """Cells per side of the largest tile that has at most a ratio of the cells of one of `grid` a side; at least 1."""
    return max(1, math.isqrt(math.floor(ratio * grid * grid)))
