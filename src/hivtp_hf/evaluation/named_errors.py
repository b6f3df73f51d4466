"""Errors that name the row: what breaks in a batch is looked for row by row."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def naming_the_row(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Result], named: Callable[[Item], str], doing: str
) -> Result:
    """What `work` returns for a batch of items.

    Args:
        items: at least one.
        work: takes a batch, or one item of it, as a sequence.
        named: how to call an item.
        doing: what is being done, and under which method and ratio.

    Raises:
        RuntimeError: from whatever went wrong. It names the first item that goes wrong by itself; where each goes well by
            itself, it names all of the batch.
    """
    try:
        return work(items)
    except Exception as error:
        if len(items) > 1:
            for item in items:
                try:
                    work([item])
                except Exception as alone:
                    raise _error(named(item), doing, alone) from alone
            names = f"{named(items[0])} to {named(items[-1])}, which go well one by one (a smaller `--batch-size` may do)"
            raise _error(names, doing, error) from error
        raise _error(named(items[0]), doing, error) from error


def _error(name: str, doing: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"{name}: {doing} failed with {type(error).__name__}: {error}. No results were written; rows that were finished before "
        "are kept, and the same command goes on after them."
    )
