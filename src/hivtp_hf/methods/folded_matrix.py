"""The similarities of all pairs of a large group: a symmetric matrix of which half is held.

Blocks of rows reach up to the diagonal. Features are brought to length 1 a block at a time, so that neither the whole matrix
nor all features are there at once. Asking for rows waits for the device, which takes little of what such groups take.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS_OF_A_BLOCK = 1024


class FoldedMatrix:
    """A symmetric matrix (cells, cells) in float32, exactly symmetric; columns may be divided.

    Args:
        directions: gives the features of some cells at length 1, float32 (1, n, hidden).
        cells: how many there are.
    """

    def __init__(self, directions: Callable[[slice], Tensor], cells: int):
        self._cells = cells
        self._divisor: Tensor | None = None
        self._blocks: list[tuple[slice, Tensor]] = []
        starts = range(0, cells, _ROWS_OF_A_BLOCK)
        parts = [slice(first, min(first + _ROWS_OF_A_BLOCK, cells)) for first in starts]
        for number, rows in enumerate(parts):
            own = directions(rows)[0]
            block = own.new_empty(len(own), rows.stop)
            for columns in parts[:number]:
                block[:, columns] = own @ directions(columns)[0].T
            corner = own @ own.T
            block[:, rows] = corner.tril() + corner.tril(-1).T
            self._blocks.append((rows, block))

    def rows(self, chosen: Tensor) -> Tensor:
        """Some rows, float32 (n, cells), for cells int64 (n,)."""
        # In order, those of a block stand side by side, and so do those whose part there lies in columns.
        cells, order = chosen.sort()
        found = torch.empty(len(cells), self._cells, device=cells.device)
        bounds = torch.tensor([rows.start for rows, _ in self._blocks[1:]], device=cells.device)
        ends = [*torch.searchsorted(cells, bounds).tolist(), len(cells)]
        first = 0
        for (rows, block), behind in zip(self._blocks, ends, strict=True):
            if first:
                found[:first, rows] = block.index_select(1, cells[:first]).T
            if first < behind:
                found[first:behind, : rows.stop] = block.index_select(0, cells[first:behind] - rows.start)
            first = behind
        if self._divisor is not None:
            found.div_(self._divisor)
        return found if len(cells) == 1 else torch.empty_like(found).index_copy_(0, order, found)

    def change(self, function: Callable[[Tensor, slice, slice], object]) -> None:
        """Lets a function change blocks in place, all elements alike; it is told the rows and columns that they are of."""
        for rows, block in self._blocks:
            function(block, rows, slice(0, rows.stop))

    def column_sums(self) -> Tensor:
        """The sum of every column, float32 (cells,)."""
        sums = torch.zeros(self._cells, device=self._blocks[0][1].device)
        for rows, block in self._blocks:
            sums[: rows.stop] += block.sum(0)
            sums[rows] += block[:, : rows.start].sum(1)
        return sums

    def divide_columns(self, by: Tensor) -> None:
        """Lets every row that is asked for be divided by numbers (cells,)."""
        self._divisor = by

    def diagonal(self) -> Tensor:
        """float32 (cells,)."""
        return torch.cat([block[:, rows].diagonal() for rows, block in self._blocks])
