"""The retention ratio of one call, on its way from the processor to the model.

It travels as one more model input: int64, the bits of the float64 value, one number per image. As floats the ratios would be
cast with the pixels wherever inputs are brought to the model's dtype, and a ratio in bfloat16 keeps another number of
tokens than the processor has written placeholders for.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checked_values import shown
from .settings import checked_ratio


def bits_of_ratio(ratio: float) -> int:
    """The bits of a float64 as a whole number that int64 can hold."""
    return struct.unpack("<q", struct.pack("<d", ratio))[0]


def ratio_of_bits(bits: int) -> float:
    """The float64 whose bits are `bits`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]


# No ratio that means anything is smaller, while whole numbers that somebody took for a ratio are, read as bits.
SMALLEST_RATIO = 2.0**-64


def ratios_of_images(given: Any, num_images: int) -> list[float] | None:
    """The ratio of every image.

    Args:
        given: what a model's `retention_ratio` holds: int64 (num_images,) from a processor; a number, for all images; a
            sequence or float64 tensor of numbers, one per image; or None.
        num_images: how many images the call has.

    Returns:
        A float per image, or None where none is given.

    Raises:
        ValueError: for another number of ratios, ratios that are out of range, and tensors of other types.
    """
    if given is None:
        return None
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if not isinstance(given, (Tensor, Sequence)) or isinstance(given, str):
        return [checked_ratio(given)] * num_images
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int64, torch.float64):
            raise ValueError(
                f"`retention_ratio` is a tensor of {given.dtype}; it must be int64, as the processor returns it (the bits of "
                "float64 values), or float64. Lower precision would keep another number of tokens."
            )
        ratios = given.flatten().tolist()
        if given.dtype == torch.int64:
            numbers, ratios = ratios, [ratio_of_bits(number) for number in ratios]
            if not all(SMALLEST_RATIO <= ratio <= 1 for ratio in ratios):
                raise ValueError(
                    f"`retention_ratio` holds {shown(numbers)}, read as {shown(ratios)}; as int64 it must hold the bits of "
                    "float64 values above 0 and at most 1. Pass it as the processor returned it, or as a plain number."
                )
    else:
        ratios = list(given)
    if len(ratios) != num_images:
        raise ValueError(
            f"`retention_ratio` holds {shown(ratios)}, {len(ratios)} values, and there are {num_images} images; give one for "
            "each image, or a single number for all."
        )
    return [checked_ratio(ratio) for ratio in ratios]
