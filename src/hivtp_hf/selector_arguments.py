"""Checks of what is given to the methods' selections, which are public functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pruning_config import VisualTokenPruningConfig


def check_tiles(valid: Tensor, **scores: Tensor) -> None:
    """Refuses tensors that are not tiles of cells.

    Args:
        valid: must be bool (tiles, grid, grid).
        **scores: by the name of their argument; must be floating point and of the same shape.

    Raises:
        ValueError: names the argument, what was given and what it must be.
    """
    for name, given in (("valid", valid), *scores.items()):
        if not isinstance(given, Tensor):
            raise ValueError(f"`{name}` is a {type(given).__name__}; it must be a torch.Tensor.")
    if valid.ndim != 3 or valid.shape[1] != valid.shape[2] or valid.shape[1] == 0:
        raise ValueError(
            f"`valid` has shape {tuple(valid.shape)}; it must be (tiles, grid, grid), with square tiles of at least one cell."
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"`valid` is {valid.dtype}; it must be bool.")
    for name, given in scores.items():
        if given.shape != valid.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(given.shape)} and `valid` {tuple(valid.shape)}; both must be (tiles, grid, grid)."
            )
        if not given.dtype.is_floating_point:
            raise ValueError(f"`{name}` is {given.dtype}; it must be floating point.")


def settings_of(method: str, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> VisualTokenPruningConfig:
    """The settings of a selection, also given as a dict.

    Raises:
        ValueError: for another method's settings, and for a token budget, which means another ratio for each image.
    """
    pruning = VisualTokenPruningConfig.coerce(pruning)
    if pruning.method != method:
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_{method} needs {method!r}.")
    if pruning.token_budget is not None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning
