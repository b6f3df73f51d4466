"""A language model that drops visual tokens before some of its layers.

Its layers run in segments, one behind each stage. A segment is stock's own `forward` on the layers that belong to it, so masks,
rotary embeddings, attention implementations and caches are stock's. Between two segments the sequence is gathered: hidden
states, positions, the mask's columns, and what belongs to visual tokens.

All rows of a batch go on with one length. A row that drops more than others keeps columns that it has dropped, padding first,
and masks them out. A cache's layers hold what their segment saw. The cache remembers which columns these are, and the length of
its first layer is that of the sequence, so generate(), beams and later turns count as they always do.

What comes out has the length that went in, as losses and callers expect: a column that was dropped shows the state of the last
one before it that is left.

Nothing here lives longer than a call, except what the cache remembers.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compat import cache_among, cache_argument, cache_of, install_recording_hooks, put_cache
from .prompt_columns import PromptColumns
from .surplus_placeholders import cached_length
from .weighted_attention import mask_with_weights

_STORED_ATTRIBUTE = "hivtp_stored_columns"
# What a module's own copies must not take along: calls that were put in place of `forward` are bound to the module.
_OF_THE_MODULE = ("forward", "_old_forward", "_hf_hook")


class Stored(NamedTuple):
    """What the layers of one segment hold of a cache.

    Attributes:
        columns: int64 (rows, stored), which columns of the sequence, ascending.
        is_real: bool (rows, stored); False for columns that are masked out, as another row of the batch needed the room.
        all_real: whether all are.
    """

    columns: Tensor
    is_real: Tensor
    all_real: bool


def calling_in_stages(model: nn.Module, staged: "StagedLanguageModel") -> Any:
    """A base model that calls `staged` where it calls its language model; all else it shares with `model`."""
    view: Any = object.__new__(type(model))
    view.__dict__.update({name: value for name, value in vars(model).items() if name not in _OF_THE_MODULE})
    # Found before modules are looked through.
    view.__dict__["language_model"] = staged
    return view


class StagedLanguageModel:
    """What stands for a language model within one call.

    Args:
        language_model: stock's.
        layers: before which tokens are dropped, ascending from 1.
        columns: of all columns that are cached or new, with as many rows as the call.
        weighs: whether keys have weights, by a mask of ours.
    """

    def __init__(self, language_model: nn.Module, layers: Sequence[int], columns: PromptColumns, weighs: bool):
        self._language_model = language_model
        self._layers = layers
        self._columns = columns
        self._weighs = weighs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._language_model, name)

    # How many tokens are left is no constant of a graph.
    @torch.compiler.disable
    def __call__(self, **arguments: Any) -> Any:
        model: Any = self._language_model
        states, mask, positions = (arguments.pop(name, None) for name in ("inputs_embeds", "attention_mask", "position_ids"))
        ids = arguments.pop("input_ids", None)
        states = model.embed_tokens(ids) if states is None else states
        rows, new = states.shape[:2]
        cache, cache_name = cache_among(arguments), cache_argument(type(model).forward)
        arguments.pop(cache_name, None)
        cached = 0 if cache is None else cached_length(cache)
        _check_mask(mask, cached + new)
        if positions is None:
            positions = torch.arange(cached, cached + new, device=states.device)[None]
        wants_states = arguments["output_hidden_states"] = bool(arguments.get("output_hidden_states"))
        if wants_states or arguments.get("output_attentions"):
            install_recording_hooks(model)  # on the modules themselves, once
        bounds = [0, *self._layers, len(model.layers)]
        stored = _stored_in(cache, cached, bounds, rows, states.device)
        columns = self._columns.of_columns(cached + new)
        # Of columns of text alone this is known without waiting for the device.
        drops = cached < self._columns.stages_survived.shape[1]
        survived = columns.stages_survived[:, cached:].to(states.device)
        index = torch.arange(new, device=states.device).expand(rows, -1)
        is_real = torch.ones_like(index, dtype=torch.bool)
        attended = is_real if mask is None else mask[:, cached:].to(states.device).bool()
        outputs, held = [], [Stored(torch.arange(cached + new, device=states.device).expand(rows, -1), is_real, True)]
        for segment, (first, behind) in enumerate(itertools.pairwise(bounds)):
            if segment and drops:
                picked, is_real = _picked_columns((survived >= segment) & attended, index, is_real)
                index = index.gather(1, picked)
                states = states.gather(1, picked[..., None].expand(-1, -1, states.shape[-1]))
            if segment:
                held.append(_followed(stored[segment - 1], index + cached, is_real, not drops))
            seen = _cache_from(cache, first, len(model.layers))
            output = layers_of(model, first, behind)(
                inputs_embeds=states,
                attention_mask=self._mask_of(mask, held[segment], seen, columns.log_weights, states),
                position_ids=positions.expand(*positions.shape[:-2], rows, new).gather(
                    -1, index.expand(*positions.shape[:-2], -1, -1)
                ),
                **_of_columns_left(arguments, index, first),
                **{cache_name: seen},
                return_dict=True,
            )
            outputs.append(output)
            states = output.last_hidden_state
            cache = cache_of(output) if cache is None else cache
        if cache is not None:
            setattr(cache, _STORED_ATTRIBUTE, (cached + new, held[1:]))
        return _joined(outputs, _at_all_columns(states, index, is_real, new) if drops else states, cache)

    def _mask_of(self, mask: Tensor | None, held: Stored, cache: Any, log_weights: Tensor, states: Tensor) -> Any:
        """The attention mask of a segment, over the columns that its layers hold."""
        of_segment = mask
        if mask is not None:
            of_segment = mask.to(held.columns.device).gather(1, held.columns)
        if not held.all_real:
            of_segment = held.is_real.long() if of_segment is None else of_segment * held.is_real
        if not self._weighs:
            return of_segment
        new = states.shape[1]
        weights = log_weights.to(held.columns.device).gather(1, held.columns)
        config = self._language_model.config
        return mask_with_weights(
            of_segment, weights, cache, held.columns.shape[1] - new, new, states.dtype, config, is_compiled=False
        )


def _check_mask(mask: Any, columns: int) -> None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == columns):
        return
    found = f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
    raise ValueError(
        f"`attention_mask` {found}; with `stages` it must be None or (batch, {columns}), a column for each position that is "
        "cached or new."
    )


def layers_of(model: Any, first: int, behind: int) -> Any:
    """A language model of some of its layers; the last ones end in its norm."""
    view: Any = object.__new__(type(model))
    view.__dict__.update({name: value for name, value in vars(model).items() if name not in _OF_THE_MODULE})
    own = {"layers": model.layers[first:behind]}
    if behind < len(model.layers):
        own["norm"] = nn.Identity()
    view.__dict__["_modules"] = {**model._modules, **own}
    return view


def _cache_from(cache: Any, first: int, num_layers: int) -> Any:
    """A cache as a segment must see it: what is asked of its first layer is asked of the segment's."""
    if cache is None or first == 0:
        return cache
    while len(cache.layers) < num_layers:  # one that grows as it is filled
        cache.layers.append(cache.layer_class_to_replicate())
    view = copy.copy(cache)
    view.layers = [cache.layers[first]] * first + cache.layers[first:]
    return view


def _of_columns_left(arguments: dict[str, Any], index: Tensor, first: int) -> dict[str, Any]:
    """The arguments of a segment, with features of visual tokens for its own layers and the tokens that are left."""
    features, is_visual = arguments.get("deepstack_visual_embeds"), arguments.get("visual_pos_masks")
    if first == 0 or features is None or is_visual is None:
        return arguments
    is_visual = is_visual.to(index.device)
    is_left = is_visual.gather(1, index)
    rows = (is_visual.flatten().cumsum(0) - 1).view_as(is_visual).gather(1, index)[is_left]
    left = [of_layer[rows.to(of_layer.device)] for of_layer in features[first:]]
    return {**arguments, "deepstack_visual_embeds": left or None, "visual_pos_masks": is_left if left else None}


def _picked_columns(is_left: Tensor, index: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns go on: what is left of every row, and of rows with less the first others, which are masked out.

    Args:
        is_left: bool (rows, new).
        index, is_real: (rows, columns) of the segment before.

    Returns:
        Int64 (rows, columns of this segment) into those of the segment before, ascending; and bool, which are left.
    """
    is_left = is_left.gather(1, index) & is_real
    longest = max(1, int(is_left.sum(1).max()))  # a chunk of a prefill may lose all that it has
    picked = torch.sort((~is_left).to(torch.uint8), dim=1, stable=True).indices[:, :longest].sort(dim=1).values
    return picked, is_left.gather(1, picked)


def _followed(before: Stored, columns: Tensor, is_real: Tensor, all_real: bool) -> Stored:
    return Stored(
        torch.cat((before.columns, columns), dim=1),
        torch.cat((before.is_real, is_real), dim=1),
        before.all_real and (all_real or bool(is_real.all())),
    )


def _at_all_columns(states: Tensor, index: Tensor, is_real: Tensor, new: int) -> Tensor:
    """States of the columns that are left, (rows, left, hidden), at all (rows, new, hidden): each as the last one before it."""
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    last = torch.zeros(len(index), new, dtype=torch.int64, device=index.device)
    last = last.scatter(1, index, number.masked_fill(~is_real, 0)).cummax(dim=1).values
    return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))


def _joined(outputs: Sequence[Any], last_hidden_state: Tensor, cache: Any) -> Any:
    """The outputs of all segments as that of the language model: of layers as many columns as each saw."""
    output = outputs[-1]
    output.last_hidden_state = last_hidden_state
    if getattr(output, "hidden_states", None) is not None:
        # What a segment begins with is, gathered, what the one before ended with.
        first, *others = (of_segment.hidden_states for of_segment in outputs)
        output.hidden_states = (*first, *(state for states in others for state in states[1:]))
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(attention for of_segment in outputs for attention in of_segment.attentions)
    put_cache(output, cache)
    return output


def _stored_in(cache: Any, cached: int, bounds: Sequence[int], rows: int, device: Any) -> list[Stored]:
    """What the layers behind every stage hold of a cache. It may have been cropped since; layers that are too long are cropped.

    Raises:
        ValueError: for a cache that was filled otherwise, or cropped to where a row of the batch has lost more than another.
    """
    total: int | None
    stored: list[Stored]
    total, stored = getattr(cache, _STORED_ATTRIBUTE, (None, []))
    if cached == 0 or total is None:  # what no stage has seen is there in every layer
        whole = torch.arange(cached, device=device).expand(rows, -1)
        stored = [Stored(whole, torch.ones_like(whole, dtype=torch.bool), True)] * (len(bounds) - 2)
    elif total < cached or len(stored) != len(bounds) - 2 or rows % len(stored[0].columns):
        raise ValueError(
            f"the cache holds {cached} positions of {rows} rows, and was filled under {len(stored)} stages with {total}. "
            "Continue with the model, the settings and the batch that filled it, or start anew without a cache."
        )
    result = []
    for of_segment, first, behind in zip(stored, bounds[1:], bounds[2:], strict=False):
        columns, is_real, all_real = of_segment
        if total is not None and total > cached:
            lengths = (columns < cached).sum(1)
            if bool((lengths != lengths[0]).any()):
                raise ValueError(
                    f"the cache was cropped to {cached} positions, where rows of the batch have lost unequal numbers of visual "
                    "tokens by `stages`. Crop it behind the images, or crop a cache of one row."
                )
            columns, is_real = columns[:, : int(lengths[0])], is_real[:, : int(lengths[0])]
        times = rows // len(columns)
        if times > 1:
            columns, is_real = columns.repeat_interleave(times, dim=0), is_real.repeat_interleave(times, dim=0)
        if cached:
            _crop_to(cache.layers[first:behind], columns.shape[1])
        result.append(Stored(columns.to(device), is_real.to(device), all_real))
    return result


def _crop_to(layers: Sequence[Any], number: int) -> None:
    """Crops layers of a cache that hold more than so many positions, as those that were cropped by an absolute length do."""
    for layer in layers:
        surplus = int(layer.get_seq_length()) - number
        if surplus < 0:
            raise ValueError(
                f"a layer of the cache holds {number + surplus} positions; with `stages` {number} of those before are expected "
                "there. Start anew without a cache."
            )
        if surplus:
            layer.crop(-surplus)
