"""Where a model runs, and in which precision."""

from typing import Any

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def checked_device(name: str, *, timed: bool = False) -> torch.device:
    """The device that `--device` means, with its number; "auto" is CUDA's where torch sees one.

    Args:
        name: of the device.
        timed: whether what it does is timed, which is only known for the CPU and CUDA.

    Raises:
        ValueError: for a device that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # not every device that has a name is there, or holds data
        if timed and probe.device.type not in ("cpu", "cuda"):
            raise ValueError("times are taken on the CPU and on CUDA alone")
    except Exception as error:  # each back end raises its own, some with many lines
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"`--device` is {name!r}, which cannot be used here: {reason}. Give auto, cpu, or another device of torch that "
            f"this machine has, such as cuda:0. torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices."
        ) from None
    return probe.device


def checked_dtype(name: str) -> str:
    """What `--dtype` says; a ValueError unless it is one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"`--dtype` is {name!r}; it must be one of {', '.join(DTYPES)}, where auto is the checkpoint's own.")
    return name


def placing(device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of a device; a ValueError for one that cannot be used here."""
    if device == "auto":
        # An accelerator that is too small for the whole language model shares it with the CPU.
        return {"device_map": "auto"} if torch.cuda.is_available() else {}
    return {"device_map": {"": str(checked_device(device))}}
