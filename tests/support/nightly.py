"""What a commit tests of a matrix, and what the night does: `mostly_nightly`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_nightly(cases: Iterable[Any], of_a_commit: Callable[..., bool]) -> list[Any]:
    """`cases` for `parametrize`, of which only those that `of_a_commit` is true of run with every commit.

    The others are marked `nightly`. A case that is a tuple has one value for each parameter.
    """
    split = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=() if of_a_commit(*values) else pytest.mark.nightly) for values in split]
