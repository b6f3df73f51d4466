"""How much attention every token of a vision encoder receives, whatever attention implementation runs.

Queries and keys are taken where they reach transformers' attention interface. `attach` gives every attention module of the
encoder a view of its configuration that names a function of ours as the implementation; the function reduces queries
and keys of the wanted layers to scores and then runs the implementation that the real configuration names. So

* no attention map is kept and no upstream forward is copied: `output_attentions` stays off;
* `set_attn_implementation` goes on working, since it changes the real configuration;
* nothing is stored on a module between calls: scores go into a `CollectedAttention` object that belongs to one call;
* two copies of this file in one process do not meet: each import registers under a name of its own.

Source: HIVTP, arXiv 2509.23663, section 3.1 (importance from the middle layers).
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_scores import attention_of_rows, mean_keys, received_attention
from .config_views import ConfigView, ModuleView
from .encoder_layers import find_layers

_IMPLEMENTATION_NAME = f"hivtp_received_attention_{uuid.uuid4().hex}"
# Towers that pack images into one sequence look for this word, and call the implementation otherwise where they find it.
_FLASH_NAME = f"flash_attention_{_IMPLEMENTATION_NAME}"
_KEYWORD = "hivtp_received_attention"


class RowsWanted(NamedTuple):
    """What is wanted of the attention rows of some tokens, which follow from what tokens receive.

    Attributes:
        layers: the encoder layers, 0-based.
        choose: of the attention that tokens receive from each other, float32 (sequences, tokens), and the first sequence's
            number among those of the pass: the tokens, int64 (sequences, n), and the weights by which their rows are summed.
    """

    layers: tuple[int, ...]
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]


class CollectedAttention:
    """Collects the scores of one pass through the encoder.

    A plain object on purpose: dispatch hooks copy dicts and lists on their way into a module, and a copy would take the
    scores with it.

    Args:
        received: the encoder layers, 0-based, of which the attention that tokens receive from all tokens is wanted.
        class_attention: those of which it is wanted what the class token (the first) attends to.
        rows: by any name, of which layers it is wanted what some tokens attend to.
        class_tokens: how many class tokens stand first. They have no part in `rows`, neither as rows nor as columns.
        keys: the layers of which the keys of tokens are wanted, heads averaged.

    Attributes:
        layers: all layers that have to report.
    """

    def __init__(
        self,
        received: Iterable[int] = (),
        class_attention: Iterable[int] = (),
        rows: Mapping[Any, RowsWanted] | None = None,
        class_tokens: int = 0,
        keys: Iterable[int] = (),
    ):
        self._received = tuple(sorted(set(received)))
        self._class_attention = tuple(sorted(set(class_attention)))
        self._rows = dict(rows or {})
        self._class_tokens = class_tokens
        self._keys = tuple(sorted(set(keys)))
        of_rows = [layer for wanted in self._rows.values() for layer in wanted.layers]
        self.layers = tuple(sorted({*self._received, *self._class_attention, *self._keys, *of_rows}))
        self._scores: dict[tuple[Hashable, int], list[Tensor]] = {}
        self._sequences: dict[int, int] = {}

    def reduce(self, layer: int, query: Tensor, key: Tensor, scaling: float, num_heads: int) -> None:
        """Takes queries and keys of one call of a layer, (sequences, heads, tokens, head_dim), and keeps what is wanted.

        A layer that is called for one segment of a packed sequence after another reports them in this order.
        """
        for from_class_token, layers in ((False, self._received), (True, self._class_attention)):
            if layer in layers:
                rows = query[:, :, :1] if from_class_token else query
                self._keep(from_class_token, layer, received_attention(rows, key, scaling, num_heads))
        if layer in self._keys:
            self._keep("keys", layer, mean_keys(key, num_heads))
        of_layer = [name for name, wanted in self._rows.items() if layer in wanted.layers]
        if not of_layer:
            return
        # The class token's row goes, and its column afterwards: shares of attention are those of all tokens.
        others, first = query[:, :, self._class_tokens :], self._sequences.get(layer, 0)
        received = received_attention(others, key, scaling, num_heads)[:, self._class_tokens :]
        self._sequences[layer] = first + query.shape[0]
        for name in of_layer:
            chosen, weights = self._rows[name].choose(received, first)
            scores = attention_of_rows(others, key, scaling, num_heads, chosen, weights)[:, self._class_tokens :]
            self._keep(("rows", name), layer, scores)

    def _keep(self, kind: Hashable, layer: int, scores: Tensor) -> None:
        # A new list each time, which compilers trace where they would not trace one that grows.
        self._scores[kind, layer] = [*self._scores.get((kind, layer), ()), scores]

    def received(self) -> dict[int, list[Tensor]]:
        """Of every layer wanted the attention that tokens receive: float32 (sequences, tokens) for each call of the layer.

        Raises:
            ValueError: if a layer did not report. Selecting without its scores would be a guess.
        """
        return self._of(False, self._received)

    def class_attention(self) -> dict[int, list[Tensor]]:
        """The same of what the class token attends to."""
        return self._of(True, self._class_attention)

    def keys(self) -> dict[int, list[Tensor]]:
        """The same of the keys of tokens, heads averaged: float32 (sequences, tokens, size)."""
        return self._of("keys", self._keys)

    def rows(self) -> dict[Hashable, dict[int, list[Tensor]]]:
        """By name the same of what the tokens attend to that were chosen, class tokens left out."""
        return {name: self._of(("rows", name), wanted.layers) for name, wanted in self._rows.items()}

    def _of(self, kind: Hashable, layers: tuple[int, ...]) -> dict[int, list[Tensor]]:
        silent = [layer for layer in layers if (kind, layer) not in self._scores]
        if silent:
            raise ValueError(
                f"the encoder layers {silent} ran without reporting their attention, so visual tokens cannot be chosen. "
                "The vision tower's attention modules were replaced, or do not call transformers' attention interface. "
                "Load the tower with a transformers implementation such as CLIP or SigLIP."
            )
        return {layer: self._scores[kind, layer] for layer in layers}


_active: ContextVar["CollectedAttention | None"] = ContextVar(_IMPLEMENTATION_NAME, default=None)


class ReceivedAttentionTap:
    """What `attach` leaves behind: the way from a call to the attention modules of one encoder.

    Attributes:
        num_layers: depth of the encoder.
        forwards_keywords: whether the encoder hands unknown keyword arguments on to the attention interface. Then the
            collector travels as one, which compilers can trace. Else it travels by a context variable.
    """

    def __init__(self, num_layers: int, forwards_keywords: bool):
        self.num_layers = num_layers
        self.forwards_keywords = forwards_keywords

    @contextlib.contextmanager
    def _context(self, collector: CollectedAttention) -> Iterator[None]:
        token = _active.set(collector)
        try:
            yield
        finally:
            _active.reset(token)

    def call(self, function: Callable[..., Any], collector: CollectedAttention, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, with the encoder's layers reporting to `collector`."""
        if not collector.layers:
            return function(*args, **kwargs)
        if self.forwards_keywords:
            return function(*args, **kwargs, **{_KEYWORD: collector})
        with self._context(collector):
            return function(*args, **kwargs)


def attach(encoder: nn.Module, num_layers: int) -> ReceivedAttentionTap:
    """Lets the attention modules of an encoder report; does not change what they compute.

    Args:
        encoder: a transformers vision model, freshly built.
        num_layers: its depth as its configuration says.

    Raises:
        ValueError: if its layers or their attention modules are not recognised.
    """
    layers = find_layers(encoder, num_layers)
    views = []
    for index, layer in enumerate(layers):
        attention = _attention_module(layer)
        eager = eager_attention_of(attention)
        heads = _first_of((attention, attention.config), ("num_heads", "num_attention_heads"))
        view = _TowerConfigView(attention.config, layer=index, eager=eager, num_heads=heads, forwards_keywords=None)
        attention.config = view
        views.append(view)
    forwards_keywords = _probe_keywords(layers[0], views[0])
    for view in views:
        object.__setattr__(view, "_hivtp_forwards_keywords", forwards_keywords)
    return ReceivedAttentionTap(num_layers, forwards_keywords)


def _attention_module(layer: nn.Module) -> Any:
    found = [module for module in layer.modules() if hasattr(module, "config") and hasattr(module, "is_causal")]
    if len(found) != 1:
        raise ValueError(
            f"{type(layer).__name__} has {len(found)} attention modules that are recognised; pruning needs exactly one. "
            "Use a vision tower of transformers such as CLIPVisionModel or SiglipVisionModel."
        )
    return found[0]


def _first_of(objects: Iterable[Any], names: Iterable[str]) -> Any:
    """The first attribute that one of some objects has; towers keep the number of their heads in several places."""
    return next(getattr(thing, name) for name in names for thing in objects if hasattr(thing, name))


def eager_attention_of(module: nn.Module) -> Any:
    """What an attention module of transformers runs under "eager": a function of its file, or None."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


class _TowerConfigView(ConfigView):
    """The configuration of an attention module of the encoder, naming `_attention_with_scores`.

    Besides: `_hivtp_layer`, its index; `_hivtp_num_heads`, of the whole layer; `_hivtp_eager`, what runs where the
    configuration names "eager"; and `_hivtp_forwards_keywords`, None until the probe has answered.
    """

    @property
    def _attn_implementation(self) -> str:  # type: ignore[override]
        return _FLASH_NAME if "flash" in str(self._hivtp_config._attn_implementation) else _IMPLEMENTATION_NAME


class _ProbeReply(Exception):
    """Ends a probe: says whether the keyword argument came through."""


def _probe_keywords(layer: nn.Module, view: _TowerConfigView) -> bool:
    """Whether a keyword argument given to a layer reaches the attention interface.

    Asked once with one token, on whatever device the fresh weights are. Where the layer cannot run yet (weights that
    are partitioned over ranks), the answer is no: the context variable works everywhere, only not inside compiled graphs.
    """
    weight = next(layer.parameters())
    token = torch.zeros(1, 1, view.hidden_size, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            layer(token, attention_mask=None, **{_KEYWORD: True})
    except _ProbeReply as reply:
        return bool(reply.args[0])
    except Exception:
        return False
    return False


def _attention_with_scores(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Registered with transformers' attention interface; queries and keys are (sequences, heads, tokens, head_dim)."""
    view = module.config
    collector = kwargs.pop(_KEYWORD, None)
    if view._hivtp_forwards_keywords is None:
        raise _ProbeReply(collector is not None)
    if not view._hivtp_forwards_keywords:
        collector = _active.get()
    if collector is not None and view._hivtp_layer in collector.layers:
        if attention_mask is not None:
            raise ValueError("the vision tower masks its attention; scores of masked towers are not supported.")
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for queries, keys in zip(*_segments((query, key), kwargs.get("cu_seq_lens_q")), strict=True):
            collector.reduce(view._hivtp_layer, queries, keys, scaling, view._hivtp_num_heads)
    config = view._hivtp_config
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, view._hivtp_eager)
    return implementation(ModuleView(module, config), query, key, value, attention_mask, *args, **kwargs)


def _segments(tensors: tuple[Tensor, Tensor], cumulative_lengths: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Queries and keys of every sequence of a call; flash attention takes packed ones together, and is told their ends."""
    if cumulative_lengths is None:
        return [(tensor,) for tensor in tensors]
    lengths = cumulative_lengths.diff().tolist()
    return [tensor.split(lengths, dim=2) for tensor in tensors]


for _name in (_IMPLEMENTATION_NAME, _FLASH_NAME):
    AttentionInterface.register(_name, _attention_with_scores)
