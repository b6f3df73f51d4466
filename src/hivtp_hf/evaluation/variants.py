"""`Variant`: one way to shorten what the language model sees; and which of them a run compares, under which settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..pruning.registry import METHODS
from ..pruning.settings import SHARED_SETTINGS, VisualTokenPruningConfig

UNPRUNED, RANDOM = "none", "random"
# Two that need no selector: the base tile alone, and the image shrunk to the same number of tokens.
BASE_ONLY, DOWNSAMPLE = "base-only", "downsample"
# Before the name of a method: of a smaller image it keeps so many tokens that a ratio of those of the image as it was is left.
SMALLER = f"{DOWNSAMPLE}+"
COMPARED = (UNPRUNED, *(name for name in METHODS if name != UNPRUNED), BASE_ONLY, DOWNSAMPLE)
# Of the method "random", whose results are pooled over them.
SEEDS = (0, 1, 2)
DEFAULT_RATIOS = "1,1/2,2/9,1/9,1/18"
# What the language model is told of kept tokens beside their features, by the settings `token_weights` and `positions`.
PUBLISHED, WEIGHTS, POSITIONS, BOTH = WEIGHTS_AND_POSITIONS = ("published", "weights", "positions", "both")

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
# What the run itself varies.
_NOT_TO_BE_SET = {
    "method": "name methods with `--methods`",
    "retention_ratio": "give `--ratios`",
    "token_budget": "give `--ratios`",
}


@dataclass(frozen=True)
class Variant:
    """One way to shorten what the language model sees.

    Attributes:
        method: one of `COMPARED`, or one of the registry behind `SMALLER`.
        ratio: that was asked for; None for the base tile alone, whose share follows from the images.
        settings: of a method of the registry, the ratio among them.
        seed: of a random draw.
        grid: cells per side of a shrunken tile; None also where images have sizes of their own.
    """

    method: str
    ratio: Fraction | None
    settings: VisualTokenPruningConfig | None = None
    seed: int | None = None
    grid: int | None = None

    @property
    def selector(self) -> str:
        """The method without what is done to the image before."""
        return self.method.removeprefix(SMALLER)

    @property
    def is_of_smaller_images(self) -> bool:
        """Whether a method of the registry prunes what an image was made smaller for."""
        return self.method.startswith(SMALLER)

    @property
    def group(self) -> tuple[str, Fraction | None, str]:
        """What results are pooled by: draws of one ratio belong together."""
        return self.method, self.ratio, self.weights_and_positions

    @property
    def weights_and_positions(self) -> str:
        """One of `WEIGHTS_AND_POSITIONS`: which of the two the settings have, whatever the weights are."""
        if self.settings is None:
            return PUBLISHED
        weighs, is_original = self.settings.token_weights != "none", self.settings.positions == "original"
        return WEIGHTS_AND_POSITIONS[weighs + 2 * is_original]

    @property
    def ratio_is_measured(self) -> bool:
        """Whether results name the share of tokens that was really used, rather than the ratio that was asked for."""
        return self.settings is None or self.is_of_smaller_images

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", ratio {float(self.ratio):.6g}"
        told = "" if self.weights_and_positions == PUBLISHED else f", weights and positions: {self.weights_and_positions}"
        return f"method {self.method}{ratio}{told}" + ("" if self.seed is None else f", seed {self.seed}")


def chosen_methods(text: str | None) -> tuple[str, ...]:
    """The methods of a list such as "hivtp,random,downsample+hivtp", in the order of `COMPARED` and always with "none".

    None means all of `COMPARED`.

    Raises:
        ValueError: for an unknown name.
    """
    if text is None:
        return COMPARED
    of_smaller_images = tuple(f"{SMALLER}{name}" for name in METHODS if name != UNPRUNED)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*COMPARED, *of_smaller_images):
            raise ValueError(
                f"`--methods` is {text!r}, in which {name!r} is unknown; give some of {', '.join(COMPARED)}, or {SMALLER} "
                f"with a method behind it, such as {of_smaller_images[0]}."
            )
    return tuple(name for name in (*COMPARED, *of_smaller_images) if name in (UNPRUNED, *names))


def chosen_weights_and_positions(text: str | None) -> tuple[str, ...] | None:
    """The names of a list such as "published,both", in the order of `WEIGHTS_AND_POSITIONS`; None stays None.

    Raises:
        ValueError: for an unknown name.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WEIGHTS_AND_POSITIONS:
            raise ValueError(
                f"`--weights-and-positions` is {text!r}, in which {name!r} is unknown; give some of "
                f"{', '.join(WEIGHTS_AND_POSITIONS)}, or leave it out for what the settings say."
            )
    return tuple(name for name in WEIGHTS_AND_POSITIONS if name in names)


def planned_variants(
    methods: Sequence[str],
    ratios: Sequence[Fraction],
    settings: Mapping[str, VisualTokenPruningConfig],
    grid: int | None,
    weights_and_positions: Sequence[str] | None = None,
) -> list[Variant]:
    """All that a run compares, the unpruned model first.

    Args:
        methods: as `chosen_methods` returned them.
        ratios: above 0 and at most 1, largest first; at 1 every method is the unpruned model, which runs once.
        settings: of every method of the registry among them.
        grid: cells per side of a tile; None where images have sizes of their own, and each is shrunken by itself.
        weights_and_positions: of `WEIGHTS_AND_POSITIONS`, each of which every method of the registry runs with; None for what
            its settings say.

    Raises:
        ValueError: for settings that cannot be had together.
    """
    pruned = [ratio for ratio in ratios if ratio < 1]
    plan = [Variant(UNPRUNED, Fraction(1), VisualTokenPruningConfig(method=UNPRUNED))]
    for method in methods:
        if method == BASE_ONLY:
            plan.append(Variant(BASE_ONLY, None))
        elif method == DOWNSAMPLE:
            if grid is None:
                plan += [Variant(DOWNSAMPLE, ratio) for ratio in pruned]
                continue
            by_grid: dict[int, Variant] = {}  # ratios that mean the same shrunken tile run once
            for ratio in pruned:
                shrunken = shrunken_grid(grid, ratio)
                by_grid.setdefault(shrunken, Variant(DOWNSAMPLE, ratio, grid=shrunken))
            plan += by_grid.values()
        elif method != UNPRUNED:
            selector, is_smaller = method.removeprefix(SMALLER), method.startswith(SMALLER)
            for ratio in pruned:
                of_ratio = settings[selector].replace(retention_ratio=float(ratio))
                seeds = SEEDS if selector == RANDOM else (None,)
                cells = None if grid is None or not is_smaller else grid_of_root(grid, ratio)
                for told in _told(of_ratio, weights_and_positions):
                    for seed in seeds:
                        drawn = told if seed is None else told.replace(seed=seed)
                        plan.append(Variant(method, ratio, drawn, seed, cells))
    return plan


def _told(settings: VisualTokenPruningConfig, names: Sequence[str] | None) -> list[VisualTokenPruningConfig]:
    """Settings with each of some of `WEIGHTS_AND_POSITIONS`: the weights are their own, or "cluster_size" if they have none."""
    if names is None:
        return [settings]
    own = "cluster_size" if settings.token_weights == "none" else settings.token_weights
    return [
        settings.replace(
            token_weights=own if name in (WEIGHTS, BOTH) else "none",
            positions="original" if name in (POSITIONS, BOTH) else "packed",
        )
        for name in names
    ]


def shrunken_grid(grid: int, ratio: Fraction) -> int:
    """Cells per side of the largest tile that has at most a ratio of the cells of one of `grid` a side; at least 1."""
    return max(1, math.isqrt(math.floor(ratio * grid * grid)))


def grid_of_root(grid: int, ratio: Fraction) -> int:
    """Cells per side of the largest tile that has at most the square root of a ratio of the cells of one of `grid` a side.

    So shrinking and pruning, one after the other, each leave the same share. At least 1.
    """
    return max(1, math.isqrt(math.isqrt(math.floor(ratio * grid**4))))


def parsed_ratio(text: str) -> Fraction:
    """The ratio that a decimal or a fraction such as "0.25" or "2/9" means, exact.

    Raises:
        ValueError: for what is no number, and for numbers that are not above 0 and at most 1.
    """
    try:
        ratio = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    # A share so small that float64 has no number for it keeps nothing of any image.
    if not 0 < ratio <= 1 or not float(ratio):
        raise ValueError(f"{text.strip()!r} is no ratio; give a decimal or a fraction above 0 and at most 1, such as 2/9.")
    return ratio


def parsed_ratios(text: str) -> tuple[Fraction, ...]:
    """The ratios of a list such as "1,1/2,0.25", exact, largest first and each once.

    Raises:
        ValueError: as `parsed_ratio`.
    """
    try:
        return tuple(sorted(set(map(parsed_ratio, text.split(","))), reverse=True))
    except ValueError as error:
        raise ValueError(f"`--ratios` is {text!r}, in which {error} Separate ratios by commas.") from None


def settings_of_methods(
    methods: Sequence[str],
    own: VisualTokenPruningConfig,
    changes: Sequence[str],
    weights_and_positions: Sequence[str] | None = None,
) -> dict[str, VisualTokenPruningConfig]:
    """The settings of every method of the registry but "none": the checkpoint's where it is its own method, else the defaults.

    Args:
        methods: that are compared.
        own: the checkpoint's settings.
        changes: "METHOD.NAME=VALUE", on top of these.
        weights_and_positions: which of `WEIGHTS_AND_POSITIONS` the run varies, or None. Where it does, changes may say which
            weights a method has, and not its positions.

    Raises:
        ValueError: for a change that cannot be read, of a method that is not compared, and of what the run itself varies; and
            as `VisualTokenPruningConfig`.
    """
    selectors = dict.fromkeys(name.removeprefix(SMALLER) for name in methods)
    settings = {
        name: own if own.method == name else VisualTokenPruningConfig(method=name)
        for name in selectors
        if name in METHODS and name != UNPRUNED
    }
    for method, changed in _by_method(changes, settings, weights_and_positions is not None).items():
        settings[method] = settings[method].replace(**changed)
    return settings


def _by_method(changes: Sequence[str], known: Mapping[str, Any], varies_positions: bool) -> dict[str, dict[str, Any]]:
    by_method: dict[str, dict[str, Any]] = {}
    for text in changes:
        place, equals, value = text.partition("=")
        method, dot, name = place.strip().partition(".")
        if not equals or not dot or not name:
            raise ValueError(f"`--set` is {text!r}; it must be METHOD.NAME=VALUE, such as hiprune.object_layer=5.")
        if method not in known:
            compared = ", ".join(known) or "no method"
            raise ValueError(
                f"`--set` is {text!r}, but {method!r} is no method with settings that is compared here; such are: {compared}. "
                "Leave it out, or name the method with `--methods`."
            )
        varied = dict(_NOT_TO_BE_SET)
        if method == RANDOM:
            varied["seed"] = f"leave it out: seeds {SEEDS} are pooled"
        if varies_positions:
            varied["positions"] = "give `--weights-and-positions`"
        if name in varied:
            raise ValueError(f"`--set` is {text!r}, but the run itself varies {name!r}; {varied[name]}.")
        by_method.setdefault(method, {})[name] = _value(text, method, name, value.strip())
    return by_method


def _value(text: str, method: str, name: str, value: str) -> Any:
    known = {**SHARED_SETTINGS, **{setting.name: setting for setting in METHODS[method].settings}}
    if name in known and known[name].kind in (str, list):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    if "+" in value:  # layers, which their setting checks
        return value
    raise ValueError(f"`--set` is {text!r}; a value must be a number, layers such as 7+15, true, false or none.")
