"""The registry of pruning methods.

One entry says everything that the rest of the package must know of a method: its hyperparameters and their ranges, the
encoder layers whose attention it reads, and how to import its selector. Selectors are imported when they are asked for,
so a method that nobody uses costs nothing at import time.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# More than any setting means, and a number that every float and every printed message can hold.
LARGEST_WHOLE_NUMBER = 10**100


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
        allowed += f" to {maximum}"
    inside = (
        number is not None
        and (number > minimum if above_minimum else number >= minimum)
        and (maximum is None or number <= maximum)
        and math.isfinite(number)
    )
    if not inside:
        raise ValueError(f"`{field}` is {shown(value)}; it must be {allowed}.")
    return number


@dataclass(frozen=True)
class Hyperparameter:
    """One number that belongs to one method: its name, type, default and inclusive range."""

    name: str
    kind: type
    default: float
    minimum: float
    maximum: float | None = None

    def checked(self, value: Any) -> Any:
        """`value` as an `int` or `float` inside the range; ValueError otherwise."""
        return checked_number(self.name, value, self.kind, self.minimum, self.maximum)


class Selector(NamedTuple):
    """The two functions of a method's selector file.

    `select(scores, valid, pruning)` returns the mask of kept cells; `count(valid, pruning)` returns how many cells each
    tile keeps. `valid` is bool of shape (tiles, grid, grid), `scores` is a float tensor of the same shape.
    """

    select: Callable[..., Any]
    count: Callable[..., Any]


@dataclass(frozen=True)
class PruningMethod:
    """A way to choose visual tokens.

    Attributes:
        name: what `pruning_config.method` says.
        hyperparameters: its own numbers, beside those that all methods share.
        scored_layers: from a pruning config to the encoder layers (0-based, ascending) whose attention it reads. Lazy where
            settings bound it: it is asked for before they are held against an encoder's depth.
        load_selector: imports and returns its selector.
        content_dependent_count: whether its published selection keeps a number that depends on the image's content, so that
            `exact_count=False` means something.
    """

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    scored_layers: Callable[[Any], Sequence[int]]
    load_selector: Callable[[], Selector]
    content_dependent_count: bool = False


def _hivtp_layers(pruning: Any) -> Sequence[int]:
    first = pruning.importance_start_layer
    return range(first, first + pruning.importance_num_layers)


def _hivtp_selector() -> Selector:
    from .selectors_hivtp import count_hivtp, select_hivtp

    return Selector(select=select_hivtp, count=count_hivtp)


METHODS: dict[str, PruningMethod] = {
    method.name: method
    for method in (
        PruningMethod(
            name="hivtp",
            hyperparameters=(
                Hyperparameter("global_ratio", float, 0.25, 0, 1),
                Hyperparameter("local_window", int, 2, 1),
                Hyperparameter("regions", int, 2, 1),
                Hyperparameter("importance_start_layer", int, 6, 0),
                Hyperparameter("importance_num_layers", int, 3, 1),
            ),
            scored_layers=_hivtp_layers,
            load_selector=_hivtp_selector,
            content_dependent_count=True,
        ),
    )
}


def pruning_method(name: Any) -> PruningMethod:
    """The entry called `name`; a ValueError lists the known names."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(f"`method` is {shown(name)}; it must be one of {', '.join(map(repr, METHODS))}.")
    return method
