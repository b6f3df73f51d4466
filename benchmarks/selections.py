"""What choosing costs once the evidence is there, for every method: time of one core and memory beside the vision tower.

Run by `python -m benchmarks.selections`; about ten minutes on one core. `python -m benchmarks.selections large scope dpp` runs
a part: "tiles", "large" or "tower", and of the methods those that are named. Features and attention are made up: nothing is
downloaded.

* Five tiles of LLaVA-NeXT: 2,880 cells of 24 x 24 each, projected features of 4,096 numbers, 1,024 before the projector.
* One image of Qwen-VL of 78 x 104 = 8,112 tokens, features of 3,584 numbers.
* The tower of the former, CLIP-L/336 with random weights, on the same core.

Time is that of the process, so that neighbours on the machine count for little. How many gains the coverage methods compute
depends on the features. These are mixtures of forty directions and noise, so that cells resemble each other as those of an
image do.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hivtp_hf import StitchedViews, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.pruning.evidence import EncoderFacts, VisualEvidence
from hivtp_hf.pruning.features import choose_and_merge
from hivtp_hf.pruning.registry import METHODS

from .speed.peak_memory import peak_memory

_RATIOS = (Fraction(2, 9), Fraction(1, 18))
_ROUNDS = {"tiles": 5, "large": 1}
_DIRECTIONS, _NOISE = 40, 0.3


def _features(number: int, hidden: int, generator: torch.Generator) -> Tensor:
    """Mixtures of a few directions, and noise: (number, hidden)."""
    shares = torch.randn(number, _DIRECTIONS, generator=generator).mul_(2).softmax(-1)
    mixed = shares @ torch.randn(_DIRECTIONS, hidden, generator=generator)
    return mixed.add_(torch.randn(number, hidden, generator=generator), alpha=_NOISE)


def _evidence(case: str, pruning: VisualTokenPruningConfig) -> VisualEvidence:
    """All that a method may look at but pixels, of one image."""
    generator = torch.Generator().manual_seed(0)
    if case == "tiles":
        layout, hidden = TokenLayout.from_image_size(672, 672, pruning), 4096
        encoded = list(_features(layout.num_cells, 1024, generator).view(layout.num_views, -1, 1024))
        encoder = EncoderFacts(24, 22)
    else:
        layout, hidden, encoded = TokenLayout(None, pruning, [StitchedViews(78, 104)]), 3584, None
        encoder = EncoderFacts(32, 31, {"importance_layers": (15, 23), "object_layer": 15})
    layers = pruning.scored_layers(encoder)
    scores = {layer: torch.rand(layout.num_cells, generator=generator).pow(4) for layer in layers}
    class_attention = scores if case == "tiles" else {}
    features = [_features(layout.num_stock, hidden, generator)]
    size = 64 if case == "tiles" else 80
    keys = {layer: torch.randn(layout.num_cells, size, generator=generator) for layer in layers}
    # The projector is stock's own, and not measured here.
    return VisualEvidence([layout], features, scores, class_attention, encoder, scores, None, encoded, keys)


def _seconds(call: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median, least and most of some calls, in seconds of this process; with one round no call is a warm-up."""
    times = []
    for number in range(rounds + (rounds > 1)):
        start = time.process_time()
        call()
        if number or rounds == 1:
            times.append(time.process_time() - start)
    return statistics.median(times), min(times), max(times)


@torch.inference_mode()
def rows(case: str, methods: list[str]) -> None:
    """Prints a table of one case: what a method's choice takes at every ratio, and its peak at the larger one."""
    print(f"\n| method | {' | '.join(f'{ratio}, ms' for ratio in _RATIOS)} | peak, MiB |\n|---|---|---|---|")
    for method in methods:
        if case == "large" and method == "cls_attention":  # these towers have no class token
            continue
        cells, peak = [], 0.0
        for ratio in _RATIOS:
            settings: dict[str, Any] = {"entropy_weight": 0.0} if method == "vflowopt" else {}  # without pixels
            pruning = VisualTokenPruningConfig(method, retention_ratio=float(ratio), **settings)
            call = functools.partial(choose_and_merge, _evidence(case, pruning))
            middle, least, most = (f"{1000 * seconds:.1f}" for seconds in _seconds(call, _ROUNDS[case]))
            cells.append(middle if _ROUNDS[case] == 1 else f"{middle} ({least} to {most})")
            peak = peak or peak_memory(torch.device("cpu"), call) / 2**20
        print(f"| `{method}` | {' | '.join(cells)} | {peak:.0f} |", flush=True)


@torch.inference_mode()
def tower_row() -> None:
    """Prints what the tower of the five tiles takes."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336, patch_size=14
    )
    tower, tiles = CLIPVisionModel(config).eval(), torch.randn(5, 3, 336, 336)
    seconds, _, _ = _seconds(functools.partial(tower, tiles), 1)
    print(f"\nThe tower of five tiles, 23 layers, takes {seconds:.1f} s of a core.", flush=True)


def main() -> None:
    """Prints all tables, or those of the parts and methods that are named."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, float32, process time")
    parts = [part for part in (*_ROUNDS, "tower") if part in sys.argv[1:]] or [*_ROUNDS, "tower"]
    methods = [name for name in sys.argv[1:] if name in METHODS]
    methods = methods or [name for name, method in METHODS.items() if not method.keeps_everything]
    for case in _ROUNDS:
        if case in parts:
            rows(case, methods)
    if "tower" in parts:
        tower_row()


if __name__ == "__main__":
    main()
