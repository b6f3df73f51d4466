"""Part "decode": the time of one more token, with the caches of all variants side by side, in turn from token to token.

A step depends on the cache's length alone, so the leading method stands for all. A step is one forward pass and the choice of
the next token, as greedy decoding does it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from hivtp_hf.pruning.compat import cache_argument

from .bench import Bench
from .interleaving import interleave
from .rows import Row, compared, measured
from .stopwatch import TOTAL, Stopwatch
from .variants import Variant, first_token, limit_of, model_of, stock_variant

PART, DECODE = "decode", "decode per token"
# Steps before the first one that counts.
_WARM_UP = 2


class _Decoding:
    """A variant after its prefill, ready for one more token at a time."""

    def __init__(self, bench: Bench, size: tuple[int, int], variant: Variant, stopwatch: Stopwatch):
        self._models, self._variant, self._stopwatch = bench.models, variant, stopwatch
        start = first_token(bench.models, bench.images(size), variant)
        self._token, self._cache = start.token, start.cache

    def step(self) -> float:
        """Seconds of one more token."""
        model = model_of(self._models, self._variant)
        _, seconds = self._stopwatch.run(functools.partial(self._advance, model))
        return seconds[TOTAL]

    @torch.inference_mode()
    def _advance(self, model: Any) -> None:
        cache = {cache_argument(type(model).forward): self._cache}
        output = model(input_ids=self._token[:, None], use_cache=True, logits_to_keep=1, **cache)
        self._token = output.logits[:, -1].argmax(-1)


def decoding_steps(bench: Bench, size: tuple[int, int], variants: Sequence[Variant]) -> dict[Variant, list[float]]:
    """By variant the seconds of each of the most new tokens that are asked for, all variants in turn from token to token."""
    stopwatch = bench.stopwatch()
    states = {variant: _Decoding(bench, size, variant, stopwatch) for variant in variants}
    runs = {variant: state.step for variant, state in states.items()}
    steps = interleave(runs, _WARM_UP + max(bench.settings.new_tokens), warm_up=())
    return {variant: seconds[_WARM_UP:] for variant, seconds in steps.items()}


def measure_decode(bench: Bench) -> list[Row]:
    """Rows of the first image size, for each number of new tokens: of one run, its first so many steps."""
    settings, size = bench.settings, bench.settings.images[0]
    ours = bench.ours(size, [settings.lead_method], settings.ratios)
    steps = decoding_steps(bench, size, [stock_variant(bench.models, size), *map(limit_of, ours), *ours])
    rows = []
    for new_tokens in settings.new_tokens:
        first = {variant: seconds[:new_tokens] for variant, seconds in steps.items()}
        where = {"image": bench.images(size).name, "batch": 1, "new_tokens": new_tokens}
        for variant, seconds in first.items():
            rows.append(measured(PART, DECODE, "s", seconds, variant, **where))
        for variant in ours:
            others = first[limit_of(variant)]
            rows.append(compared(PART, f"{DECODE} over limit", first[variant], others, variant, **where))
    return rows
