"""Passes of the vision tower alone, as a model itself does them: stock's, and the attention that methods read from it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from .pruning.attention_interface import ReceivedAttention
from .pruning.model import PrunedModelMixin


class BothAttentions:
    """Collects what `ReceivedAttention` collects in either way, as a layer may be wanted in both.

    Args:
        received: the encoder layers, 0-based, of which what tokens receive is wanted.
        from_class_token: those of which what the class token attends to is wanted.

    Attributes:
        received: the collector of the first kind.
        from_class_token: that of the second.
        layers: all layers that have to report.
    """

    def __init__(self, received: Iterable[int], from_class_token: Iterable[int]):
        self.received = ReceivedAttention(received)
        self.from_class_token = ReceivedAttention(from_class_token, from_class_token=True)
        self.layers = tuple(sorted({*self.received.layers, *self.from_class_token.layers}))

    def reduce(self, layer: int, query: Tensor, key: Tensor, scaling: float, num_heads: int) -> None:
        """Takes queries and keys of a wanted layer, (tiles, heads, tokens, head_dim), for the kinds that want it."""
        for kind in (self.received, self.from_class_token):
            if layer in kind.layers:
                kind.reduce(layer, query, key, scaling, num_heads)


def stock_pass(base: Any, inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """What stock transformers would do with some images, still to be called: the pass that a pruned model itself runs.

    Args:
        base: the base model of one of ours, `model.model`.
        inputs: what the processor returned for the images: `pixel_values`, and `image_sizes` for LLaVA-NeXT.
    """
    # What comes behind the mixin is stock.
    features = super(PrunedModelMixin, base).get_image_features
    return functools.partial(features, inputs["pixel_values"], **sizes_of(inputs), return_dict=True)


def sizes_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `image_sizes`, where the family has it."""
    return {name: inputs[name] for name in ("image_sizes",) if inputs.get(name) is not None}
