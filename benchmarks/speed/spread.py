"""Medians, their spread, and how far a median can be trusted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Of some values the median, the quartiles, both ends, and how many there are."""

    median: float
    q25: float
    q75: float
    minimum: float
    maximum: float
    repeats: int


class Interval(NamedTuple):
    """Two values with a median between them, and the probability that they enclose the true one."""

    low: float
    high: float
    coverage: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    low, q25, median, q75, high = np.percentile(values, [0, 25, 50, 75, 100])
    return Spread(float(median), float(q25), float(q75), float(low), float(high), len(values))


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest interval between two of the ordered values that holds the true median with 95 %.

    It takes nothing for granted but that values are independent: the number of values below the median is binomial. Fewer than
    six values do not reach 95 %; then both ends are returned, with the probability that they do reach.
    """
    ordered, n = sorted(values), len(values)
    outside, kept, coverage = 0.0, 0, 0.0
    for left_out in range((n + 1) // 2):
        outside += 2 * math.comb(n, left_out) / 2**n
        if left_out > 0 and 1 - outside < _CONFIDENCE:
            break
        kept, coverage = left_out, max(0.0, 1 - outside)
    return Interval(ordered[kept], ordered[n - 1 - kept], coverage)
