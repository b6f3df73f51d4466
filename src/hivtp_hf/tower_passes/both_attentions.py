"""`BothAttentions`: either kind of attention that methods read, from one pass of the vision tower."""

from collections.abc import Iterable

from torch import Tensor

from ..pruning.attention_interface import ReceivedAttention


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
