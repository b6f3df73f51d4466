"""A baseline that looks at nothing: cells of every view drawn at random, the same ones on every device.

Source: ours. What a method gains over it, it gains by looking.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.checked_values import shown
from ..pruning.evidence import ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .ranking import descending_rank, keep_best, share_as_inclusion, totals_of_views

# More than a layout can have; it bounds what one wrong index could cost.
_MOST_VIEWS = 2**17


class Random(PruningMethod):
    """Cells drawn at random."""

    name = "random"
    rule = "a baseline: cells drawn at random, the same for every image of a shape"
    settings = (Setting("seed", int, 0, 0, 2**32 - 1, meaning="which draw", search=()),)
    colour = "#CC79A7"
    knows_inclusion = True

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_random(evidence.indices, evidence.valid, pruning)

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        cells = evidence.valid.flatten(1)
        rank = _random_rank(evidence.indices, cells.shape[1], pruning.seed).to(cells.device)
        return -rank.float().view_as(evidence.valid)

    def inclusion(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return share_as_inclusion(evidence, pruning)


def select_random(view_indices: Sequence[int], valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """Cells drawn without replacement, of views of one shape at once.

    A view's draw is a ranking of all its cells. The seed, the view's index in its image and its number of cells alone determine
    it: not the device, not the batch, not the image. A larger ratio therefore keeps a superset of the same view.

    Args:
        view_indices: for each view its index in its own image, from 0 to 2**17 - 1.
        valid: bool (views, rows, columns); other cells are never kept and take no budget.
        pruning: a config of the method "random" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells.

    Raises:
        ValueError: on a shape or dtype that does not fit, indices that are out of range or not one per view, another
            method's config, and a token budget in place of a ratio.
    """
    check_views(valid)
    _check_view_indices(view_indices, valid.shape[0])
    settings = settings_of("random", pruning)
    cells = valid.flatten(1)
    rank = _random_rank(view_indices, cells.shape[1], settings.seed).to(valid.device)
    return keep_best(rank, cells, totals_of_views(cells, settings)).view_as(valid)


def _random_rank(view_indices: Sequence[int], cells: int, seed: int) -> Tensor:
    """The place of every cell in its view's ranking, int64 (views, cells), on the CPU.

    The seed starts one stream of numbers and view i takes its i-th row of them. Nothing else keeps all pairs of seed and view
    apart: of a generator's own seed the CPU uses the low 32 bits, and the seed alone has as many.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.empty(max(view_indices, default=-1) + 1, cells, dtype=torch.float32, device="cpu")
    for row in draws:  # one by one: nothing promises that a larger draw begins as a smaller one does
        row.uniform_(generator=generator)
    return descending_rank(draws)[torch.tensor(view_indices, dtype=torch.int64, device="cpu")]


def _check_view_indices(view_indices: Sequence[int], views: int) -> None:
    if not isinstance(view_indices, Sequence) or not all(
        isinstance(index, int) and 0 <= index < _MOST_VIEWS for index in view_indices
    ):
        raise ValueError(
            f"`view_indices` is {shown(view_indices)}; it must be a list of whole numbers from 0 to {_MOST_VIEWS - 1}, such as "
            "`[0, 1, 2]` for an image of three views."
        )
    if len(view_indices) != views:
        raise ValueError(f"`view_indices` has {len(view_indices)} indices and `valid` {views} views; give one index per view.")
