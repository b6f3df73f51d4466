"""Part "weights": a method with token weights and original positions beside the same method without, in turn.

What both cost: time to the first token and, in it, the language model; time of one more token; the cache; the peak of memory.
"""

import functools

import torch

from hivtp_hf.pruning.token_weights import cluster_sizes

from .bench import Bench
from .decode import DECODE, decoding_steps
from .images import token_layout
from .memory import PREFILL_PEAK
from .peak_memory import peak_memory
from .prefill import KV_CACHE, LANGUAGE_MODEL_PREFILL, TIME_TO_FIRST_TOKEN
from .rows import Row, compared, measured
from .sections import LANGUAGE_MODEL, WEIGHING, watched
from .stopwatch import TOTAL
from .variants import Variant, cache_bytes, first_token, weighted_of

PART = "weights"
OVER = "over the same without weights"
WITHOUT_PLUS_OWN_WORK, WEIGHING_PEAK = "without weights plus own work", "peak memory of weighing alone"


def measure_weights(bench: Bench) -> list[Row]:
    """Rows of the first image size: every method and ratio to the first token, the leading method in decoding and memory."""
    settings, size = bench.settings, bench.settings.images[0]
    ours = bench.ours(size, settings.methods, settings.ratios)
    leading = [variant for variant in ours if variant.method == settings.lead_method]
    rows = _prefill_rows(bench, size, ours) + _decode_rows(bench, size, leading)
    if not settings.preset.thorough:  # a pass takes long, and memory is the same each time
        leading = [variant for variant in leading if variant.ratio == settings.middle_ratio]
    return rows + _memory_rows(bench, size, leading)


def _prefill_rows(bench: Bench, size: tuple[int, int], ours: list[Variant]) -> list[Row]:
    models, images = bench.models, bench.images(size)
    stopwatch, held = bench.stopwatch(), {}

    def run(variant: Variant) -> dict[str, float]:
        result, seconds = stopwatch.run(lambda: first_token(models, images, variant))
        held[variant] = cache_bytes(result.cache)
        return seconds

    with watched(models, stopwatch):
        variants = [*ours, *map(weighted_of, ours)]
        seconds = bench.in_turn({variant: functools.partial(run, variant) for variant in variants}, PART)
    where = {"image": images.name, "batch": images.batch}
    rows = []
    for without in ours:
        weighted = weighted_of(without)
        for quantity, section in ((TIME_TO_FIRST_TOKEN, TOTAL), (LANGUAGE_MODEL_PREFILL, LANGUAGE_MODEL)):
            times = {variant: [of_run[section] for of_run in seconds[variant]] for variant in (without, weighted)}
            rows += [measured(PART, quantity, "s", values, variant, **where) for variant, values in times.items()]
            rows.append(compared(PART, f"{quantity} {OVER}", times[weighted], times[without], weighted, **where))
        totals = [of_run[TOTAL] for of_run in seconds[without]]
        spent = [of_run[WEIGHING] for of_run in seconds[weighted]]
        rows.append(measured(PART, WEIGHING, "s", spent, weighted, **where))
        # The same distance without the noise of two long runs: what weighing was seen to take, inside its run.
        with_spent = [total + extra for total, extra in zip(totals, spent, strict=True)]
        rows.append(compared(PART, f"{WITHOUT_PLUS_OWN_WORK} {OVER}", with_spent, totals, weighted, **where))
        rows += [measured(PART, KV_CACHE, "bytes", [held[variant]], variant, **where) for variant in (without, weighted)]
        rows.append(compared(PART, f"{KV_CACHE} {OVER}", [held[weighted]], [held[without]], weighted, **where))
    return rows


def _decode_rows(bench: Bench, size: tuple[int, int], ours: list[Variant]) -> list[Row]:
    steps = decoding_steps(bench, size, [*ours, *map(weighted_of, ours)])
    rows = []
    for new_tokens in bench.settings.new_tokens:
        where = {"image": bench.images(size).name, "batch": 1, "new_tokens": new_tokens}
        for without in ours:
            weighted = weighted_of(without)
            times = {variant: steps[variant][:new_tokens] for variant in (without, weighted)}
            rows += [measured(PART, DECODE, "s", values, variant, **where) for variant, values in times.items()]
            rows.append(compared(PART, f"{DECODE} {OVER}", times[weighted], times[without], weighted, **where))
    return rows


def _memory_rows(bench: Bench, size: tuple[int, int], ours: list[Variant]) -> list[Row]:
    models, images = bench.models, bench.images(size)
    where = {"image": images.name, "batch": images.batch}
    rows = []
    for without in ours:
        weighted, peaks = weighted_of(without), {}
        for variant in (without, weighted):
            peaks[variant] = peak_memory(bench.device, functools.partial(first_token, models, images, variant))
            rows.append(measured(PART, PREFILL_PEAK, "bytes", [peaks[variant]], variant, **where))
        rows.append(compared(PART, f"{PREFILL_PEAK} {OVER}", [peaks[weighted]], [peaks[without]], weighted, **where))
        rows.append(measured(PART, WEIGHING_PEAK, "bytes", [_alone(bench, size, weighted)], weighted, **where))
    return rows


def _alone(bench: Bench, size: tuple[int, int], variant: Variant) -> int:
    """Bytes that weighing takes beyond its image's features, whichever cells are kept."""
    layout = token_layout(bench.models.config, size, variant.method, variant.ratio)
    shape = (layout.num_cells, bench.models.config.text_config.hidden_size)
    features = torch.randn(shape, device=bench.device, dtype=bench.models.dtype)
    kept = torch.arange(sum(layout.group_totals), device=bench.device)
    return peak_memory(bench.device, functools.partial(cluster_sizes, features, kept))
