"""`placing`: where a command's model runs."""

from typing import Any

import torch


def placing(device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of a device; a ValueError for one that cannot be used here."""
    if device == "auto":
        # An accelerator that is too small for the whole language model shares it with the CPU.
        return {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        torch.zeros(1, device=device).item()  # not every device that has a name is there, or holds data
    except Exception as error:  # each back end raises its own, some with many lines
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"`--device` is {device!r}, which cannot be used here: {reason}. Give auto, cpu, or another device of torch that "
            "this machine has, such as cuda:0."
        ) from None
    return {"device_map": {"": device}}
