"""Part "processor": what counting placeholders adds to the preprocessing of an image."""

import functools
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from examples.tiny_checkpoint import tiny_processor
from hivtp_hf import HIVTPLlavaNextProcessor
from hivtp_hf.pruning import layout as token_layout

from .bench import Bench
from .images import size_name
from .rows import Row, compared, measured
from .stopwatch import TOTAL, Stopwatch

PART, COUNTING = "processor", "counting placeholders"
_PROMPT = "USER: <image>\nWhat is shown in this image? ASSISTANT:"


def measure_processor(bench: Bench) -> list[Row]:
    """Rows of the first image size: stock, ours with the layouts of earlier images remembered, and ours at a new size."""
    settings, size = bench.settings, bench.settings.images[0]
    stock = tiny_processor(bench.models.config)
    ours = HIVTPLlavaNextProcessor(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        pruning_config={"method": settings.lead_method, "retention_ratio": settings.middle_ratio},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    stopwatch = Stopwatch(torch.device("cpu"))

    def run(processor: Any, forget: bool) -> dict[str, float]:
        if forget:
            token_layout._llava_next_layout.cache_clear()
        return stopwatch.run(lambda: processor(images=Image.fromarray(pixels), text=_PROMPT, return_tensors="pt"))[1]

    runs = {
        "stock": functools.partial(run, stock, False),
        "ours": functools.partial(run, ours, False),
        "ours, first image of a size": functools.partial(run, ours, True),
    }
    with (
        mock.patch.object(stock, "_get_number_of_features", stopwatch.timing(COUNTING, stock._get_number_of_features)),
        mock.patch.object(ours, "_get_number_of_features", stopwatch.timing(COUNTING, ours._get_number_of_features)),
    ):
        seconds = bench.in_turn(runs, PART)

    rows = []
    where: dict[str, Any] = {"image": size_name(size), "batch": 1}
    preprocessing = {name: [run[TOTAL] for run in runs_of] for name, runs_of in seconds.items()}
    counting = {name: [run[COUNTING] for run in runs_of] for name, runs_of in seconds.items()}
    for name in seconds:
        rows.append(measured(PART, "preprocessing", "s", preprocessing[name], variant=None, **where, note=name))
        rows.append(measured(PART, COUNTING, "s", counting[name], variant=None, **where, note=name))
        if name != "stock":
            added = [ours - theirs for ours, theirs in zip(counting[name], counting["stock"], strict=True)]
            quantity = "added counting over stock's preprocessing"
            rows.append(compared(PART, quantity, added, preprocessing["stock"], variant=None, **where, note=name))
            quantity = "preprocessing over stock"
            rows.append(compared(PART, quantity, preprocessing[name], preprocessing["stock"], variant=None, **where, note=name))
    return rows
