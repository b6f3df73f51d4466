"""`see`: one pass of the vision tower, which all methods and ratios share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..encoder_layers import ending_early, wanting_features_only
from ..methods import pruning_method
from ..pruned_features import gather_evidence
from ..pruning_config import VisualTokenPruningConfig
from ..token_layout import TokenLayout
from ..tower_passes.both_attentions import BothAttentions
from ..tower_passes.stock_pass import stock_pass
from ..visual_evidence import VisualEvidence


class SeenImages(NamedTuple):
    """What the tower says of some images.

    Attributes:
        features: of every image the stock features as they are packed, (num_stock, hidden).
        received: of every layer that some method reads, the attention that tokens receive, float32 (tiles, tokens).
        from_class_token: the same of what the class token attends to.
        feature_layer: the encoder layer, 0-based, whose output is the visual feature.
    """

    features: list[Tensor]
    received: Mapping[int, Tensor]
    from_class_token: Mapping[int, Tensor]
    feature_layer: int

    def evidence_for(self, layouts: Sequence[TokenLayout]) -> VisualEvidence:
        """What a method may look at: the scores that it reads under its settings, and no others, as methods average over all.

        Args:
            layouts: of every image, all under the method's settings.
        """
        settings = layouts[0].pruning
        scores = self.from_class_token if pruning_method(settings.method).reads_class_attention else self.received
        read = {layer: scores[layer] for layer in settings.scored_layers(self.feature_layer)}
        return gather_evidence(self.features, layouts, read, self.feature_layer)


@torch.no_grad()
def see(model: Any, inputs: Mapping[str, Any], prunings: Iterable[VisualTokenPruningConfig]) -> SeenImages:
    """Runs the vision tower once over some images, and takes along what all methods look at.

    Features and scores are those of the model's own pass, bit for bit: stock runs as the model lets it run, without the layers
    that nothing is read from.

    Args:
        model: a pruned model with a language modelling head. Its own settings play no part.
        inputs: of the processor for the images: `pixel_values`, and `image_sizes` for LLaVA-NeXT.
        prunings: the settings of all methods.

    Raises:
        ValueError: for settings that do not fit the tower, and where features or scores are not finite.
    """
    base = model.model
    received: set[int] = set()
    from_class_token: set[int] = set()
    layer = base._feature_layer(VisualTokenPruningConfig(method="none"))
    for pruning in prunings:
        base._feature_layer(pruning)
        read = from_class_token if pruning_method(pruning.method).reads_class_attention else received
        read.update(pruning.scored_layers(layer))

    with wanting_features_only():
        both = BothAttentions(received, from_class_token)
        stock = stock_pass(base, inputs)
        shorter = ending_early(stock, base.config.vision_config, base.config.vision_feature_layer, both.layers)
        output = base._received_attention_tap.call(shorter, both) if both.layers else shorter()
    features = list(output.pooler_output)
    _check_finite("visual features", features)
    by_layer = {"received": both.received.by_layer(), "from_class_token": both.from_class_token.by_layer()}
    for scores in by_layer.values():
        _check_finite("attention scores", list(scores.values()))
    return SeenImages(features, **by_layer, feature_layer=layer)


def _check_finite(what: str, values: Sequence[Tensor]) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"the vision tower returned {what} that are not finite. Load it in another dtype, such as float32.")
