"""A baseline that looks at nothing: cells of every tile drawn at random, the same ones on every device.

Source: ours. What a method gains over it, it gains by looking.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checked_values import shown
from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank, keep_best_of_groups
from .retained_share import rounded_share

# More than a layout can have; it bounds what one wrong index could cost.
_MOST_TILES = 2**17


def select_random(tile_indices: Sequence[int], valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """Cells drawn without replacement, of all tiles of all images of a batch at once.

    A tile's draw is a ranking of all its cells, which the seed, the tile's index in its image and the grid alone determine:
    not the device, not the batch, not the image. A larger ratio therefore keeps a superset of the same tile.

    Args:
        tile_indices: for each tile its index in its own image, from 0 (the base tile) to 2**17 - 1.
        valid: bool (tiles, grid, grid); other cells are never kept and take no budget.
        pruning: a config of the method "random" with a retention ratio, or its settings as a dict.

    Returns:
        bool (tiles, grid, grid). Each tile keeps `rounded_share(valid cells, retention_ratio)` cells.

    Raises:
        ValueError: on a shape or dtype that does not fit, indices that are out of range or not one per tile, another
            method's config, and a token budget in place of a ratio.
    """
    _check_tiles(tile_indices, valid)
    pruning = VisualTokenPruningConfig.coerce(pruning)
    ratio = _checked_ratio(pruning)
    cells = valid.flatten(1)
    # In Python's float64, as the layout counts; a product on the device may have another floor.
    share = [rounded_share(n, ratio) for n in range(cells.shape[1] + 1)]
    total = torch.tensor(share, device=valid.device)[cells.sum(1)]
    rank = _random_rank(tile_indices, cells.shape[1], pruning.seed).to(valid.device)
    # One group, number 0, of the valid cells; the others are in none.
    return keep_best_of_groups(rank, (~cells).long(), total[:, None]).view_as(valid)


def _random_rank(tile_indices: Sequence[int], cells: int, seed: int) -> Tensor:
    """The place of every cell in its tile's ranking, int64 (tiles, cells), on the CPU.

    The seed starts one stream of numbers and tile i takes its i-th row of them. Nothing else keeps all pairs of seed and tile
    apart: of a generator's own seed the CPU uses the low 32 bits, and the seed alone has as many.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.empty(max(tile_indices, default=-1) + 1, cells, dtype=torch.float32, device="cpu")
    for row in draws:  # one by one: nothing promises that a larger draw begins as a smaller one does
        row.uniform_(generator=generator)
    return descending_rank(draws)[torch.tensor(tile_indices, dtype=torch.int64, device="cpu")]


def _check_tiles(tile_indices: Sequence[int], valid: Tensor) -> None:
    if valid.ndim != 3 or valid.shape[1] != valid.shape[2] or valid.shape[1] == 0:
        raise ValueError(
            f"`valid` has shape {tuple(valid.shape)}; it must be (tiles, grid, grid), with square tiles of at least one cell."
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"`valid` is {valid.dtype}; it must be bool.")
    if not isinstance(tile_indices, Sequence) or not all(
        isinstance(index, int) and 0 <= index < _MOST_TILES for index in tile_indices
    ):
        raise ValueError(
            f"`tile_indices` is {shown(tile_indices)}; it must be a list of whole numbers from 0 to {_MOST_TILES - 1}, such as "
            "`[0, 1, 2]` for an image of three tiles."
        )
    if len(tile_indices) != valid.shape[0]:
        raise ValueError(
            f"`tile_indices` has {len(tile_indices)} indices and `valid` {valid.shape[0]} tiles; give one index per tile."
        )


def _checked_ratio(pruning: VisualTokenPruningConfig) -> float:
    if pruning.method != "random":
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_random needs 'random'.")
    if pruning.retention_ratio is None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning.retention_ratio
