"""Spread: an even sample of the cells of a view, in which those that stand out have a fixed extra chance.

Source: ours. The foreground is kept thinned and spread rather than whole, and the rest of the budget is an even skeleton of
the background. Nothing is learnt, merged or drawn at random: it is a systematic sample along a Hilbert curve. Every stretch of
the curve keeps as many cells as its chances add up to, to within one. All counting is in whole numbers, so that exactly as many
cells stay as the ratio says, and a device chooses as another does where scores are equal.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pruning.evidence import EncoderFacts, Evidence, ViewEvidence
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, check_views, settings_of
from .greedy import unit_vectors
from .hivtp import MIDDLE_LAYER_SETTINGS, check_middle_layers, middle_layers
from .ranking import totals_of_views

# The chance 1, as a whole number: 2 ** _BITS.
_BITS = 24
_ONE = 2**_BITS
# Scores whose mean is not above this say nothing.
_LEAST_MEAN = 1e-6
# What features of views that are scored at once may take.
_FEATURE_BYTES = 64 * 2**20


class Spread(PruningMethod):
    """An even sample with an extra chance for what stands out."""

    name = "spread"
    rule = "an even sample along a Hilbert curve, with an extra chance for what stands out (ours)"
    settings = (
        Setting("focus", float, 0.3, 0, 1, meaning="the extra chance of what stands out most; 0 is an even sample"),
        Setting(
            "contrast",
            float,
            2.0,
            1,
            above_minimum=True,
            search=(1.05, 10),
            meaning="how many times the mean score stands out most; what is at the mean or below does not",
        ),
        Setting(
            "score",
            str,
            "attention",
            choices=("attention", "features"),
            meaning="by what cells stand out: the attention that they receive, or how far their features are from their mean",
        ),
        *MIDDLE_LAYER_SETTINGS,
    )
    colour = "#D62728"
    knows_inclusion = True

    def check_settings(self, pruning: VisualTokenPruningConfig) -> None:
        check_middle_layers(pruning)

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.FEATURES if pruning.score == "features" else Evidence.RECEIVED_ATTENTION}),)

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return middle_layers(pruning, encoder) if pruning.score == "attention" else ()

    def select(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_spread(_spread_scores(evidence, pruning), evidence.valid, pruning)

    def inclusion(self, evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return _chances(_spread_scores(evidence, pruning), evidence.valid, pruning).float() / _ONE


def select_spread(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """An even sample with an extra chance for cells of high scores, of views of one shape at once.

    A cell's extra chance is `focus` times its excess, (score / mean score - 1) / (`contrast` - 1) within 0 and 1. What is left
    of the budget is shared evenly by all cells, up to a chance of 1; where extra chances exceed the budget, they shrink in
    proportion. Along the Hilbert curve of the view, a cell is kept where the sum of chances passes a half, three halves, and
    so on.

    Args:
        scores: (views, rows, columns), any float dtype, what cells stand out by; compared in float32. Where their mean is not
            finite or not above 1e-6, nothing stands out.
        valid: bool (views, rows, columns) on the same device; other cells are never kept and take no budget.
        pruning: a config of the method "spread" with a retention ratio, or its settings as a dict.

    Returns:
        bool (views, rows, columns). Each view keeps `rounded_share(valid cells, retention_ratio)` cells, whatever the scores.

    Raises:
        ValueError: on shapes or dtypes that do not fit, another method's config, and a token budget in place of a ratio.
    """
    check_views(valid, scores=scores)
    chances = _chances(scores, valid, settings_of("spread", pruning)).flatten(1)
    walk = hilbert_walk(*valid.shape[1:]).to(valid.device)
    passed = (chances[:, walk].cumsum(1) + _ONE // 2) // _ONE
    grows = passed > torch.nn.functional.pad(passed[:, :-1], (1, 0))
    return torch.zeros_like(grows).index_copy_(1, walk, grows).view_as(valid)


def distance_from_mean(features: Tensor, valid: Tensor) -> Tensor:
    """How little the feature of each cell is the mean one of its view: 1 less their cosine, float32 (views, cells).

    Args:
        features: (views, cells, hidden), any float dtype. Those that are zero or not finite have the score 1.
        valid: bool (views, cells), of which cells the mean is taken.
    """
    directions = unit_vectors(features, valid)
    mean = unit_vectors(directions.sum(1, keepdim=True), valid.any(1, keepdim=True))
    return (1 - (directions * mean).sum(2)).clamp(min=0)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def hilbert_walk(rows: int, columns: int) -> Tensor:
    """The cells of a view in the order of the Hilbert curve of the smallest square of side 2 ** m that holds it.

    Args:
        rows, columns: of the view. The curve begins at the first cell, and x is the column.

    Returns:
        int64 (rows * columns,), raster indices, on the CPU; cells outside the view are skipped.
    """
    y, x = (line.ravel() for line in np.indices((rows, columns)))
    place = np.zeros(rows * columns, dtype=np.int64)
    side = 1 << (max(rows, columns) - 1).bit_length()
    half = side // 2
    while half:
        right, below = (x & half) > 0, (y & half) > 0
        place += half * half * ((3 * right) ^ below)
        # Quarters above are turned, so that the curve leaves each where it enters the next one.
        flipped = ~below & right
        x, y = np.where(flipped, side - 1 - x, x), np.where(flipped, side - 1 - y, y)
        x, y = np.where(below, x, y), np.where(below, y, x)
        half //= 2
    return torch.from_numpy(np.argsort(place, kind="stable"))


def _spread_scores(evidence: ViewEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
    """What cells stand out by, float32 (views, rows, columns)."""
    if pruning.score == "attention":
        return evidence.mean_scores()
    features = evidence.features
    cells = evidence.valid.flatten(1)
    at_once = max(1, _FEATURE_BYTES // max(1, 8 * cells.shape[1] * features.width))
    scores = [
        distance_from_mean(features.of_views(first, first + at_once), cells[first : first + at_once])
        for first in range(0, len(cells), at_once)
    ]
    return torch.cat(scores).view_as(evidence.valid)


def _chances(scores: Tensor, valid: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """The chance of every cell to be kept, as a whole number of which 2 ** 24 is certainty: int64 (views, rows, columns)."""
    cells = valid.flatten(1)
    number = cells.sum(1, keepdim=True)
    wanted = totals_of_views(cells, pruning)[:, None]
    extra = _extra_chances(scores.flatten(1), cells, number, pruning)
    all_extra = extra.sum(1, keepdim=True)

    # Where extra chances alone exceed the budget: extra * wanted * _ONE // all_extra, divided at length, as the product may not
    # fit into 64 bits.
    quotient, rest = extra * wanted // all_extra.clamp(min=1), extra * wanted % all_extra.clamp(min=1)
    for _ in range(2):
        rest = rest << (_BITS // 2)
        quotient, rest = (quotient << (_BITS // 2)) + rest // all_extra.clamp(min=1), rest % all_extra.clamp(min=1)

    # Else all get an even share of what is left, but none more than certainty: as many as would get more are certain.
    highest = torch.sort(torch.where(cells, extra, -1), dim=1, descending=True).values.clamp(min=0)
    certain = torch.arange(cells.shape[1], device=cells.device)
    of_others = all_extra - (highest.cumsum(1) - highest)
    even = torch.div(wanted * _ONE - certain * _ONE - of_others, (number - certain).clamp(min=1), rounding_mode="floor")
    fits = (highest + even <= _ONE) & (certain < number)
    first = fits.int().argmax(1, keepdim=True)  # the first maximum
    shared = torch.where(fits.any(1, keepdim=True), extra + even.gather(1, first), _ONE).clamp(max=_ONE)

    chances = torch.where(all_extra > wanted * _ONE, quotient, shared)
    return torch.where(cells, chances, 0).view_as(valid)


def _extra_chances(scores: Tensor, cells: Tensor, number: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """`focus` times how far cells stand out, within 0 and 1, as whole numbers of which 2 ** 24 is 1: int64 (views, cells)."""
    scores = torch.where(cells, scores.float(), 0.0)
    mean = scores.sum(1, keepdim=True) / number.clamp(min=1)
    says_something = mean.isfinite() & (mean > _LEAST_MEAN)
    excess = ((scores / torch.where(says_something, mean, 1.0) - 1) / (pruning.contrast - 1)).clamp(0, 1)
    excess = torch.where(says_something & cells, excess, 0.0)
    return (pruning.focus * excess * _ONE).round().long()
