"""A baseline that looks at nothing: cells of every tile at even distances in raster order.

Source: ours. What a method gains over it, it gains by looking.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pruning_config import VisualTokenPruningConfig
from .retained_share import rounded_share


def select_uniform(valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """Evenly spaced cells, of all tiles of all images of a batch at once.

    Of n valid cells of a tile, counted in raster order from 0, of which k are to stay, cell i is kept where
    floor((i + 1) * k / n) > floor(i * k / n).

    Args:
        valid: bool (tiles, grid, grid); other cells are never kept and take no budget.
        pruning: a config of the method "uniform" with a retention ratio, or its settings as a dict.

    Returns:
        bool (tiles, grid, grid). Each tile keeps `rounded_share(valid cells, retention_ratio)` cells.

    Raises:
        ValueError: on a shape or dtype that does not fit, another method's config, and a token budget in place of a ratio.
    """
    _check_tiles(valid)
    pruning = VisualTokenPruningConfig.coerce(pruning)
    ratio = _checked_ratio(pruning)
    cells = valid.flatten(1)
    number = cells.sum(1, keepdim=True)
    # In Python's float64, as the layout counts; a product on the device may have another floor.
    share = [rounded_share(n, ratio) for n in range(cells.shape[1] + 1)]
    total = torch.tensor(share, device=valid.device)[number]
    up_to_here = cells.cumsum(1) * total
    number = number.clamp(min=1)  # nothing is kept of a tile without valid cells, but it must not divide by 0
    return (cells & (up_to_here // number > (up_to_here - total) // number)).view_as(valid)


def _check_tiles(valid: Tensor) -> None:
    if valid.ndim != 3 or valid.shape[1] != valid.shape[2] or valid.shape[1] == 0:
        raise ValueError(
            f"`valid` has shape {tuple(valid.shape)}; it must be (tiles, grid, grid), with square tiles of at least one cell."
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"`valid` is {valid.dtype}; it must be bool.")


def _checked_ratio(pruning: VisualTokenPruningConfig) -> float:
    if pruning.method != "uniform":
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_uniform needs 'uniform'.")
    if pruning.retention_ratio is None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning.retention_ratio
