"""Part "memory": the peak of a vision pass and of a prefill, what scoring adds to stock's pass, and FLOPs.

Memory and operations are the same each time, so each is measured once.
"""

import functools

import torch

from hivtp_hf.pruning.attention_scores import received_attention
from hivtp_hf.pruning.evidence import Evidence
from hivtp_hf.pruning.features import gather_evidence
from hivtp_hf.pruning.registry import pruning_method

from .bench import Bench
from .flops import count_flops
from .images import token_layout
from .peak_memory import peak_memory
from .rows import Row, measured
from .variants import (
    Variant,
    first_token,
    has_published_way,
    image_features,
    limit_of,
    published_of,
    stock_variant,
)

PART = "memory"
VISION_PEAK, PREFILL_PEAK = "peak memory of the vision pass", "peak memory to the first token"
EXTRA_PEAK, ALONE_PEAK = "extra peak memory over stock's vision pass", "peak memory of scoring and selection alone"


def measure_memory(bench: Bench) -> list[Row]:
    """Rows of the first image size."""
    settings, size = bench.settings, bench.settings.images[0]
    methods = settings.methods
    rows = []
    for batch in settings.preset.memory_batches:
        # A large batch takes minutes where a pass takes seconds.
        whole = methods if settings.preset.thorough or batch == 1 else methods[:1]
        rows += _vision_rows(bench, size, batch, bench.ours(size, whole, [settings.middle_ratio]))
        rows += _alone_rows(bench, size, batch, bench.ours(size, methods, [settings.middle_ratio]))
    return rows + _prefill_rows(bench, size)


def _vision_rows(bench: Bench, size: tuple[int, int], batch: int, ours: list[Variant]) -> list[Row]:
    images, models = bench.images(size, batch), bench.models
    stock = stock_variant(models, size)
    published = [published_of(variant) for variant in ours if batch == 1 and has_published_way(variant.method)][:1]
    where = {"image": images.name, "batch": batch}
    peaks = {}
    for variant in (stock, *ours, *published):
        peaks[variant] = peak_memory(bench.device, functools.partial(image_features, models, images, variant))
    rows = [measured(PART, VISION_PEAK, "bytes", [peak], variant, **where) for variant, peak in peaks.items()]
    for variant in (*ours, *published):
        rows.append(measured(PART, EXTRA_PEAK, "bytes", [peaks[variant] - peaks[stock]], variant, **where))
    return rows


def _alone_rows(bench: Bench, size: tuple[int, int], batch: int, ours: list[Variant]) -> list[Row]:
    """Scoring of one layer, and the selection, on random tensors of the batch's shapes.

    While they run, stock's pass holds no more than at its own peak; so by no more than this can they raise the peak.
    """
    config, device, dtype = bench.models.config, bench.device, bench.models.dtype
    vision, width = config.vision_config, config.text_config.hidden_size
    heads, cells = vision.num_attention_heads, (vision.image_size // vision.patch_size) ** 2
    family = bench.models.pruned.model.family
    encoder = family.encoder_facts(config, {})
    rows = []
    for variant in ours:
        layouts = [token_layout(config, size, variant.method, variant.ratio)] * batch
        pruning, tiles, method = layouts[0].pruning, batch * layouts[0].num_views, pruning_method(variant.method)
        layers, peak = pruning.scored_layers(encoder), 0
        reads_class_attention = Evidence.CLASS_ATTENTION in method.reads(pruning)[0]
        if layers:
            shape = (tiles, heads, cells + 1, vision.hidden_size // heads)
            query, key = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            read = query[:, :, :1] if reads_class_attention else query
            peak = peak_memory(device, functools.partial(received_attention, read, key, shape[-1] ** -0.5, heads))
            del query, key, read
        features = [torch.randn(layouts[0].num_stock, width, device=device, dtype=dtype) for _ in range(batch)]
        of_tokens = {layer: torch.rand(tiles, cells + 1, device=device) for layer in layers}
        scores = {layer: family.cell_scores(bench.models.pruned.model, [found], layouts) for layer, found in of_tokens.items()}
        of_kinds = ({}, scores) if reads_class_attention else (scores, {})
        evidence = gather_evidence(features, layouts, *of_kinds, encoder)
        chosen = peak_memory(device, functools.partial(evidence.ask, method, method.select, pruning))
        where = {"image": bench.images(size).name, "batch": batch}
        rows.append(measured(PART, ALONE_PEAK, "bytes", [max(peak, chosen)], variant, **where))
    return rows


def _prefill_rows(bench: Bench, size: tuple[int, int]) -> list[Row]:
    settings, models, images = bench.settings, bench.models, bench.images(size)
    ours = bench.ours(size, [settings.lead_method], settings.ratios if settings.preset.thorough else [settings.middle_ratio])
    with_maps = [variant for variant in ours if has_published_way(variant.method)][:1]
    where = {"image": images.name, "batch": 1}
    rows = []
    for variant in (stock_variant(models, size), *map(limit_of, ours), *ours, *map(published_of, with_maps)):
        flops: list[int] = []

        def run(chosen: Variant = variant, counted: list[int] = flops) -> None:
            # Counted in the same call, as a pass takes long on some machines. The counter itself takes no tensors.
            counted.append(count_flops(functools.partial(first_token, models, images, chosen)))

        rows.append(measured(PART, PREFILL_PEAK, "bytes", [peak_memory(bench.device, run)], variant, **where))
        rows.append(measured(PART, "FLOPs to the first token", "FLOPs", flops, variant, **where))
    return rows
