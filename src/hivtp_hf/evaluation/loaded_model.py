"""The model and the processor of a run, with settings that prune nothing: those of the variants count."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import CheckpointSource
from ..pruning_config import VisualTokenPruningConfig

_UNPRUNED = VisualTokenPruningConfig(method="none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def checked_device(name: str) -> torch.device:
    """The device that `--device` means; "auto" is CUDA's where torch sees one. ValueError where it is missing or unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`--device` is {name!r}; it must be 'auto', 'cpu', 'cuda' or 'cuda:' and a number.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`--device` is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here. Give "
            "'cpu', or install a torch that fits the accelerator."
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")


def check_dtype(name: str) -> None:
    """A ValueError unless `--dtype` is one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"`--dtype` is {name!r}; it must be one of {', '.join(DTYPES)}, where auto is the checkpoint's own.")


def base_without_weights(source: CheckpointSource) -> Any:
    """The base model as its configuration says, without memory for weights: for asking what it can do."""
    config = source.family.config.from_pretrained(source.folder, pruning_config=_UNPRUNED, local_files_only=True)
    with torch.device("meta"):
        return source.family.base_model(config)


def check_settings(base: Any, settings: Mapping[str, VisualTokenPruningConfig]) -> None:
    """A ValueError where some method's settings do not fit the vision tower."""
    for method, pruning in settings.items():
        try:
            base._feature_layer(pruning)
        except ValueError as error:
            raise ValueError(f"{error} Here: `--set {method}.NAME=VALUE`, or leave {method} out of `--methods`.") from error


def load_processor(source: CheckpointSource) -> Any:
    """The processor of a checkpoint."""
    return source.family.processor.from_pretrained(
        source.folder, pruning_config=_UNPRUNED, trust_remote_code=False, local_files_only=True
    )


def load_model(source: CheckpointSource, device: torch.device, dtype: str, cache_dir: Path | None) -> Any:
    """The model of a checkpoint, on a device. Its weights must be downloaded by now."""
    placing = {"device_map": {"": str(device)}} if device.type == "cuda" else {}
    model = source.family.model.from_pretrained(
        source.folder, pruning_config=_UNPRUNED, dtype=dtype, cache_dir=cache_dir, local_files_only=True, **placing
    )
    return model.eval()
