"""The registry of pruning methods.

One entry says everything that the rest of the package must know of a method: its hyperparameters and their ranges, what it
looks at, and how to import its selector. Selectors are imported when they are asked for, so a method that nobody uses
costs nothing at import time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .checked_values import checked_flag, checked_number, shown


@dataclass(frozen=True)
class Hyperparameter:
    """One setting that belongs to one method: its name, type (`int`, `float` or `bool`), default and range.

    Attributes:
        meaning: for a reader, in a line or two.
        minimum, maximum: the range, both ends included; None for no upper end.
        above_minimum: whether `minimum` itself is outside the range.
        is_layer: whether it counts encoder layers, so that it can be named where an encoder is not deep enough.
    """

    name: str
    kind: type
    default: Any
    minimum: float = 0
    maximum: float | None = None
    above_minimum: bool = False
    is_layer: bool = False
    meaning: str = ""

    def checked(self, value: Any) -> Any:
        """`value` as a plain `kind` inside the range, or None where that is the default; ValueError otherwise."""
        if value is None and self.default is None:
            return None
        if self.kind is bool:
            return checked_flag(self.name, value)
        return checked_number(self.name, value, self.kind, self.minimum, self.maximum, self.above_minimum)


@dataclass(frozen=True)
class Selector:
    """What a method's entry makes of its selector file.

    `select(evidence, pruning)` takes a `VisualEvidence` and returns the mask of kept cells, bool (tiles, grid, grid), for the
    tiles of all of its images. `count(layout, pruning)` takes a `TokenLayout` and returns how many cells are kept of each
    group of cells among which the method chooses: a number per tile, base tile first, unless the method says otherwise.
    `scores(evidence, pruning)` returns the scores by which cells are ranked, float (tiles, grid, grid) and NaN for cells that
    have none, to be shown to people; None where a method scores nothing.
    """

    select: Callable[..., Any]
    count: Callable[..., Sequence[int]]
    scores: Callable[..., Any] | None = None


def _no_layers(pruning: Any, feature_layer: int) -> Sequence[int]:
    return ()


@dataclass(frozen=True)
class PruningMethod:
    """A way to choose visual tokens.

    Attributes:
        name: what `pruning_config.method` says.
        rule: what it keeps, in a line, and where that is from.
        hyperparameters: its own settings, beside those that all methods share.
        load_selector: imports its selector.
        scored_layers: from a pruning config, and the layer whose output is the visual feature, to the encoder layers (0-based,
            ascending) whose attention it reads. Lazy where settings bound it: it is asked for before they are held
            against an encoder's depth.
        reads_class_attention: whether it reads what the class token attends to, rather than what every token receives.
        default_retention_ratio: what `retention_ratio` reads where no budget is given.
        keeps_everything: whether it prunes nothing, so that a ratio below 1 would be a slip.
        content_dependent_count: whether its published selection keeps a number that depends on the image's content, so that
            `exact_count=False` means something.
    """

    name: str
    rule: str
    hyperparameters: tuple[Hyperparameter, ...]
    load_selector: Callable[[], Selector]
    scored_layers: Callable[[Any, int], Sequence[int]] = _no_layers
    reads_class_attention: bool = False
    default_retention_ratio: float | None = 0.5
    keeps_everything: bool = False
    content_dependent_count: bool = False


def _hivtp_selector() -> Selector:
    from .retained_share import share_of_tiles
    from .selectors_hivtp import count_hivtp, select_hivtp

    def count(layout: Any, pruning: Any) -> Sequence[int]:
        if pruning.retention_ratio is not None:
            return share_of_tiles(layout, pruning)
        return count_hivtp(layout.valid, pruning).tolist()

    return Selector(
        select=lambda seen, pruning: select_hivtp(seen.mean_scores(), seen.valid, pruning),
        count=count,
        scores=lambda seen, pruning: seen.mean_scores(),
    )


def _hivtp_layers(pruning: Any, feature_layer: int) -> Sequence[int]:
    first = pruning.importance_start_layer
    return range(first, first + pruning.importance_num_layers)


def _hiprune_selector() -> Selector:
    from .retained_share import share_of_tiles
    from .selectors_hiprune import select_hiprune

    def deep_scores(seen: Any, pruning: Any) -> Any:
        return seen.scores[seen.layer(pruning.deep_layer)]

    def select(seen: Any, pruning: Any) -> Any:
        return select_hiprune(seen.scores[pruning.object_layer], deep_scores(seen, pruning), seen.valid, pruning)

    # The object layer chooses a tenth of what is kept; the deep layer ranks the rest.
    return Selector(select, share_of_tiles, scores=deep_scores)


def _hiprune_layers(pruning: Any, feature_layer: int) -> Sequence[int]:
    deep_layer = feature_layer if pruning.deep_layer is None else pruning.deep_layer
    return sorted({pruning.object_layer, deep_layer})


def _gprune_selector() -> Selector:
    from .selectors_gprune import count_gprune, score_map_gprune, select_gprune

    return Selector(
        select=lambda seen, pruning: select_gprune(seen.features, seen.layouts, pruning),
        count=count_gprune,
        scores=lambda seen, pruning: score_map_gprune(seen.features, seen.layouts, pruning),
    )


def _cls_attention_selector() -> Selector:
    from .retained_share import share_of_tiles
    from .selectors_cls_attention import select_cls_attention

    def scores(seen: Any, pruning: Any) -> Any:
        return seen.scores[seen.layer(pruning.layer)]

    return Selector(
        select=lambda seen, pruning: select_cls_attention(scores(seen, pruning), seen.valid, pruning),
        count=share_of_tiles,
        scores=scores,
    )


def _cls_attention_layers(pruning: Any, feature_layer: int) -> Sequence[int]:
    return (feature_layer if pruning.layer is None else pruning.layer,)


def _random_selector() -> Selector:
    from .retained_share import share_of_tiles
    from .selectors_random import select_random

    return Selector(
        select=lambda seen, pruning: select_random(seen.tile_indices, seen.valid, pruning),
        count=share_of_tiles,
    )


def _uniform_selector() -> Selector:
    from .retained_share import share_of_tiles
    from .selectors_uniform import select_uniform

    return Selector(select=lambda seen, pruning: select_uniform(seen.valid, pruning), count=share_of_tiles)


def _none_selector() -> Selector:
    return Selector(select=lambda seen, pruning: seen.valid, count=lambda layout, pruning: layout.valid_per_tile)


METHODS: dict[str, PruningMethod] = {
    method.name: method
    for method in (
        PruningMethod(
            name="hivtp",
            rule="the best of every region and of every small window, by attention in middle layers (arXiv 2509.23663)",
            hyperparameters=(
                Hyperparameter("global_ratio", float, 0.25, 0, 1, meaning="share of a region's cells kept by the global stage"),
                Hyperparameter("local_window", int, 2, 1, meaning="side in cells of windows that each keep one cell more"),
                Hyperparameter("regions", int, 2, 1, meaning="regions per side of a tile, so 2 means four quadrants"),
                Hyperparameter("importance_start_layer", int, 6, is_layer=True, meaning="first encoder layer that scores"),
                Hyperparameter("importance_num_layers", int, 3, 1, is_layer=True, meaning="how many layers are averaged"),
            ),
            load_selector=_hivtp_selector,
            scored_layers=_hivtp_layers,
            default_retention_ratio=None,
            content_dependent_count=True,
        ),
        PruningMethod(
            name="hiprune",
            rule="anchors of a middle layer with their neighbours, and the best of a deep layer (arXiv 2508.00553)",
            hyperparameters=(
                Hyperparameter("alpha", float, 0.1, 0, 1, meaning="share of the budget for anchors and their neighbours"),
                Hyperparameter("object_layer", int, 8, is_layer=True, meaning="encoder layer that chooses the anchors"),
                Hyperparameter(
                    "deep_layer",
                    int,
                    None,
                    is_layer=True,
                    meaning="encoder layer that ranks the rest; None: the visual feature's",
                ),
                Hyperparameter(
                    "published_borders", bool, False, meaning="neighbours wrap round a tile's border, as in the released code"
                ),
            ),
            load_selector=_hiprune_selector,
            scored_layers=_hiprune_layers,
        ),
        PruningMethod(
            name="gprune",
            rule="what gathers most mass on a graph of similar features (arXiv 2501.02268)",
            hyperparameters=(
                Hyperparameter("similarity_threshold", float, 0.5, 0, 1, meaning="cosine similarities below it are no edge"),
                Hyperparameter(
                    "temperature", float, 0.03, 0, above_minimum=True, meaning="divides similarities before the softmax"
                ),
                Hyperparameter("iterations", int, 5, 0, 1000, meaning="how often tokens hand their mass to their neighbours"),
            ),
            load_selector=_gprune_selector,
        ),
        PruningMethod(
            name="cls_attention",
            rule="what the class token attends to most (FasterVLM, arXiv 2412.01818; VisionZip, arXiv 2412.04467)",
            hyperparameters=(
                Hyperparameter("layer", int, None, is_layer=True, meaning="encoder layer; None: the visual feature's"),
            ),
            load_selector=_cls_attention_selector,
            scored_layers=_cls_attention_layers,
            reads_class_attention=True,
        ),
        PruningMethod(
            name="random",
            rule="a baseline: cells drawn at random, the same for every image of a shape",
            hyperparameters=(Hyperparameter("seed", int, 0, 0, 2**32 - 1, meaning="which draw"),),
            load_selector=_random_selector,
        ),
        PruningMethod(
            name="uniform",
            rule="a baseline: cells at even distances in raster order",
            hyperparameters=(),
            load_selector=_uniform_selector,
        ),
        PruningMethod(
            name="none",
            rule="everything, as the stock model",
            hyperparameters=(),
            load_selector=_none_selector,
            default_retention_ratio=None,
            keeps_everything=True,
        ),
    )
}


def described_methods() -> str:
    """All methods with their settings, as text for a docstring; deeper lines are indented by four spaces."""
    lines = []
    for method in METHODS.values():
        lines.append(f'"{method.name}": {method.rule}.')
        for setting in method.hyperparameters:
            opening = "above" if setting.above_minimum else "from"
            upper = "" if setting.maximum is None else f" to {setting.maximum}"
            allowed = "" if setting.kind is bool else f", {opening} {setting.minimum}{upper}"
            lines.append(f"    {setting.name} ({setting.kind.__name__}, {setting.default}{allowed}): {setting.meaning}.")
    return "\n".join(lines)


def pruning_method(name: Any) -> PruningMethod:
    """The entry called `name`; a ValueError lists the known names."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(f"`method` is {shown(name)}; it must be one of {', '.join(map(repr, METHODS))}.")
    return method
