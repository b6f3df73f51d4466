"""Variants in turn, in another order each round, so that whatever else the machine does meets all of them."""

import random
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def interleave(
    runs: Mapping[Name, Callable[[], Result]], repeats: int, warm_up: Collection[Name], seed: int = 0
) -> dict[Name, list[Result]]:
    """Runs every function once a round.

    Args:
        runs: by name.
        repeats: rounds.
        warm_up: names of those that run once before; their results are dropped.
        seed: of the orders.

    Returns:
        By name the results, one of each round: the i-th ones of two names belong together.
    """
    order = list(runs)
    for name in order:
        if name in warm_up:
            runs[name]()
    results: dict[Name, list[Result]] = {name: [] for name in order}
    shuffled = random.Random(seed)
    for _ in range(repeats):
        shuffled.shuffle(order)
        for name in order:
            results[name].append(runs[name]())
    return results
