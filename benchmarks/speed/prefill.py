"""Part "prefill": the time to the first token at every method and ratio, and in it the language model; what the cache holds."""

import functools

from .bench import Bench
from .rows import Row, compared, measured
from .sections import LANGUAGE_MODEL, SCORING, SELECTION, VISION, watched
from .stopwatch import TOTAL
from .variants import Variant, cache_bytes, first_token, has_published_way, limit_of, published_of, stock_variant

PART = "prefill"
TIME_TO_FIRST_TOKEN, LANGUAGE_MODEL_PREFILL, KV_CACHE = "time to first token", "language model prefill", "KV cache"


def measure_prefill(bench: Bench) -> list[Row]:
    """Rows of every image size. On slow machines images after the first have the leading method at the middle ratio alone."""
    settings, rows = bench.settings, []
    for index, size in enumerate(settings.images):
        methods, ratios = settings.methods, settings.ratios
        if index > 0 and not settings.preset.thorough:
            methods, ratios = (settings.lead_method,), (settings.middle_ratio,)
        rows += _measure_size(bench, size, bench.ours(size, methods, ratios))
    return rows


def _measure_size(bench: Bench, size: tuple[int, int], ours: list[Variant]) -> list[Row]:
    models, settings = bench.models, bench.settings
    images = bench.images(size)
    stock = stock_variant(models, size)
    # One limit for every length: methods that keep as many tokens share it.
    limit_of_length = {variant.image_tokens: limit_of(variant) for variant in ours}
    with_maps = [variant for variant in ours if has_published_way(variant.method) and variant.ratio == settings.middle_ratio]
    if not settings.preset.thorough:
        with_maps = with_maps[:1] if size == settings.images[0] else []
    variants = [stock, *limit_of_length.values(), *ours, *map(published_of, with_maps)]
    stopwatch, weights = bench.stopwatch(), {}

    def run(variant: Variant) -> dict[str, float]:
        # The cache goes before the next variant's run begins: two of them would not fit everywhere.
        result, seconds = stopwatch.run(lambda: first_token(models, images, variant))
        weights[variant] = cache_bytes(result.cache)
        return seconds

    with watched(models, stopwatch):
        seconds = bench.in_turn({variant: functools.partial(run, variant) for variant in variants}, PART)

    where = {"image": images.name, "batch": images.batch}
    totals = {variant: [run[TOTAL] for run in runs] for variant, runs in seconds.items()}
    rows = []
    for variant, runs in seconds.items():
        rows.append(measured(PART, TIME_TO_FIRST_TOKEN, "s", totals[variant], variant, **where))
        for quantity, section in (("vision pass", VISION), (LANGUAGE_MODEL_PREFILL, LANGUAGE_MODEL)):
            rows.append(measured(PART, quantity, "s", [run[section] for run in runs], variant, **where))
        rows.append(measured(PART, KV_CACHE, "bytes", [weights[variant]], variant, **where))
        if variant is not stock:
            rows.append(compared(PART, f"{TIME_TO_FIRST_TOKEN} over stock", totals[variant], totals[stock], variant, **where))
    for variant in seconds:
        if variant.kind not in ("ours", "published"):
            continue
        limit = limit_of_length[variant.image_tokens]
        rows.append(compared(PART, f"{TIME_TO_FIRST_TOKEN} over limit", totals[variant], totals[limit], variant, **where))
        rows.append(compared(PART, f"{KV_CACHE} over limit", [weights[variant]], [weights[limit]], variant, **where))
        if variant.kind == "ours":
            # The same distance without the noise of two long runs: what pruning itself was seen to take, inside its run.
            spent = [run.get(SCORING, 0.0) + run.get(SELECTION, 0.0) for run in seconds[variant]]
            with_spent = [total + extra for total, extra in zip(totals[limit], spent, strict=True)]
            rows.append(compared(PART, "limit plus own work over limit", with_spent, totals[limit], variant, **where))
    return rows
