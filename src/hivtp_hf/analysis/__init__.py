"""Where the layers of a vision encoder look, and which of them to score. Never travels with checkpoints."""

from .dispersion import attention_share, mean_pairwise_distance, most_attended_cells
from .dispersion_report import DispersionReport, LayerRow
from .layer_analysis import LayerAnalysis, LayerCurve, analyze_layers, evidence_of_all_layers
from .start_layer import suggest_start_layer

__all__ = [
    "DispersionReport",
    "LayerAnalysis",
    "LayerCurve",
    "LayerRow",
    "analyze_layers",
    "attention_share",
    "evidence_of_all_layers",
    "mean_pairwise_distance",
    "most_attended_cells",
    "suggest_start_layer",
]
