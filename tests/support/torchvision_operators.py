"""A plugin of pytest by which torchvision is imported beside a torch built for the CPU.

The registry's builds of torchvision are for CUDA, and there its compiled operators do not load. What wants them at once is two
lines that say what some of them return; once these operators are declared, all that is Python works, the transforms of
transformers' video processors among it. Whoever has a torchvision for the CPU gets that one's own operators.

It comes first, by `-p`, as transformers imports torchvision early.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing_operators() -> None:
    """Declares the operators that torchvision's Python expects, where the compiled ones cannot be had."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise ValueError("torchvision is not installed; `make .venv-video/installed` makes an environment that has it.")
    for library in Path(found.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", _SCHEMA)


declare_missing_operators()
