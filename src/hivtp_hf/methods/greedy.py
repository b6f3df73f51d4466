"""Selections that pick cells one by one: what they share, from features to the order in which cells are picked.

Four loops. Coverage picks what adds most to what is represented, max-min what lies farthest from all that is picked,
the determinant what spans most volume with it, and suppression the most important of what is not similar to it. All go over
many groups at once, in float32, and ties go to the lowest index. Nothing waits for the device, with two exceptions that change
no pick: on a CPU coverage leaves out what cannot win, and the determinant ends where nothing new is left. Large groups wait.

A group is compared through one matrix up to 8,192 cells, of which half is held above 4,096. Larger ones are split into bands of
whole rows, as equal as they can be, each with its share of the picks by largest remainder, as the matrix grows with the square
of the cells.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.evidence import CellFeatures, EncoderFacts, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod
from .folded_matrix import FoldedMatrix
from .ranking import rounded_share, totals_of_views, without_autocast

# Above so many cells of a group there is a matrix for each of several bands.
MOST_CELLS_OF_A_MATRIX = 8192
# Above so many, half of a matrix is held, of one group at a time.
_MOST_CELLS_HELD_WHOLE = 4096
# What features and matrices of groups that are chosen from together may take. A single group may take more.
_BYTES_AT_ONCE = 128 * 2**20
# Rows of a matrix that are formed at once: only what is on and below the diagonal is computed.
_ROWS_AT_ONCE = 256
# Cells whose gain is computed anew at once, where most cells need not be looked at.
_GAINS_AT_ONCE = 32
# What is left of a cell's length beyond this is rounding.
_LEAST_VOLUME = 1e-4
# When a cell is picked that is not picked.
NEVER_PICKED = 2**31


class GreedyMethod(PruningMethod):
    """A method that picks cells of a view one by one, and ranks them by that order."""

    @abstractmethod
    def order(self, evidence: Any, pruning: VisualTokenPruningConfig) -> Tensor:
        """When every cell is picked, int64 (views, rows, columns): 0 for the first, `NEVER_PICKED` for what is not picked."""

    def select(self, evidence: Any, pruning: VisualTokenPruningConfig) -> Tensor:
        return is_picked(self.order(evidence, pruning))

    def importance(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return importance_of_order(self.order(evidence, pruning), evidence.valid)


# Which layer's attention `saliency_of_views` takes.
SALIENCY_LAYER = Setting("layer", int, None, is_layer=True, meaning="encoder layer; None: the visual feature's")


class SalientGreedyMethod(GreedyMethod):
    """A greedy method that weighs in how important cells are, by the setting `layer`."""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (
            frozenset({Evidence.CLASS_ATTENTION, Evidence.FEATURES}),
            frozenset({Evidence.RECEIVED_ATTENTION, Evidence.FEATURES}),
        )

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return (saliency_layer(pruning, encoder),)


def is_picked(order: Tensor) -> Tensor:
    """Which cells are picked at all, bool of the same shape."""
    return order < NEVER_PICKED


def importance_of_order(order: Tensor, valid: Tensor) -> Tensor:
    """Scores that rank cells as they were picked, float32: 0 for the first, the lowest for what was not; NaN for no cell."""
    lowest = -valid.shape[-1] * (valid.shape[-2] if valid.ndim > 2 else 1)
    return torch.where(is_picked(order), -order.float(), lowest).masked_fill(~valid, math.nan)


# Groups, and what is compared within them.


class Picks(NamedTuple):
    """How many cells of every group are to be picked.

    Attributes:
        number: int64 (groups,), on the device.
        most: what none of them exceeds, known without asking the device.
    """

    number: Tensor
    most: int


def picks_of_views(valid: Tensor, pruning: VisualTokenPruningConfig) -> Picks:
    """How many cells of every view a ratio keeps, for `valid` bool (views, rows, columns)."""
    cells = valid.flatten(1)
    ratio: Any = pruning.retention_ratio
    return Picks(totals_of_views(cells, pruning), rounded_share(cells.shape[1], ratio))


def check_features(features: Any, valid: Tensor) -> None:
    """Refuses features that are not those of the cells of some views: a ValueError that says what was given.

    Args:
        features: must be floating point (views, rows, columns, hidden).
        valid: bool (views, rows, columns).
    """
    if not isinstance(features, Tensor):
        raise ValueError(f"`features` is a {type(features).__name__}; it must be a torch.Tensor.")
    if features.ndim != 4 or features.shape[:3] != valid.shape or not features.dtype.is_floating_point:
        raise ValueError(
            f"`features` is {features.dtype} of shape {tuple(features.shape)}; `valid` has shape {tuple(valid.shape)}, so it "
            f"must be floating point of shape ({', '.join(map(str, valid.shape))}, hidden)."
        )


# Of similarities (groups, n, n), or a `FoldedMatrix` of one group, valid cells (groups, n), how many to pick, and the slices of
# groups and of cells that these are: when each is picked, int64 (groups, n).
Loop = Callable[[Any, Tensor, Picks, slice, slice], Tensor]


def order_in_views(features: CellFeatures | Tensor, valid: Tensor, picks: Picks, loop: Loop) -> Tensor:
    """When every cell is picked, of views of one shape.

    Args:
        features: (views, rows, columns, hidden) or (views, cells, hidden), any float dtype.
        valid: bool (views, rows, columns).
        picks: how many of every view.
        loop: what picks.

    Returns:
        int64 (views, rows, columns).
    """
    _, rows, columns = valid.shape
    if isinstance(features, Tensor):
        features = CellFeatures([(of_view, None) for of_view in features.flatten(1, -2)], valid.device)
    order = order_in_groups(features.of_views, features.width, valid.flatten(1), picks, loop, [columns] * rows)
    return order.view_as(valid)


def order_in_groups(
    features: Callable[[int, int, slice], Tensor],
    width: int,
    valid: Tensor,
    picks: Picks,
    loop: Loop,
    rows: Sequence[int],
) -> Tensor:
    """When every cell is picked, of groups of one size.

    Args:
        features: gives a copy of those of some cells of the groups from one number to before another, (groups, n, hidden), any
            float dtype.
        width: how many numbers a feature has.
        valid: bool (groups, cells); other cells are never picked, and nothing is compared with them.
        picks: how many of every group.
        loop: what picks.
        rows: of every row of cells how many there are, as bands end where rows do.

    Returns:
        int64 (groups, cells).
    """
    groups = len(valid)
    bands = bands_of_rows(rows)
    largest = max([band.stop - band.start for band in bands])
    is_folded = largest > _MOST_CELLS_HELD_WHOLE
    at_once = 1 if is_folded else max(1, _BYTES_AT_ONCE // max(1, 4 * (largest * largest + 2 * largest * width)))
    order = torch.full_like(valid, NEVER_PICKED, dtype=torch.int64)
    with torch.no_grad(), without_autocast(valid.device):
        for first in range(0, groups if picks.most else 0, at_once):
            chunk = slice(first, min(first + at_once, groups))
            for band, of_band in zip(bands, _picks_of_bands(valid[chunk], bands, picks, chunk), strict=True):
                if not of_band.most:
                    continue

                def directions(part: slice, chunk: slice = chunk, band: slice = band) -> Tensor:
                    cells = slice(band.start + part.start, band.start + part.stop)
                    return unit_vectors(features(chunk.start, chunk.stop, cells), valid[chunk, cells], in_place=True)

                number = band.stop - band.start
                if is_folded:
                    similarity: Any = FoldedMatrix(directions, number)
                else:
                    similarity = similarities(directions(slice(0, number)))
                order[chunk, band] = loop(similarity, valid[chunk, band], of_band, chunk, band)
    return order


def bands_of_rows(rows: Sequence[int], most: int = MOST_CELLS_OF_A_MATRIX) -> list[slice]:
    """Runs of whole rows, as equal as they can be, of at most so many cells each; of equal runs of cells where rows are longer.

    Args:
        rows: the length of every row.
        most: cells of a band.
    """
    cells = sum(rows)
    if cells <= most:
        return [slice(0, cells)]
    ends = [0, *itertools.accumulate(rows)]
    for number in range(max(1, math.ceil(cells / most)), len(rows) + 1):
        # The end of a row that is nearest to where equal bands would end.
        edges = [min(ends, key=lambda end: (abs(end - cells * band / number), end)) for band in range(number + 1)]
        if all(behind - first <= most for first, behind in itertools.pairwise(edges)):
            return [slice(first, behind) for first, behind in itertools.pairwise(edges) if behind > first]
    number = max(1, math.ceil(cells / most))
    edges = [cells * band // number for band in range(number + 1)]
    return [slice(first, behind) for first, behind in itertools.pairwise(edges) if behind > first]


def _picks_of_bands(valid: Tensor, bands: Sequence[slice], picks: Picks, chunk: slice) -> Iterator[Picks]:
    """How many cells of every band of some groups are picked: in proportion to those that are valid, by largest remainder."""
    number = picks.number[chunk]
    if len(bands) == 1:
        yield Picks(number, picks.most)
        return
    sizes = torch.stack([valid[:, band].sum(1) for band in bands], dim=1)
    whole = sizes.sum(1, keepdim=True).clamp(min=1)
    shares = number[:, None] * sizes
    split = shares // whole
    remainders = torch.sort(shares % whole, dim=1, descending=True, stable=True).indices
    extra = torch.arange(len(bands), device=valid.device) < (number - split.sum(1))[:, None]
    split = split.scatter_add(1, remainders, extra.long())
    for band, of_band in zip(bands, split.unbind(1), strict=True):
        # Large groups take seconds, so that asking the device once for the longest loop costs nothing.
        most = min(picks.most, band.stop - band.start) if valid.is_meta else int(of_band.max())
        yield Picks(of_band, most)


def unit_vectors(features: Tensor, valid: Tensor, in_place: bool = False) -> Tensor:
    """Features at length 1, float32 (groups, n, hidden). What is zero, not finite or not valid becomes zero.

    Args:
        features: (groups, n, hidden), any float dtype.
        valid: bool (groups, n).
        in_place: whether features of float32 may be overwritten.
    """
    features = features.float()
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    usable = length.isfinite() & (length > 0) & valid[..., None]
    directions = features.div_(length) if in_place else features / length
    return directions.masked_fill_(~usable, 0.0)


def similarities(directions: Tensor) -> Tensor:
    """The cosines of all pairs, float32 (groups, n, n), exactly symmetric, so that neither of a pair has an advantage."""
    groups, cells, _ = directions.shape
    similarity = directions.new_empty(groups, cells, cells)
    for first in range(0, cells, _ROWS_AT_ONCE):
        behind = min(first + _ROWS_AT_ONCE, cells)
        block = torch.bmm(directions[:, first:behind], directions[:, :behind].mT)
        similarity[:, first:behind, :first] = block[:, :, :first]
        similarity[:, :first, first:behind] = block[:, :, :first].mT
        corner = block[:, :, first:]
        similarity[:, first:behind, first:behind] = corner.tril() + corner.tril(-1).mT
    return similarity


# Importance that some of these methods weigh in.


def saliency_layer(pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> int:
    """The layer whose attention says how important cells are: the setting `layer`, else the visual feature's.

    Where that attends within windows, the last one that does not.
    """
    layer = encoder.layer(pruning, "layer")
    comparable = encoder.comparable_layers
    if pruning.layer is None and comparable and layer not in comparable:
        return max(comparable)
    return layer


def saliency_of_views(evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
    """What the class token attends to, or where there is none what cells receive: float32 (views, rows, columns)."""
    layer = saliency_layer(pruning, evidence.encoder)
    return evidence.class_attention[layer] if layer in evidence.class_attention else evidence.received[layer]


def not_negative(saliency: Tensor) -> Tensor:
    """Saliency in float32, with 0 for what is negative or no number."""
    saliency = saliency.float()
    return torch.where(saliency.isfinite(), saliency, 0.0).clamp(min=0)


def from_zero_to_one(saliency: Tensor, valid: Tensor) -> Tensor:
    """Saliency (groups, n) so that the valid cells of each group span 0 to 1; all 1 where they are equal. 0 for no number."""
    saliency = saliency.float()
    saliency = torch.where(saliency.isfinite(), saliency, 0.0)
    lowest = saliency.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    highest = saliency.masked_fill(~valid, -math.inf).amax(1, keepdim=True)
    return torch.where(highest > lowest, (saliency - lowest) / (highest - lowest), 1.0).masked_fill(~valid, 0.0)


# The loops. Each takes matrices (groups, n, n) of valid cells (groups, n), which it may overwrite; or that of one large group.


def distances(similarity: Any) -> Any:
    """1 less similarities, in their place."""
    if isinstance(similarity, FoldedMatrix):
        similarity.change(lambda block, rows, columns: block.neg_().add_(1))
        return similarity
    return similarity.neg_().add_(1)


def _rows_of_picks(matrix: Any, pick: Tensor) -> Tensor:
    """The row of a cell of every group, (groups, n), for cells int64 (groups,)."""
    if isinstance(matrix, FoldedMatrix):
        return matrix.rows(pick)
    return matrix[torch.arange(len(pick), device=pick.device), pick]


def coverage_order(gains: Any, weights: Tensor | None, valid: Tensor, picks: Picks) -> Tensor:
    """Repeatedly the cell that adds most to what is covered.

    Args:
        gains: float32 (groups, n, n), not below 0 to count: how well each cell (first) covers each (second).
        weights: float32 (groups, n), not negative, what the gain of each cell is multiplied by; None for 1.
        valid: bool (groups, n). What other cells cover and are covered by must be 0.
        picks: how many of every group.

    Returns:
        int64 (groups, n).
    """
    weights = torch.ones_like(valid, dtype=torch.float32) if weights is None else weights
    if isinstance(gains, FoldedMatrix):
        return _coverage_order_of_group(gains, weights[0], valid[0], int(picks.number[0]))[None]
    if gains.device.type == "cpu" and not torch.compiler.is_compiling():
        of_groups = zip(gains, weights, valid, picks.number.tolist(), strict=True)
        return torch.stack([_coverage_order_of_group(*of_group) for of_group in of_groups])
    covered = torch.zeros_like(weights)
    blocked = torch.zeros_like(weights).masked_fill_(~valid, -math.inf)
    groups = torch.arange(len(gains), device=gains.device)
    steps = []
    for _ in range(picks.most):
        added = (gains - covered[:, None]).clamp_(min=0).sum(2)
        pick = (added * weights + blocked).argmax(1)
        steps.append(pick)
        covered = torch.maximum(covered, gains[groups, pick])
        blocked[groups, pick] = -math.inf
    return _order_of_steps(steps, valid, picks)


def _coverage_order_of_group(gains: Any, weights: Tensor, valid: Tensor, number: int) -> Tensor:
    """As `coverage_order`, of one group (n, n) on a CPU: what a cell adds never grows, so most need not be computed anew."""
    covered, order = torch.zeros_like(weights), torch.full_like(valid, NEVER_PICKED, dtype=torch.int64)
    everything = torch.arange(len(valid), device=valid.device)
    bounds = torch.cat([_coverage_added(_rows(gains, part), covered) for part in everything.split(128)]) * weights
    bounds[~valid] = -1
    at_once = min(_GAINS_AT_ONCE, len(bounds))
    for step in range(number):
        fresh = bounds <= 0  # 0 stays 0
        while True:
            highest = bounds.max()
            ties = bounds == highest
            # Done where all that may be the best are known; the first of them is picked.
            if not bool((ties & ~fresh).any()):
                break
            stale = bounds.masked_fill(fresh, -1)
            chosen = stale.topk(at_once).indices
            bounds[chosen] = torch.where(
                stale[chosen] < 0, bounds[chosen], _coverage_added(_rows(gains, chosen), covered) * weights[chosen]
            )
            fresh[chosen] = True
        pick = int(bounds.argmax())
        order[pick] = step
        bounds[pick] = -1
        covered = torch.maximum(covered, _rows(gains, everything[pick : pick + 1])[0])
    return order


def _rows(matrix: Any, chosen: Tensor) -> Tensor:
    """Some rows of the matrix of one group, (m, n), for cells int64 (m,)."""
    return matrix.rows(chosen) if isinstance(matrix, FoldedMatrix) else matrix[chosen]


def _coverage_added(gains: Tensor, covered: Tensor) -> Tensor:
    """What cells add to what is covered, (m,), for gains (m, n)."""
    return (gains - covered).clamp_(min=0).sum(1)


def max_min_order(distance: Any, valid: Tensor, picks: Picks) -> Tensor:
    """First the cell that is farthest from its nearest neighbour, then repeatedly the one farthest from all that are picked.

    Args:
        distance: float32 (groups, n, n), symmetric. Its diagonal plays no part.
        valid: bool (groups, n).
        picks: how many of every group.

    Returns:
        int64 (groups, n).
    """
    groups = torch.arange(len(valid), device=valid.device)
    if isinstance(distance, FoldedMatrix):
        nearest = _nearest_neighbours(distance, valid[0])[None]
    else:
        distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
        nearest = distance.masked_fill_(~valid[:, None], math.inf).amin(2)
    nearest = nearest.masked_fill_(~valid, -math.inf)
    steps = []
    for step in range(picks.most):
        pick = nearest.argmax(1)
        steps.append(pick)
        of_pick = _rows_of_picks(distance, pick)
        nearest = torch.minimum(nearest, of_pick) if step else of_pick.masked_fill(~valid, -math.inf)
        nearest[groups, pick] = -math.inf
    return _order_of_steps(steps, valid, picks)


def _nearest_neighbours(distance: FoldedMatrix, valid: Tensor) -> Tensor:
    """Of every cell the distance of the nearest other one that is valid, (n,)."""
    nearest = []
    for part in torch.arange(len(valid), device=valid.device).split(128):
        rows = distance.rows(part).masked_fill_(~valid, math.inf)
        nearest.append(rows.scatter_(1, part[:, None], math.inf).amin(1))
    return torch.cat(nearest)


def determinant_order(similarity: Any, valid: Tensor, picks: Picks, width: int | None = None) -> Tensor:
    """Repeatedly the cell that multiplies the determinant of those picked by most; the rest evenly, where none adds volume.

    Past the rank of the features all that is left is rounding. Cells are then taken at even distances in raster order.

    Args:
        similarity: float32 (groups, n, n), symmetric.
        valid: bool (groups, n).
        picks: how many of every group.
        width: how many numbers a feature has, which no rank exceeds; None for any number.

    Returns:
        int64 (groups, n); cells that fill up follow behind all that were picked, in raster order.
    """
    groups, cells = valid.shape
    index = torch.arange(groups, device=valid.device)
    diagonal = similarity.diagonal()[None] if isinstance(similarity, FoldedMatrix) else similarity.diagonal(dim1=1, dim2=2)
    volume = diagonal.clone().masked_fill_(~valid, -math.inf)
    most = picks.most if width is None else min(picks.most, width)
    basis = torch.zeros(groups, most, cells, device=valid.device)
    adds = torch.ones_like(index, dtype=torch.bool)
    steps, counted = [], []
    for step in range(most):
        best, pick = volume.max(1)
        adds = adds & (best >= _LEAST_VOLUME)
        if valid.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(adds.any()):
            break
        steps.append(pick)
        counted.append(adds)
        row = _rows_of_picks(similarity, pick)
        if step:
            row = row - torch.bmm(basis[index, :step, pick][:, None], basis[:, :step])[:, 0]
        row = row / best.clamp(min=_LEAST_VOLUME).sqrt()[:, None]
        basis[:, step] = row
        volume = volume - row * row
        volume[index, pick] = -math.inf
    order = _order_of_steps(steps, valid, picks, counted)
    return torch.minimum(order, _evenly_behind(order, valid, picks))


def _evenly_behind(order: Tensor, valid: Tensor, picks: Picks) -> Tensor:
    """When cells are picked that fill up what is missing, evenly among those that were not picked."""
    left = valid & ~is_picked(order)
    picked = is_picked(order).sum(1, keepdim=True)
    missing, number = picks.number[:, None] - picked, left.sum(1, keepdim=True).clamp(min=1)
    up_to_here = left.cumsum(1) * missing
    filled = left & (up_to_here // number > (up_to_here - missing) // number)
    return torch.where(filled, picked + filled.cumsum(1) - 1, NEVER_PICKED)


def suppression_order(similarity: Any, scores: Tensor, valid: Tensor, picks: Picks, sharpness: float) -> Tensor:
    """Repeatedly the cell with the highest score, which takes from the scores of those that are similar to it.

    Args:
        similarity: float32 (groups, n, n), symmetric.
        scores: float32 (groups, n), not negative.
        valid: bool (groups, n).
        picks: how many of every group.
        sharpness: how fast the effect falls with the distance: exp(-sharpness (1 - similarity)^2) of the pick's own score.

    Returns:
        int64 (groups, n).
    """
    groups = torch.arange(len(scores), device=scores.device)
    blocked = torch.zeros_like(scores).masked_fill_(~valid, -math.inf)
    steps = []
    for _ in range(picks.most):
        pick = (scores + blocked).argmax(1)
        steps.append(pick)
        share = (1 - _rows_of_picks(similarity, pick)).square_().mul_(-sharpness).exp_()
        scores = (scores - share * scores[groups, pick][:, None]).clamp_(min=0)
        blocked[groups, pick] = -math.inf
    return _order_of_steps(steps, valid, picks)


def relevance_order(similarity: Any, scores: Tensor, valid: Tensor, picks: Picks, relevance: float) -> Tensor:
    """Repeatedly the cell with the best balance of a high score and of being unlike all that are picked.

    Args:
        similarity: float32 (groups, n, n), symmetric.
        scores: float32 (groups, n).
        valid: bool (groups, n).
        picks: how many of every group.
        relevance: the share of the score; the rest is that of the largest similarity, which is 0 before the first pick.

    Returns:
        int64 (groups, n).
    """
    groups = torch.arange(len(scores), device=scores.device)
    weighed = (relevance * scores).masked_fill(~valid, -math.inf)
    nearest = torch.zeros_like(scores)
    steps = []
    for step in range(picks.most):
        pick = (weighed - (1 - relevance) * nearest).argmax(1)
        steps.append(pick)
        of_pick = _rows_of_picks(similarity, pick)
        nearest = torch.maximum(nearest, of_pick) if step else of_pick
        weighed[groups, pick] = -math.inf
    return _order_of_steps(steps, valid, picks)


def _order_of_steps(steps: Sequence[Tensor], valid: Tensor, picks: Picks, counted: Sequence[Tensor] = ()) -> Tensor:
    """When cells are picked, int64 (groups, n), from what every step picked in every group, (groups,).

    Steps behind a group's number do not count, nor do those where `counted`, bool (groups,) of every step, says no.
    """
    order = torch.full_like(valid, NEVER_PICKED, dtype=torch.int64)
    if not steps:
        return order
    numbers = torch.arange(len(steps), device=valid.device).expand(len(valid), -1)
    counts = numbers < picks.number[:, None]
    if counted:
        counts = counts & torch.stack(list(counted), dim=1)
    return order.scatter_reduce_(1, torch.stack(list(steps), dim=1), torch.where(counts, numbers, NEVER_PICKED), "amin")
