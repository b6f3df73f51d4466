"""`Look`: one pass of a vision encoder over some images, with all that pruning methods read from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attention_interface import ReceivedAttention
from .evidence import Evidence, VisualEvidence, evidence_to_read
from .features import gather_evidence, prune_features
from .layout import TokenLayout
from .registry import pruning_method
from .settings import VisualTokenPruningConfig


@dataclass(frozen=True)
class Look:
    """What `model.look` returns: features and attention of some images, and what any method makes of them.

    Settings that are asked about must read no other layers than the look had.

    Attributes:
        base: the base model that looked.
        arguments: of its call, by name.
        features: of every image the stock features as stock packs them, (num_stock, hidden).
        received: of the layers that were looked at, the attention that cells receive, float32 (tiles, grid, grid): the tiles of
            all images.
        class_attention: the same of what the class token attends to; empty where the encoder has none.
        feature_layer: the encoder layer, 0-based, whose output is the visual feature; -1 for what enters the first layer.
    """

    base: Any
    arguments: Mapping[str, Any]
    features: Sequence[Tensor]
    received: Mapping[int, Tensor]
    class_attention: Mapping[int, Tensor]
    feature_layer: int

    def layouts(self, pruning: Any = None) -> list[TokenLayout]:
        """How the tokens of every image lie, under some settings or under the model's own."""
        settings = self._settings(pruning)
        sizes = self.base.family.image_sizes(self.base, self.arguments)
        return [self.base.family.layout(self.base, size, settings, self.arguments) for size in sizes]

    def evidence(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> VisualEvidence:
        """What the method of some settings may look at: the scores that it reads, and no others, as some average over all.

        Args:
            pruning: the settings; the model's own unless given.
            layouts: of every image under these settings, where they are known.

        Raises:
            ValueError: where the settings read what was not looked at.
        """
        settings = self._settings(pruning)
        kinds = evidence_to_read(settings, self.base.provided_evidence) or frozenset()
        scores = self.class_attention if Evidence.CLASS_ATTENTION in kinds else self.received
        layers = settings.scored_layers(self.feature_layer)
        missing = [layer for layer in layers if layer not in scores]
        if missing:
            raise ValueError(
                f"the method {settings.method!r} reads the encoder layers {list(layers)}, and {missing} were not looked at. "
                "Give `prunings` or `layers` to `look`."
            )
        layouts = self.layouts(settings) if layouts is None else layouts
        return gather_evidence(self.features, layouts, {layer: scores[layer] for layer in layers}, self.feature_layer)

    def kept(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """What a method keeps of every image: features (num_retained, hidden), and int64 positions in the packed sequence."""
        return prune_features(self.evidence(pruning, layouts))

    def importance(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> Tensor | None:
        """The scores by which a method ranks, float (tiles of all images, grid, grid); None for one that scores nothing."""
        settings = self._settings(pruning)
        return pruning_method(settings.method).importance(self.evidence(settings, layouts), settings)

    def _settings(self, pruning: Any) -> VisualTokenPruningConfig:
        return self.base.config.pruning_config if pruning is None else VisualTokenPruningConfig.coerce(pruning)


class BothAttentions:
    """Collects what `ReceivedAttention` collects in either way, as a layer may be wanted in both.

    Args:
        received: the encoder layers, 0-based, of which what tokens receive is wanted.
        class_attention: those of which what the class token attends to is wanted.

    Attributes:
        received: the collector of the first kind.
        class_attention: that of the second.
        layers: all layers that have to report.
    """

    def __init__(self, received: Iterable[int], class_attention: Iterable[int]):
        self.received = ReceivedAttention(received)
        self.class_attention = ReceivedAttention(class_attention, from_class_token=True)
        self.layers = tuple(sorted({*self.received.layers, *self.class_attention.layers}))

    def reduce(self, layer: int, query: Tensor, key: Tensor, scaling: float, num_heads: int) -> None:
        """Takes queries and keys of a wanted layer, (tiles, heads, tokens, head_dim), for the kinds that want it."""
        for kind in (self.received, self.class_attention):
            if layer in kind.layers:
                kind.reduce(layer, query, key, scaling, num_heads)
