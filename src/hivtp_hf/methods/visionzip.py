"""VisionZip: the cells of highest attention, and averages of all others around a few evenly spaced ones.

Source: arXiv 2412.04467, from its description. Two things are ours: the class token is not among what is kept (a LLaVA-1.5 that
packs it keeps it on top, as under every method), and the number of averages follows from what a view keeps.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.checked_values import shown
from ..pruning.evidence import EncoderFacts, Evidence, ViewEvidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.merging import MergedTokens
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .greedy import SALIENCY_LAYER, saliency_layer, saliency_of_views, unit_vectors
from .ranking import descending_rank, keep_best, rounded_share, totals_of_views, without_autocast

# Similarities that are held at once, in float32.
_SIMILARITY_BYTES = 16 * 2**20
# What holds nothing: a dropped cell that is in no average.
_NOBODY = -1


class VisionZip(PruningMethod):
    """VisionZip: dominant cells, and contextual ones that hold averages."""

    name = "visionzip"
    rule = "what the class token attends to most, and averages of all other cells (VisionZip, arXiv 2412.04467)"
    settings = (
        Setting(
            "contextual_share",
            float,
            10 / 64,
            0,
            1,
            meaning="share of what a view keeps that holds averages of all other cells, rounded; 0 drops these",
        ),
        SALIENCY_LAYER,
    )
    colour = "#9467BD"
    citation = r"""
@misc{yang2024visionzip,
  title = {{VisionZip}: Longer is Better but Not Necessary in Vision Language Models},
  author = {Yang, Senqiao and Chen, Yukang and Tian, Zhuotao and Wang, Chengyao and Li, Jingyao and Yu, Bei and Jia, Jiaya},
  year = {2024},
  eprint = {2412.04467},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2412.04467},
}
"""
    merges = True

    def check_settings(self, pruning: VisualTokenPruningConfig) -> None:
        if pruning.token_weights != "none":
            raise ValueError(
                f"`token_weights` is {shown(pruning.token_weights)}; the contextual tokens of 'visionzip' hold what they stand "
                "for already, by other similarities than weights go by, so it must be 'none'."
            )

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (
            frozenset({Evidence.CLASS_ATTENTION, Evidence.KEYS, Evidence.ENCODED}),
            frozenset({Evidence.RECEIVED_ATTENTION, Evidence.KEYS, Evidence.ENCODED}),
            frozenset({Evidence.RECEIVED_ATTENTION, Evidence.KEYS, Evidence.FEATURES}),
        )

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return (saliency_layer(pruning, encoder),)

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        roles = _roles(evidence, pruning)
        return (roles.is_dominant | roles.is_target).view_as(evidence.valid)

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        """Dominant cells by attention, then contextual ones, then the others, each by attention too."""
        roles, cells = _roles(evidence, pruning), evidence.valid[0].numel()
        behind = torch.where(roles.is_dominant, 0, torch.where(roles.is_target, cells, 2 * cells))
        importance = -(descending_rank(roles.saliency) + behind).float()
        return importance.view(evidence.valid.shape).masked_fill(~evidence.valid, torch.nan)

    def merge(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Sequence[MergedTokens]:
        def holders(of_views: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
            return holders_of_cells(_roles(of_views, pruning)).view(of_views.valid.shape)

        asked: Any = evidence.ask(self, holders, pruning)
        # As published where there is a class token: an average of the others, added to what they are added to.
        adds = bool(evidence.class_attention)
        return [
            _merged_of_image(of_image, layout, adds)
            for of_image, layout in zip(
                asked.split([layout.num_cells for layout in evidence.layouts]), evidence.layouts, strict=True
            )
        ]


def select_visionzip(
    saliency: Tensor, keys: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells in whose place VisionZip keeps something, of views of one shape at once, and what is averaged into them.

    Of K = `rounded_share(valid cells, retention_ratio)` tokens of a view, C = `rounded_share(K, contextual_share)` are
    contextual. The K - C cells of highest saliency are dominant, and stay as they are. Of the R others every max(1, R // C)-th,
    the first C of them, is a target; each of the rest goes to the target whose key is most similar to its own.

    Args:
        saliency: (views, rows, columns), any float dtype, compared in float32; equal ones rank by raster index.
        keys: (views, rows, columns, size), any float dtype, heads averaged; compared by their cosine in float32. Keys that are
            zero or not finite resemble nothing. Ties go to the first target.
        valid: bool (views, rows, columns); other cells are never kept, are in no average and take no budget.
        pruning: a config of the method "visionzip" with a retention ratio, or its settings as a dict.

    Returns:
        int64 (views, rows, columns): the raster index in its view of the cell that holds each cell, which is the cell itself
        where that is kept; -1 for what is in nothing that stays.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2412.04467.
    """
    check_views(valid, saliency=saliency)
    if not isinstance(keys, Tensor) or keys.shape[:3] != valid.shape or keys.ndim != 4 or not keys.dtype.is_floating_point:
        given = f"{keys.dtype} of shape {tuple(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
        raise ValueError(
            f"`keys` is {given}; it must be a floating point torch.Tensor of shape ({', '.join(map(str, valid.shape))}, size), "
            "as `valid` has it."
        )
    roles = _roles_of_views(saliency.flatten(1), keys.flatten(1, 2), valid.flatten(1), settings_of("visionzip", pruning))
    return holders_of_cells(roles).view_as(valid.long())


class _Roles(NamedTuple):
    """What becomes of the cells of some views.

    Attributes:
        valid, is_dominant, is_target: bool (views, cells).
        most_targets: of a view.
        saliency: float (views, cells).
        keys: float (views, cells, size).
    """

    valid: Tensor
    is_dominant: Tensor
    is_target: Tensor
    most_targets: int
    saliency: Tensor
    keys: Tensor


def _roles(evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> _Roles:
    saliency, keys = saliency_of_views(evidence, pruning), evidence.keys[saliency_layer(pruning, evidence.encoder)]
    return _roles_of_views(saliency.flatten(1), keys.flatten(1, 2), evidence.valid.flatten(1), pruning)


def _roles_of_views(saliency: Tensor, keys: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> _Roles:
    cells, ratio, share = valid.shape[1], pruning.retention_ratio, pruning.contextual_share
    kept = totals_of_views(valid, pruning)
    contextual = torch.tensor([rounded_share(number, share) for number in range(cells + 1)], device=valid.device)[kept]
    is_dominant = keep_best(descending_rank(saliency), valid, kept - contextual)
    left = valid & ~is_dominant
    step = (left.sum(1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    place = left.cumsum(1) - 1
    is_target = left & (place % step == 0) & (place // step < contextual[:, None])
    most: Any = rounded_share(rounded_share(cells, ratio), share)  # type: ignore[arg-type]
    return _Roles(valid, is_dominant, is_target, most, saliency, keys)


def holders_of_cells(roles: _Roles) -> Tensor:
    """Of every cell the one that holds it, as `select_visionzip` says: int64 (views, cells)."""
    views, cells = roles.valid.shape
    own = torch.arange(cells, device=roles.valid.device).expand(views, -1)
    is_kept = roles.is_dominant | roles.is_target
    if not roles.most_targets or not views:
        return torch.where(is_kept, own, _NOBODY)
    # Targets first, in raster order; where a view has fewer, what stands for the missing ones resembles nothing.
    targets = torch.sort((~roles.is_target).to(torch.uint8), dim=1, stable=True).indices[:, : roles.most_targets]
    is_target = roles.is_target.gather(1, targets)
    nearest = torch.empty_like(own)
    at_once = max(1, _SIMILARITY_BYTES // (4 * max(1, views * roles.most_targets)))
    with torch.no_grad(), without_autocast(roles.keys.device):
        directions = unit_vectors(roles.keys, roles.valid)
        of_targets = directions.gather(1, targets[..., None].expand(-1, -1, directions.shape[2]))
        for first in range(0, cells, at_once):
            similarity = torch.bmm(directions[:, first : first + at_once], of_targets.mT)
            similarity = similarity.masked_fill_(~is_target[:, None], -torch.inf)
            nearest[:, first : first + at_once] = targets.gather(1, similarity.argmax(2))
    has_target = roles.valid & roles.is_target.any(1, keepdim=True)
    return torch.where(is_kept, own, torch.where(has_target, nearest, _NOBODY))


def _merged_of_image(holder: Tensor, layout: TokenLayout, adds: bool) -> MergedTokens:
    """What stays of one image.

    Args:
        holder: int64 (cells,), of every cell the one of its view that holds it.
        layout: of the image.
        adds: whether an average is that of the others, added to the target; else of all of them.
    """
    device, cells = holder.device, layout.num_cells
    share: Any = layout.pruning.contextual_share
    most = sum(rounded_share(total, share) for total in layout.group_totals)
    sizes = [rows * columns for rows, columns in layout.view_shapes]
    # Counted through all views; one number more is nobody's.
    holder = torch.cat(
        [
            torch.where(of_view == _NOBODY, cells, of_view + first)
            for first, of_view in zip(itertools.accumulate(sizes, initial=0), holder.split(sizes), strict=False)
        ]
    )
    ones = torch.ones_like(holder)
    held = ones.new_zeros(cells + 1).scatter_add_(0, holder, ones)
    is_kept = holder == torch.arange(cells, device=device)
    is_average = is_kept & (held[:-1] > 1)
    # Averages count in the order of their cells. What is in none comes behind the last one.
    number = torch.where(is_average, is_average.cumsum(0) - 1, most)
    of_cell = torch.nn.functional.pad(number, (0, 1), value=most)[holder]
    others = (held[holder] - 1).clamp(min=1).float()
    weights = torch.where(is_kept, 1.0, 1 / others) if adds else 1 / (others + 1)
    in_order = torch.sort(of_cell, stable=True).indices
    sizes_of_averages = ones.new_zeros(most + 1).scatter_add_(0, of_cell, ones)
    kept_indices = layout.kept_indices(is_kept)
    return MergedTokens(
        kept_indices,
        layout.packed(number, most, most)[kept_indices],
        layout.token_of_cell.to(device).clamp(min=0)[in_order],
        weights[in_order],
        sizes_of_averages.cumsum(0) - sizes_of_averages,
    )
