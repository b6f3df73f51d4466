"""Which dtype a run uses, and on CPUs which one is faster there: by a short trial that is recorded."""

import dataclasses

import torch

from .images import random_images
from .models import random_stock_model
from .presets import Preset
from .rows import Row, measured
from .stopwatch import TOTAL, Stopwatch

_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *_NAMED)
TRIAL = "one layer of tower and language model"
_TRIAL_TOKENS, _TRIAL_RUNS = 512, 2


def choose_dtype(name: str, preset: Preset, device: torch.device) -> tuple[torch.dtype, list[Row]]:
    """The dtype called `name`, and what a trial measured if there was one.

    "auto" means bfloat16 on accelerators and float32 for shapes whose times mean nothing. Else, on a CPU, it means the faster
    one of float32 and bfloat16: one layer of the tower on an image's tiles, and one of the language model on 512 tokens.
    """
    if name in _NAMED:
        return _NAMED[name], []
    if name != "auto":
        raise ValueError(f"`--dtype` is {name!r}; it must be one of {', '.join(DTYPE_NAMES)}.")
    if device.type != "cpu":
        return torch.bfloat16, []
    if not preset.real_shapes:
        return torch.float32, []
    seconds = {tried: _trial(preset, device, _NAMED[tried]) for tried in ("float32", "bfloat16")}
    rows = [measured("dtype", TRIAL, "s", values, note=tried) for tried, values in seconds.items()]
    return _NAMED[min(seconds, key=lambda tried: min(seconds[tried]))], rows


@torch.inference_mode()
def _trial(preset: Preset, device: torch.device, dtype: torch.dtype) -> list[float]:
    shallow = dataclasses.replace(
        preset,
        vision={**preset.vision, "num_hidden_layers": 1},
        text={**preset.text, "num_hidden_layers": 1, "vocab_size": 512},
    )
    config = shallow.config()
    model = random_stock_model(config, device, dtype)
    images = random_images(config, preset.images[0], 1, device, dtype)
    embeddings = torch.randn(1, _TRIAL_TOKENS, config.text_config.hidden_size, device=device).to(dtype)
    stopwatch = Stopwatch(device)

    def run() -> None:
        model.model.vision_tower(images.pixel_values[0])
        model.model.language_model(inputs_embeds=embeddings)

    return [stopwatch.run(run)[1][TOTAL] for _ in range(1 + _TRIAL_RUNS)][1:]
