"""The results: one row for every quantity of every variant, as CSV."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .environment import Environment
from .spread import median_interval, spread
from .variants import Variant

RATIO = "ratio"


@dataclass(frozen=True)
class Row:
    """One quantity of one variant.

    Attributes:
        part: of the benchmark.
        quantity, unit: what was measured; seconds, bytes, FLOPs, tokens/s, images, tokens, or a ratio.
        variant, method, ratio: "stock", "limit", "ours" or "published"; empty where there is no such choice.
        image: height x width in pixels.
        batch: images at once.
        new_tokens: generated, where that is said.
        tokens: image tokens of one prompt.
        median ... repeats: the spread over rounds.
        low, high, coverage: of ratios, an interval for the median and the probability that it holds it.
        note: for people.
    """

    part: str
    quantity: str
    unit: str
    median: float
    q25: float
    q75: float
    min: float
    max: float
    repeats: int
    variant: str = ""
    method: str = ""
    ratio: float | None = None
    image: str = ""
    batch: int | None = None
    new_tokens: int | None = None
    tokens: int | None = None
    low: float | None = None
    high: float | None = None
    coverage: float | None = None
    note: str = ""


# For people who read the file: what it is about first, then the numbers, then where they are from.
_COLUMNS = (
    *("part", "quantity", "unit", "variant", "method", "ratio", "image", "batch", "new_tokens", "tokens"),
    *("median", "q25", "q75", "min", "max", "repeats", "low", "high", "coverage", "note"),
)


def measured(part: str, quantity: str, unit: str, values: Sequence[float], variant: Variant | None = None, **where: Any) -> Row:
    """The row of a quantity's values; `where` are further columns."""
    chosen: dict[str, Any] = {}
    if variant is not None:
        chosen = {
            "variant": variant.kind,
            "method": variant.method,
            "ratio": variant.ratio,
            "tokens": variant.image_tokens,
        }
    return Row(part, quantity, unit, *spread(values), **{**chosen, **where})


def compared(
    part: str,
    quantity: str,
    values: Sequence[float],
    others: Sequence[float],
    variant: Variant | None = None,
    **where: Any,
) -> Row:
    """The row of a ratio, value by other value of the same round."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    interval = median_interval(ratios)._asdict() if len(ratios) > 1 else {}
    return measured(part, quantity, RATIO, ratios, variant, **interval, **where)


def write_rows(path: Path, rows: Iterable[Row], environment: Environment) -> None:
    """Writes the rows, each with the environment's columns."""
    names = [field.name for field in fields(Environment)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*_COLUMNS, *names], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            columns = {name: _shown(value) for name, value in asdict(row).items()}
            writer.writerow({**columns, **asdict(environment)})


def _shown(value: Any) -> Any:
    """Numbers with as many digits as mean something."""
    return f"{value:.6g}" if isinstance(value, float) else value
