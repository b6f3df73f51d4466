"""Part "vision": the vision pass alone, and in it the tower, scoring and selection.

Every method stands at one ratio, the middle one: how many cells a selection keeps does not change what it computes.
"""

import functools

from .bench import Bench
from .rows import Row, compared, measured
from .sections import SCORING, SELECTION, TOWER, VISION, watched
from .variants import Variant, has_published_way, image_features, published_of, stock_variant

SCORING_AND_SELECTION, TOWER_AND_CHOICE = "scoring and selection", "tower with scoring and selection"
OWN_WORK_OVER_TOWER = "stock's tower plus own work over stock's tower"


def measure_vision(bench: Bench) -> list[Row]:
    """Rows of every image size; on slow machines of the first one."""
    settings = bench.settings
    sizes = settings.images if settings.preset.thorough else settings.images[:1]
    return [row for size in sizes for row in _measure_size(bench, size)]


def _measure_size(bench: Bench, size: tuple[int, int]) -> list[Row]:
    models, settings = bench.models, bench.settings
    images = bench.images(size)
    stock = stock_variant(models, size)
    ours = bench.ours(size, settings.methods, [settings.middle_ratio])
    with_maps = [variant for variant in ours if has_published_way(variant.method)]
    published = [published_of(variant) for variant in (with_maps if settings.preset.thorough else with_maps[:1])]
    stopwatch = bench.stopwatch()

    def run(variant: Variant) -> dict[str, float]:
        return stopwatch.run(lambda: image_features(models, images, variant))[1]

    with watched(models, stopwatch):
        runs = {variant: functools.partial(run, variant) for variant in (stock, *ours, *published)}
        seconds = bench.in_turn(runs, "vision")
    return vision_rows("vision", seconds, images.name)


def vision_rows(part: str, seconds: dict[Variant, list[dict[str, float]]], image: str) -> list[Row]:
    """Rows of sections and of the tower's ratios, from the seconds of every variant's runs."""
    where = {"image": image, "batch": 1}
    rows = []
    towers: dict[Variant, list[float]] = {}
    for variant, runs in seconds.items():
        choice = [run.get(SCORING, 0.0) + run.get(SELECTION, 0.0) for run in runs]
        # Our scoring happens inside the tower, the published way's after it.
        outside = (SELECTION,) if variant.kind == "ours" else (SCORING, SELECTION)
        towers[variant] = [run[TOWER] + sum(run.get(name, 0.0) for name in outside) for run in runs]
        sections = {TOWER: [run[TOWER] for run in runs], VISION: [run[VISION] for run in runs]}
        if variant.kind in ("ours", "published"):
            # What of the published way comes after stock's pass belongs to its vision pass as well.
            if variant.kind == "published":
                sections[VISION] = [run[VISION] + spent for run, spent in zip(runs, choice, strict=True)]
            sections[SCORING] = [run.get(SCORING, 0.0) for run in runs]
            sections[SELECTION] = [run.get(SELECTION, 0.0) for run in runs]
            sections[SCORING_AND_SELECTION] = choice
            sections[TOWER_AND_CHOICE] = towers[variant]
        rows += [measured(part, name, "s", values, variant, **where) for name, values in sections.items()]
    stock = next(variant for variant in seconds if variant.kind == "stock")
    for variant in seconds:
        if variant.kind != "stock":
            rows.append(compared(part, "tower over stock", towers[variant], towers[stock], variant, **where))
        if variant.kind == "ours" and published_of(variant) in seconds:
            others = towers[published_of(variant)]
            rows.append(compared(part, "tower over published way", towers[variant], others, variant, **where))
        if variant.kind == "ours":
            # The same distance without the noise of two passes: what pruning itself was seen to take, inside its pass.
            spent = [run.get(SCORING, 0.0) + run.get(SELECTION, 0.0) for run in seconds[variant]]
            with_spent = [tower + extra for tower, extra in zip(towers[stock], spent, strict=True)]
            rows.append(compared(part, OWN_WORK_OVER_TOWER, with_spent, towers[stock], variant, **where))
    return rows
