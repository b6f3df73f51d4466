"""Retention in stages: what is dropped inside the language model, before some of its layers.

A method ranks the tokens of an image once, from the vision encoder. Before the layer of every stage the lowest ranked ones of
those left are dropped, so how many are left follows from the settings and the number that entered. Nothing is asked of the
language model's attention.

Source: arXiv 2508.05211 (VFlowOpt), section 3.3, for any method that ranks; that newlines stay is ours.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checked_values import checked_number, shown
from .prompt_columns import SURVIVES_ALL
from .registry import pruning_method

# What a stage is, in settings and in texts: (layer, ratio), the layer as an index or as a fraction of the depth.
Stage = tuple[float, float]


def checked_stages(field: str, value: Any) -> tuple[Stage, ...]:
    """Stages as a tuple of pairs; a ValueError otherwise.

    Args:
        field: how to name them.
        value: pairs of a layer and a ratio in a list, or as text with : and +: [[8, 0.5], [0.75, 0.25]] and
            "8:0.5+0.75:0.25" are the same. A layer is a whole number from 1, or a fraction of the depth above 0 and below 1. A
            ratio, above 0 and at most 1, is the share of what is left that goes on.
    """
    try:
        given = [pair.split(":") for pair in value.split("+") if pair] if isinstance(value, str) else list(value or ())
        pairs = [(_checked_layer(field, layer), _checked_ratio(field, ratio)) for layer, ratio in given]
    except (TypeError, ValueError):
        raise ValueError(
            f"`{field}` is {shown(value)}; it must be pairs of a decoder layer and the share of visual tokens that goes on "
            "from there, such as [[8, 0.5], [16, 0.5]] or 8:0.5+16:0.5. A layer is a whole number from 1, or a fraction of "
            "the language model's depth, above 0 and below 1; a share is above 0 and at most 1."
        ) from None
    of_one_kind = [[layer for layer, _ in pairs if isinstance(layer, kind)] for kind in (int, float)]
    if any(earlier >= later for layers in of_one_kind for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"`{field}` is {shown(value)}; their layers must ascend, each once.")
    return tuple(pairs)


def _checked_layer(field: str, value: Any) -> float:
    if isinstance(value, str):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and not value.is_integer():
        return checked_number(field, value, float, 0, 1, above_minimum=True)
    return checked_number(field, value, int, 1)


def _checked_ratio(field: str, value: Any) -> float:
    return checked_number(field, float(value) if isinstance(value, str) else value, float, 0, 1, above_minimum=True)


def stages_of_language_model(pruning: Any, num_layers: int) -> tuple[tuple[int, float], ...]:
    """The stages of some settings in a language model of so many layers: (layer, ratio), layers ascending from 1.

    Raises:
        ValueError: for stages that do not lie behind each other inside it.
    """
    if not pruning.drops_in_stages:
        return ()
    stages = tuple(pruning_method(pruning.method).stages(pruning, num_layers))
    layers = [0, *(layer for layer, _ in stages), num_layers]
    if any(earlier >= later for earlier, later in itertools.pairwise(layers)):
        raise ValueError(
            f"the stages of {pruning!r} begin before the decoder layers {layers[1:-1]}; the language model has {num_layers} "
            f"layers, so they must ascend from 1 to {num_layers - 1}. Change `stages`."
        )
    return stages


def drops_any(pruning: Any, num_layers: int) -> bool:
    """Whether a stage of some settings, those of one image, drops anything of it."""
    return any(ratio < 1 for _, ratio in stages_of_language_model(pruning, num_layers))


def tokens_of_layers(layout: Any, num_layers: int) -> list[int]:
    """How many tokens of an image each layer of a language model sees, newlines and a class token included.

    Args:
        layout: of the image, with its settings.
        num_layers: of the language model.
    """
    stages = stages_of_language_model(layout.pruning, num_layers)
    counts_newlines = pruning_method(layout.pruning.method).counts_newlines
    staying = 0 if counts_newlines else layout.num_newlines + layout.num_class_tokens
    left = left_after_stages(layout.num_retained - staying, [ratio for _, ratio in stages])
    bounds = [*(layer for layer, _ in stages), num_layers]
    tokens = [layout.num_retained] * bounds[0]
    for ranked, (first, behind) in zip(left, itertools.pairwise(bounds), strict=True):
        tokens += [staying + ranked] * (behind - first)
    return tokens


def layer_of_stage(layer: float, num_layers: int) -> int:
    """The decoder layer that a stage names: an index as it is, a fraction as the layer at that depth, rounded down."""
    return layer if isinstance(layer, int) else math.floor(layer * num_layers)


def left_after_stages(number: int, ratios: Sequence[float]) -> list[int]:
    """How many of some ranked tokens are left after every stage: of m, m - round(m (1 - ratio)), halves to even."""
    left = []
    for ratio in ratios:
        number -= round(number * (1 - ratio))
        left.append(number)
    return left


def stages_survived(importance: Tensor, is_ranked: Tensor, ratios: Sequence[float]) -> Tensor:
    """After how many stages tokens of an image are still there.

    Args:
        importance: float (tokens,), of those that enter the language model; NaN is the lowest, ties go to the earlier token.
        is_ranked: bool (tokens,), which may be dropped.
        ratios: of every stage.

    Returns:
        int64 (tokens,): the number of stages for what survives all of them, or `SURVIVES_ALL`.
    """
    scores = importance.float().nan_to_num(-math.inf, math.inf, -math.inf)
    # Ranked ones first, by falling importance.
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort((~is_ranked[order]).to(torch.uint8), stable=True).indices]
    survived = torch.full(importance.shape, SURVIVES_ALL, dtype=torch.int64, device=importance.device)
    previous = int(is_ranked.sum())
    for stage, left in enumerate(left_after_stages(previous, ratios)):
        survived[order[left:previous]] = stage
        previous = left
    return survived
