"""How far apart the most attended cells of a tile lie. Pure functions of scores, for all tiles at once.

*Dispersion* is the mean Euclidean distance between two of them, in cells. Cells chosen at random have, in expectation, the
dispersion of all valid cells of their tile: every pair is as likely as any other.

Source of what it is for: HIVTP, arXiv 2509.23663, section 3.1, and HiPrune, arXiv 2508.00553, which tell the middle layers of a
vision encoder, whose attention gathers on objects, from the deep ones, where it is scattered.
"""

from typing import Any

import torch
from torch import Tensor

from ..methods.base import check_tiles
from ..methods.ranking import descending_rank, keep_best, rounded_share
from ..pruning.checked_values import checked_number


def checked_share(value: Any) -> float:
    """`value` as a share of a tile's cells, above 0 and below 1; a ValueError otherwise. At 1 all layers would look alike."""
    share = checked_number("top_share", value, float, 0, 1, above_minimum=True)
    if share == 1:
        raise ValueError("`top_share` is 1, which takes every cell, so that all layers look alike; give less, such as 0.2.")
    return share


def most_attended_cells(scores: Tensor, valid: Tensor, top_share: float) -> Tensor:
    """The share of every tile's valid cells that has the highest scores.

    Args:
        scores: floating point (tiles, grid, grid), compared in float32; those of cells that are not valid are ignored.
        valid: bool (tiles, grid, grid).
        top_share: of the valid cells, above 0 and below 1. Their number is rounded, halves up; it is 2 at least, as one cell
            has no distance, where a tile has as many. Equal scores go to the lower raster index.

    Returns:
        bool (tiles, grid, grid).

    Raises:
        ValueError: on shapes or dtypes that do not fit, a share out of range, and scores of valid cells that are not finite.
    """
    check_tiles(valid, scores=scores)
    top_share = checked_share(top_share)
    wrong = int((valid & ~scores.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"`scores` has {wrong} values that are not finite. Where they come from a model in float16, load it in bfloat16 "
            "or float32."
        )
    cells = valid.flatten(1)
    # From a table that Python's own float64 arithmetic fills, as for the tokens that a ratio keeps.
    shares = [min(cells, max(2, rounded_share(cells, top_share))) for cells in range(cells.shape[1] + 1)]
    number = torch.tensor(shares, device=cells.device)[cells.sum(1)]
    return keep_best(descending_rank(scores.flatten(1)), cells, number).view_as(valid)


def mean_pairwise_distance(chosen: Tensor) -> Tensor:
    """The mean Euclidean distance over all pairs of chosen cells of every tile, in cells.

    Args:
        chosen: bool (tiles, grid, grid): the most attended cells; or all valid ones, which gives the expectation for cells
            that are chosen at random.

    Returns:
        float64 (tiles,); NaN for tiles with fewer than two chosen cells.

    Raises:
        ValueError: for anything but a bool tensor of square tiles.
    """
    check_tiles(chosen)
    grid = chosen.shape[1]
    members = chosen.flatten(1).double()
    steps = torch.arange(grid, dtype=torch.float64, device=chosen.device)
    squares_across = (steps[:, None] - steps).square()
    summed = torch.zeros(chosen.shape[0], dtype=torch.float64, device=chosen.device)
    # From the cells of one row to all cells at a time: all pairs at once would be the square of the number of cells.
    for row in range(grid):
        squares_down = (steps - row).square()
        distances = (squares_down[:, None] + squares_across[:, None, :]).sqrt().flatten(1)
        summed += ((chosen[:, row].double() @ distances) * members).sum(1)
    number = members.sum(1)
    return summed / (number * (number - 1))


def attention_share(scores: Tensor, valid: Tensor, chosen: Tensor) -> Tensor:
    """How much of the attention of every tile's valid cells some of them have: float64 (tiles,), 0 to 1.

    Args:
        scores: floating point (tiles, grid, grid), the attention; what it holds for cells that are not valid is ignored.
        valid: bool (tiles, grid, grid).
        chosen: bool (tiles, grid, grid), some of the valid cells.

    Returns:
        float64 (tiles,); NaN for tiles whose cells have no attention at all.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    check_tiles(valid, scores=scores)
    check_tiles(chosen, scores=scores)
    attention = scores.double().masked_fill(~valid, 0)
    return (attention * chosen).sum((1, 2)) / attention.sum((1, 2))
