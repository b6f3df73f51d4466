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

    def failure(name: str, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{name}: {doing} failed with {type(error).__name__}: {error}. No results were written; rows that were finished "
            "before are kept, and the same command goes on after them."
        )

    return failing_by_row(items, work, named, failure, "--batch-size")


def failing_by_row(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Result],
    named: Callable[[Item], str],
    failure: Callable[[str, Exception], BaseException],
    batch_option: str,
) -> Result:
    """The same with an error of one's own.

    Args:
        items, work, named: as for `naming_the_row`. `work` may be done twice, and must have no further effect then.
        failure: the error to raise, by the name of what failed and the error that it failed with.
        batch_option: how users set the size of a batch.
    """
    try:
        return work(items)
    except Exception as error:
        if len(items) > 1:
            for item in items:
                try:
                    work([item])
                except Exception as alone:
                    raise failure(named(item), alone) from alone
            names = f"{named(items[0])} to {named(items[-1])}, which go well one by one (a smaller `{batch_option}` may do)"
            raise failure(names, error) from error
        raise failure(named(items[0]), error) from error
