"""A baseline that looks at nothing: cells of every tile drawn at random, the same ones on every device.

Source: ours. What a method gains over it, it gains by looking.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.checked_values import shown
from ..pruning.evidence import VisualEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_tiles, settings_of
from .ranking import descending_rank, keep_best, share_as_inclusion, totals_of_tiles

# More than a layout can have; it bounds what one wrong index could cost.
_MOST_TILES = 2**17


class Random(PruningMethod):
    """Cells drawn at random."""

    name = "random"
    rule = "a baseline: cells drawn at random, the same for every image of a shape"
    settings = (Setting("seed", int, 0, 0, 2**32 - 1, meaning="which draw"),)
    colour = "#CC79A7"
    knows_inclusion = True

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_random(evidence.tile_indices, evidence.valid, pruning)

    def inclusion(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return share_as_inclusion(evidence, pruning)


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
    check_tiles(valid)
    _check_tile_indices(tile_indices, valid.shape[0])
    settings = settings_of("random", pruning)
    cells = valid.flatten(1)
    rank = _random_rank(tile_indices, cells.shape[1], settings.seed).to(valid.device)
    return keep_best(rank, cells, totals_of_tiles(cells, settings)).view_as(valid)


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


def _check_tile_indices(tile_indices: Sequence[int], tiles: int) -> None:
    if not isinstance(tile_indices, Sequence) or not all(
        isinstance(index, int) and 0 <= index < _MOST_TILES for index in tile_indices
    ):
        raise ValueError(
            f"`tile_indices` is {shown(tile_indices)}; it must be a list of whole numbers from 0 to {_MOST_TILES - 1}, such as "
            "`[0, 1, 2]` for an image of three tiles."
        )
    if len(tile_indices) != tiles:
        raise ValueError(f"`tile_indices` has {len(tile_indices)} indices and `valid` {tiles} tiles; give one index per tile.")
