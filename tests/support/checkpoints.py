"""What several test files share: tiny checkpoints on disk, and processes in which the package cannot be imported."""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from families import FAMILIES
from forked import run_python
from tiny_checkpoint import build_stock_checkpoint

# 8 x 8 cells a tile: every path of the code, a fraction of a second.
GEOMETRY = {"tile_size": 56, "patch_size": 7}

# From the names of a stock model in memory to those in a weight file; the first prefix that fits is replaced.
_SAVED = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
KEY_LAYOUTS = {
    "hub": {"model.vision_tower.": "vision_tower.vision_model.", **_SAVED},
    "saved_by_stock": _SAVED,
    "in_memory": {},
}

_PROGRAM = """
import json
import sys

# None makes an import fail, also where the package is installed.
for name in ("hivtp_hf", "torchvision"):
    sys.modules[name] = None
try:
    import hivtp_hf
except ImportError:
    pass
else:
    raise RuntimeError("hivtp_hf can be imported here")

{source}
result = {name}(**json.loads(sys.argv[1]))
print()  # transformers' question whether to trust ends without a line break
print(json.dumps(result))
"""


def build_pruned_checkpoint(folder: Path, pruning: dict[str, Any], family: str = "llava_next", **geometry: Any) -> Path:
    """A checkpoint that our classes saved: weights, settings, processor and the .py files.

    `geometry` goes to `tiny_config`, in addition to `GEOMETRY`. The stock checkpoint lies beside it, as "stock_source".
    """
    stock = build_stock_checkpoint(folder / "stock_source", family=family, **{**GEOMETRY, **geometry})
    pruned = folder / "pruned"
    FAMILIES[family].model.from_pretrained(stock, pruning_config=pruning).save_pretrained(pruned)
    FAMILIES[family].processor.from_pretrained(stock, pruning_config=pruning).save_pretrained(pruned)
    return pruned


def write_key_layout(checkpoint: Path, folder: Path, weights: dict[str, Tensor], layout: str) -> Path:
    """A copy of `checkpoint` whose weights are `weights`, named in memory's way, under the names of `layout`."""
    shutil.copytree(checkpoint, folder)

    def renamed(key: str) -> str:
        for old, new in KEY_LAYOUTS[layout].items():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    save_file({renamed(key): weight for key, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def run_without_package(function: Callable[..., Any], work_folder: Path, **arguments: Any) -> Any:
    """What `function(**arguments)` returns in a process of its own, offline, without the package and without torchvision.

    Only the function's source goes there, so it must import what it uses. Arguments and result travel as JSON.
    """
    work_folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work_folder / "modules"), "HF_HUB_OFFLINE": "1"}
    program = _PROGRAM.format(source=inspect.getsource(function), name=function.__name__)
    # It has no input: nobody is there to answer whether remote code is trusted.
    finished = run_python(["-c", program, json.dumps(arguments, default=str)], work_folder, environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])
