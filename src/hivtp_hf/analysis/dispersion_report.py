"""`DispersionReport`: an analysis beside a checkpoint's settings, row by row, for tables, files and figures."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..pruning.settings import VisualTokenPruningConfig
from .layer_analysis import LayerAnalysis
from .start_layer import suggest_start_layer, window_mean


class LayerRow(NamedTuple):
    """One encoder layer.

    Attributes:
        layer: 0-based.
        received_dispersion, class_token_dispersion: mean distance in cells between two of the cells that receive most
            attention, and of those that the class token attends to most; None where there is no class token.
        received_share, class_token_share: how much of all cells' attention those cells have, 0 to 1.
        random_dispersion: the distance in expectation, if cells were chosen at random; the same for every layer.
        scored: whether the checkpoint's settings read this layer.
        suggested: whether `importance_start_layer` as suggested would.
        is_feature: whether its output is the visual feature.
    """

    layer: int
    received_dispersion: float
    received_share: float
    class_token_dispersion: float | None
    class_token_share: float | None
    random_dispersion: float
    scored: bool
    suggested: bool
    is_feature: bool


@dataclass(frozen=True)
class DispersionReport:
    """What an analysis says of a checkpoint.

    Attributes:
        checkpoint: its name, as it was given.
        model_type: of its config.json.
        settings: its pruning settings, or the defaults of a stock checkpoint. They may ask for layers that do not exist.
        analysis: what was measured.
    """

    checkpoint: str
    model_type: str
    settings: VisualTokenPruningConfig
    analysis: LayerAnalysis

    @property
    def num_layers(self) -> int:
        """Depth of the encoder."""
        return len(self.analysis.received.dispersion)

    @property
    def importance_num_layers(self) -> int:
        """How many layers hivtp averages: as the settings say, or by default where they are of another method."""
        return self.settings.replace(method="hivtp").importance_num_layers

    @cached_property
    def scored_layers(self) -> list[int]:
        """The layers that the settings read, as far as they exist."""
        scored = self.settings.scored_layers(self.analysis.feature_layer)
        return [layer for layer in range(self.num_layers) if layer in scored]

    @cached_property
    def suggested_start_layer(self) -> int | None:
        """As `suggest_start_layer` says; None where no window fits."""
        analysis = self.analysis
        return suggest_start_layer(analysis.received.dispersion, self.importance_num_layers, analysis.feature_layer)

    @property
    def suggested_layers(self) -> list[int]:
        """The layers that hivtp would read from the suggested one on."""
        start = self.suggested_start_layer
        return [] if start is None else list(range(start, start + self.importance_num_layers))

    def relative_dispersion(self, layers: list[int]) -> float:
        """Mean dispersion of received attention over successive layers, as a multiple of that of random cells."""
        return window_mean(self.analysis.received.dispersion, layers[0], len(layers)) / self.analysis.random_dispersion

    def rows(self) -> list[LayerRow]:
        """Every layer, the first one first."""
        analysis, class_token = self.analysis, self.analysis.class_token
        return [
            LayerRow(
                layer,
                analysis.received.dispersion[layer],
                analysis.received.attention_share[layer],
                None if class_token is None else class_token.dispersion[layer],
                None if class_token is None else class_token.attention_share[layer],
                analysis.random_dispersion,
                layer in self.scored_layers,
                layer in self.suggested_layers,
                layer == analysis.feature_layer,
            )
            for layer in range(self.num_layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON types."""
        return {
            "checkpoint": self.checkpoint,
            "model_type": self.model_type,
            "pruning_config": self.settings.to_dict(),
            "num_images": self.analysis.num_images,
            "num_tiles": self.analysis.num_tiles,
            "top_share": self.analysis.top_share,
            "random_dispersion": self.analysis.random_dispersion,
            "feature_layer": self.analysis.feature_layer,
            "scored_layers": self.scored_layers,
            "importance_num_layers": self.importance_num_layers,
            "suggested_start_layer": self.suggested_start_layer,
            "layers": [row._asdict() for row in self.rows()],
        }
