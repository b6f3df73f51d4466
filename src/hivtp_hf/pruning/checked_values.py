"""Values that a person wrote, checked and shown: what every setting of the package goes through."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

# More than any setting means, and a number that every float and every printed message can hold.
LARGEST_WHOLE_NUMBER = 10**100
# Bounds on time and memory, far from any model: LLaVA-NeXT's largest image has 2880 cells. A side is what image libraries hold.
LARGEST_SIDE = 2**31 - 1
MOST_CELLS = 2**17


def shown(value: Any) -> str:
    """`value` and its type for an error message: never more than a line or two, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # Python writes no integer of thousands of digits, and no list that is nested too deep
        text = "a value that cannot be printed"
    if len(text) > 500:
        text = f"{text[:400]} ... {text[-50:]}"
    return f"{text} ({type(value).__name__})"


def checked_number(
    field: str,
    value: Any,
    kind: type,
    minimum: float,
    maximum: float | None = None,
    above_minimum: bool = False,
) -> Any:
    """`value` as a plain `kind` (int or float) if it lies in the range.

    Booleans, strings and tensors are refused rather than converted: in a configuration they are slips of the pen.

    Args:
        field: the name to put into the error.
        value: what was given; NumPy scalars count as numbers.
        kind: `int` or `float`.
        minimum: the smallest allowed value.
        maximum: the largest allowed value, or None.
        above_minimum: whether `minimum` itself is outside the range.

    Raises:
        ValueError: names the field, the value and the allowed range.
    """
    family = numbers.Integral if kind is int else numbers.Real
    number = None
    if isinstance(value, family) and not isinstance(value, bool):
        try:
            number = kind(value)
        except OverflowError:  # an integer beyond the range of a float
            number = None
    allowed = f"a number above {minimum}" if above_minimum else f"a number from {minimum}"
    if kind is int:
        allowed = allowed.replace("a number", "a whole number")
    if kind is int and maximum is None and number is not None and number > LARGEST_WHOLE_NUMBER:
        maximum = LARGEST_WHOLE_NUMBER
    if maximum is not None:
        allowed += f" and at most {maximum}" if above_minimum else f" to {maximum}"
    inside = (
        number is not None
        and (number > minimum if above_minimum else number >= minimum)
        and (maximum is None or number <= maximum)
        and math.isfinite(number)
    )
    if not inside:
        raise ValueError(f"`{field}` is {shown(value)}; it must be {allowed}.")
    return number


def checked_flag(field: str, value: Any) -> bool:
    """`value` if it is True or False; a ValueError that names the field otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"`{field}` is {shown(value)}; it must be True or False.")
    return value


def checked_choice(field: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`; a ValueError that names the field and all of them otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{field}` is {shown(value)}; it must be one of {', '.join(map(repr, choices))}.")
    return str(value)


def checked_layers(field: str, value: Any) -> tuple[int, ...]:
    """Encoder layers, counted from 0, ascending and each once; a ValueError otherwise.

    Args:
        field: how to name them.
        value: one layer, several in a list, or as text with + between: 7, [7, 15] and "7+15" are layers.
    """
    given = value.split("+") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        layers = {checked_number(field, int(layer) if isinstance(layer, str) else layer, int, 0) for layer in given}
    except ValueError:
        layers = set()
    if not layers:
        raise ValueError(f"`{field}` is {shown(value)}; it must be encoder layers from 0, such as [7, 15] or 7+15.")
    return tuple(sorted(layers))


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
