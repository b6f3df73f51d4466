"""The largest batch that fits: by doubling, then by halving the gap."""

from collections.abc import Callable


def largest_batch(fits: Callable[[int], bool], start: int = 1, precision: int = 8) -> int:
    """The largest number that fits, to within a `precision`-th of itself; 0 where not even `start` does.

    Args:
        fits: whether a number does. What is larger than a number that does not fit is not asked.
        start: where doubling begins.
        precision: the gap that remains is at most a `precision`-th of the result, or none.
    """
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // precision):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
