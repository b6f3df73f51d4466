"""`RunFailure`: ends an lmms-eval run with a non-zero exit status, and names the row where there is one."""

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..evaluation.answering import failing_by_row

Row = TypeVar("Row")
Result = TypeVar("Result")


class RunFailure(SystemExit):
    """An error that ends the process with its message and exit status 1.

    lmms-eval's command line prints every `Exception` and goes on to exit status 0, so that a run without a result looks like
    one that went well. It lets this one pass.
    """


def failing_with_the_row(rows: Sequence[Row], work: Callable[[Sequence[Row]], Result]) -> Result:
    """What `work` returns for a batch of rows.

    Args:
        rows: at least one; `str` names a row.
        work: takes a batch, or one row of it, as a sequence. Done twice, it must have no further effect.

    Raises:
        RunFailure: from whatever went wrong. It names the first row that goes wrong by itself, or else the whole batch.
    """
    return failing_by_row(rows, work, str, _failure, "--batch_size")


def _failure(name: str, error: Exception) -> RunFailure:
    traceback.print_exception(error)  # which an exit hides
    return RunFailure(f"{name}: {type(error).__name__}: {error}. The run ends here, and no results are written.")
