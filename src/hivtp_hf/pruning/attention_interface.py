"""How much attention every token of a vision encoder receives, whatever attention implementation runs.

Queries and keys are taken where they reach transformers' attention interface. `attach` gives every attention module of the
encoder a view of its configuration that names a function of ours as the implementation; the function reduces queries
and keys of the wanted layers to scores and then runs the implementation that the real configuration names. So

* no attention map is kept and no upstream forward is copied: `output_attentions` stays off;
* `set_attn_implementation` goes on working, since it changes the real configuration;
* nothing is stored on a module between calls: scores go into a `ReceivedAttention` object that belongs to one call;
* two copies of this file in one process do not meet: each import registers under a name of its own.

Source: HIVTP, arXiv 2509.23663, section 3.1 (importance from the middle layers).
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_scores import received_attention
from .config_views import ConfigView, ModuleView
from .encoder_layers import find_layers

_IMPLEMENTATION_NAME = f"hivtp_received_attention_{uuid.uuid4().hex}"
_KEYWORD = "hivtp_received_attention"


class ReceivedAttention:
    """Collects the scores of one pass through the encoder.

    A plain object on purpose: dispatch hooks copy dicts and lists on their way into a module, and a copy would take the
    scores with it.

    Args:
        layers: the encoder layers to score, 0-based.
        from_class_token: whether only what the class token (the first) attends to counts, instead of every token's attention.
    """

    def __init__(self, layers: Iterable[int], from_class_token: bool = False):
        self.layers = tuple(sorted(set(layers)))
        self.from_class_token = from_class_token
        self._by_layer: dict[int, Tensor] = {}

    def reduce(self, layer: int, query: Tensor, key: Tensor, scaling: float, num_heads: int) -> None:
        """Takes queries and keys of a wanted layer, (tiles, heads, tokens, head_dim), and keeps its scores."""
        rows = query[:, :, :1] if self.from_class_token else query
        self._by_layer[layer] = received_attention(rows, key, scaling, num_heads)

    def by_layer(self) -> dict[int, Tensor]:
        """The scores of every wanted layer: float32 (tiles, tokens).

        Raises:
            ValueError: if a layer did not report. Selecting without its scores would be a guess.
        """
        silent = [layer for layer in self.layers if layer not in self._by_layer]
        if silent:
            raise ValueError(
                f"the encoder layers {silent} ran without reporting their attention, so visual tokens cannot be chosen. "
                "The vision tower's attention modules were replaced, or do not call transformers' attention interface. "
                "Load the tower with a transformers implementation such as CLIP or SigLIP."
            )
        return {layer: self._by_layer[layer] for layer in self.layers}


_active: ContextVar["ReceivedAttention | None"] = ContextVar(_IMPLEMENTATION_NAME, default=None)


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
    def _context(self, collector: ReceivedAttention) -> Iterator[None]:
        token = _active.set(collector)
        try:
            yield
        finally:
            _active.reset(token)

    def call(self, function: Callable[..., Any], collector: Any, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, with the encoder's layers reporting to `collector`.

        It has `layers` and `reduce` as a `ReceivedAttention` has them.
        """
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
        view = _TowerConfigView(attention.config, layer=index, eager=eager, forwards_keywords=None)
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


def eager_attention_of(module: nn.Module) -> Any:
    """What an attention module of transformers runs under "eager": a function of its file, or None."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


class _TowerConfigView(ConfigView):
    """The configuration of an attention module of the encoder, naming `_attention_with_scores`.

    Besides: `_hivtp_layer`, its index; `_hivtp_eager`, what runs where the configuration names "eager"; and
    `_hivtp_forwards_keywords`, None until the probe has answered.
    """

    _attn_implementation = _IMPLEMENTATION_NAME


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
    """Registered with transformers' attention interface; queries and keys are (tiles, heads, tokens, head_dim)."""
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
        collector.reduce(view._hivtp_layer, query, key, scaling, view.num_attention_heads)
    config = view._hivtp_config
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, view._hivtp_eager)
    return implementation(ModuleView(module, config), query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(_IMPLEMENTATION_NAME, _attention_with_scores)
