"""What a token layout is built from: each argument is checked, and bounded."""

import math
import operator
from typing import Any

from .checked_values import shown

# Bounds on time and memory, far from any model: LLaVA-NeXT's largest image has 2880 cells. A side is what image libraries hold.
LARGEST_SIDE = 2**31 - 1
MOST_CELLS = 2**17


def positive_integer(field: str, value: Any, unit: str = "pixels") -> int:
    """`value` as an int if it is a whole number from 1 to `LARGEST_SIDE`; a ValueError that names the field otherwise."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # the latter from tensors that hold no data
        number = 0
    if not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"`{field}` is {shown(value)}; it must be a whole number of {unit} from 1 to {LARGEST_SIDE}.")
    return number


def checked_image_size(image_size: Any) -> tuple[int, int]:
    """Height and width of an image; a ValueError unless they are whole numbers of pixels."""
    try:
        height, width = image_size
    except (TypeError, ValueError):
        raise ValueError(f"`image_size` is {shown(image_size)}; it must be (height, width) in pixels.") from None
    return positive_integer("height", height), positive_integer("width", width)


def checked_view(view: Any) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what a tile shows; a ValueError unless they are finite and in this order."""
    try:
        left, top, right, bottom = map(float, view)
    except (TypeError, ValueError):
        left = top = right = bottom = math.nan
    if not (left < right and top < bottom and all(map(math.isfinite, (left, top, right, bottom)))):
        raise ValueError(f"`view` is {shown(view)}; it must be (left, top, right, bottom) in pixels of the image.")
    return left, top, right, bottom


def checked_pinpoints(pinpoints: Any) -> tuple[tuple[int, int], ...]:
    """The pinpoints, hashable; a ValueError unless there is one and all are whole numbers of pixels."""
    try:
        # A length first: what has none need not end.
        pairs = tuple((height, width) for height, width in pinpoints) if len(pinpoints) else ()
    except (TypeError, ValueError):
        pairs = ()
    if not pairs:
        raise ValueError(f"`pinpoints` is {shown(pinpoints)}; it must be a list of (height, width) in pixels.")
    return tuple((positive_integer("pinpoints", height), positive_integer("pinpoints", width)) for height, width in pairs)
