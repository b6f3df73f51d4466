"""The similarities of all pairs of a large group: a symmetric matrix of which half is held.

Blocks of rows reach up to the diagonal. Features are brought to length 1 a block at a time, so that neither the whole matrix
nor all features are there at once. Asking for rows waits for the device, which takes little of what such groups take.
"""

from collections.abc import Callable, Sequence

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
        found = torch.empty(len(chosen), self._cells, device=chosen.device)
        cells: Sequence[int] = chosen.tolist()
        for rows, block in self._blocks:
            inside = [place for place, cell in enumerate(cells) if rows.start <= cell < rows.stop]
            if inside:
                found[inside, : rows.stop] = block[[cells[place] - rows.start for place in inside]]
            before = [place for place, cell in enumerate(cells) if cell < rows.start]
            if before:
                found[before, rows] = block[:, [cells[place] for place in before]].T
        return found if self._divisor is None else found.div_(self._divisor)

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
