"""Part "throughput": new tokens a second of whole `generate` calls, vision pass included, by batch size.

One run gives the throughput at every number of new tokens: the clock is read when so many are there. The leading method at the
middle ratio stands for the others.
"""

import functools
import gc
import time

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .batch_search import largest_batch
from .bench import Bench
from .images import Images
from .interleaving import interleave
from .rows import Row, compared, measured
from .stopwatch import synchronize
from .variants import Variant, limit_of, model_inputs, model_of, stock_variant

PART, THROUGHPUT = "throughput", "throughput"


class _Stamps(StoppingCriteria):
    """Never stops; notes when a number of new tokens is there."""

    def __init__(self, device: torch.device, counts: tuple[int, ...]):
        self._device, self._counts, self._steps = device, counts, 0
        self.seconds: dict[int, float] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._steps += 1
        if self._steps in self._counts:
            synchronize(self._device)
            self.seconds[self._steps] = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_throughput(bench: Bench) -> list[Row]:
    """Rows of the first image size at every batch size, and on accelerators at the largest that fits."""
    settings, size = bench.settings, bench.settings.images[0]
    ours = bench.ours(size, [settings.lead_method], [settings.middle_ratio])
    stock = stock_variant(bench.models, size)
    variants = [stock, *map(limit_of, ours), *ours]
    # A short warm-up: whole calls take long, and have their first steps over with soon.
    for variant in variants if settings.preset.thorough else variants[:1]:
        _generate(bench, bench.images(size), variant, (2,))
    rows = []
    for batch in settings.batches:
        rows += _rows_at(bench, size, dict.fromkeys(variants, batch), settings.new_tokens)
    if bench.device.type == "cpu":
        bench.lacks("The largest batch that fits was not measured: it is searched on accelerators only.")
        return rows
    fewest = min(settings.new_tokens)
    largest = {variant: _largest_batch(bench, size, variant, fewest) for variant in variants}
    where = {"image": bench.images(size).name, "new_tokens": fewest}
    for variant, batch in largest.items():
        rows.append(measured(PART, "largest batch", "images", [batch], variant, **where))
    return rows + _rows_at(bench, size, largest, (fewest,))


def _rows_at(bench: Bench, size: tuple[int, int], batches: dict[Variant, int], new_tokens: tuple[int, ...]) -> list[Row]:
    """Throughput of every variant at its own batch size, and their ratios."""

    def run(variant: Variant) -> dict[int, float] | None:
        try:
            return _generate(bench, bench.images(size, batches[variant]), variant, new_tokens)
        except torch.OutOfMemoryError:
            return None
        finally:
            # Outside of the handler, whose traceback would keep what it failed on.
            _give_back_memory(bench.device)

    runs = {variant: functools.partial(run, variant) for variant in batches if batches[variant]}
    results = interleave(runs, bench.settings.repeats_of(PART), warm_up=())
    for variant in list(results):
        if None in results[variant]:
            bench.lacks(f"The throughput of {variant} at batch {batches[variant]} was not measured: it ran out of memory.")
            del results[variant]
    stock = next((variant for variant in results if variant.kind == "stock"), None)
    rows = []
    for count in new_tokens:
        where = {"image": bench.images(size).name, "new_tokens": count}
        rates = {
            variant: [batches[variant] * count / run[count] for run in runs_of if run is not None]
            for variant, runs_of in results.items()
        }
        for variant, values in rates.items():
            place = {**where, "batch": batches[variant]}
            rows.append(measured(PART, THROUGHPUT, "tokens/s", values, variant, **place))
            if stock is not None and variant is not stock:
                rows.append(compared(PART, f"{THROUGHPUT} over stock", values, rates[stock], variant, **place))
            if variant.kind == "ours" and limit_of(variant) in rates:
                others = rates[limit_of(variant)]
                rows.append(compared(PART, f"{THROUGHPUT} over limit", values, others, variant, **place))
    return rows


@torch.inference_mode()
def _generate(bench: Bench, images: Images, variant: Variant, new_tokens: tuple[int, ...]) -> dict[int, float]:
    """Seconds from pixel values to each number of new tokens."""
    model = model_of(bench.models, variant)
    stamps = _Stamps(bench.device, new_tokens)
    # Without an end-of-sequence token, so that a random model does not stop early.
    settings = GenerationConfig(max_new_tokens=max(new_tokens), do_sample=False, pad_token_id=0, eos_token_id=None)
    synchronize(bench.device)
    start = time.perf_counter()
    inputs = model_inputs(bench.models, images, variant)
    model.generate(**inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([stamps]))
    return {count: stamp - start for count, stamp in stamps.seconds.items()}


def _largest_batch(bench: Bench, size: tuple[int, int], variant: Variant, new_tokens: int) -> int:
    def fits(batch: int) -> bool:
        try:
            _generate(bench, bench.images(size, batch), variant, (new_tokens,))
        except torch.OutOfMemoryError:
            fitted = False
        else:
            fitted = True
        _give_back_memory(bench.device)
        bench.say(f"{variant}: a batch of {batch} {'fits' if fitted else 'does not fit'}")
        return fitted

    return largest_batch(fits, start=max(bench.settings.batches))


def _give_back_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
