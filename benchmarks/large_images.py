"""What choosing costs in the packed tower of Qwen2.5-VL: memory at the largest image, time at true width.

Run by `python -m benchmarks.large_images`; about 15 minutes on two quiet cores. Random weights: nothing is downloaded.

* Memory: an image of 4000 x 3000 pixels, 214 x 286 patches and 15,301 tokens, the model's own largest budget. The tower is
  narrow (two heads of 16, one block within windows and two over the whole image), since what is measured is what methods
  add, and that depends on the grid. Peaks are those of torch's own allocations.
* Time: blocks of the true width (1280, 16 heads of 80) on 8,112 patches, lmms-eval's limit, with and without one scored block.
"""

import functools
import statistics
import time
from typing import Any

import torch
import transformers

from hivtp_hf import HIVTPQwen2_5_VLConfig, HIVTPQwen2_5_VLModel
from hivtp_hf.pruning.attention_interface import CollectedAttention
from hivtp_hf.pruning.registry import METHODS

from .speed.peak_memory import peak_memory

_LARGEST = (1, 214, 286)
_AT_TRUE_WIDTH = (1, 78, 104)
_ROUNDS = 5
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}


def _model(pruning: Any, **vision: Any) -> HIVTPQwen2_5_VLModel:
    torch.manual_seed(0)
    config = HIVTPQwen2_5_VLConfig(
        text_config=_TEXT, vision_config={"out_hidden_size": 64, **vision}, pruning_config=pruning, image_token_id=190
    )
    return HIVTPQwen2_5_VLModel(config).eval()


def _image(model: HIVTPQwen2_5_VLModel, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    patches = grid[1] * grid[2]
    return {"pixel_values": torch.randn(patches, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([grid])}


@torch.inference_mode()
def memory_rows() -> list[str]:
    """Peaks of the vision pass under every method, beyond that of a ratio of 1, which is stock's."""
    narrow = {"depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [1, 2]}
    model, rows, device = (
        _model(None, **narrow),
        ["| method | peak, MiB | beyond stock, MiB |", "|---|---|---|"],
        torch.device("cpu"),
    )
    image, peaks = _image(model, _LARGEST), {}
    for method in ("none", *(name for name in METHODS if name not in ("none", "cls_attention"))):
        ratio = {} if method == "none" else {"retention_ratio": 0.25}
        model.config.pruning_config = {"method": method, **ratio}
        peaks[method] = peak_memory(device, functools.partial(model.get_image_features, **image)) / 2**20
        name = "stock" if method == "none" else f"`{method}`"
        rows.append(f"| {name} | {peaks[method]:.0f} | {peaks[method] - peaks['none']:.0f} |")
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def time_rows() -> list[str]:
    """The tower's time with one scored block over that without, in turn, and what the scoring of one block takes."""
    true_width = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    model = _model({"method": "none"}, depth=2, fullatt_block_indexes=[0, 1], **true_width)
    image = _image(model, _AT_TRUE_WIDTH)
    tower = functools.partial(model.visual, image["pixel_values"], grid_thw=image["image_grid_thw"])
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(_ROUNDS + 1):
        for scored in (False, True):
            start = time.perf_counter()
            model._received_attention_tap.call(tower, CollectedAttention([1] if scored else []))
            if number:  # the first round is a warm-up
                times[scored].append(time.perf_counter() - start)
    plain = statistics.median(times[False])
    ratios = [with_score / without for with_score, without in zip(times[True], times[False], strict=True)]
    extra = (statistics.median(ratios) - 1) * plain
    middle = statistics.median(ratios)
    return [
        f"Two blocks over the whole image take {plain:.1f} s without scores.",
        f"With one scored block: {middle:.3f} times that ({min(ratios):.3f} to {max(ratios):.3f}), median of {_ROUNDS} rounds.",
        f"So scoring a block takes {extra:.1f} s, {extra / (plain / 2):.2f} of a block.",
    ]


def main() -> None:
    """Prints both parts."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, float32")
    memory_rows()
    print("\n".join(time_rows()))


if __name__ == "__main__":
    main()
