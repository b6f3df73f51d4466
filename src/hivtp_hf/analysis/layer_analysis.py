"""`analyze_layers`: for every layer of a vision encoder, how far apart its most attended cells lie in some images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.evidence import VisualEvidence
from ..pruning.features import feature_layer, gather_evidence
from ..tower_passes.both_attentions import BothAttentions
from ..tower_passes.stock_pass import sizes_of, stock_pass
from .dispersion import attention_share, checked_share, mean_pairwise_distance, most_attended_cells


@dataclass(frozen=True)
class LayerCurve:
    """One kind of attention in every encoder layer, the first layer first; each value the mean over all tiles.

    Attributes:
        dispersion: mean distance between two of the most attended cells, in cells.
        attention_share: how much of all cells' attention the most attended ones have, 0 to 1. Near `top_share`, attention
            is spread evenly and says little about which cells matter.
    """

    dispersion: tuple[float, ...]
    attention_share: tuple[float, ...]


@dataclass(frozen=True)
class LayerAnalysis:
    """What `analyze_layers` found.

    Attributes:
        top_share: the share of a tile's valid cells that count as the most attended.
        num_images: how many images were looked at.
        num_tiles: how many tiles of them have two valid cells or more, and so a dispersion. All count alike.
        feature_layer: the encoder layer, 0-based, whose output is the visual feature; -1 for what enters the first.
        random_dispersion: what `dispersion` would be, in expectation, if cells were chosen at random.
        received: by what every cell receives from all tokens, which importance scores are made of.
        class_token: by what the class token attends to; None where the encoder has none.
    """

    top_share: float
    num_images: int
    num_tiles: int
    feature_layer: int
    random_dispersion: float
    received: LayerCurve
    class_token: LayerCurve | None


def analyze_layers(model: Any, processor: Any, images: Iterable[Any], top_share: float = 0.2) -> LayerAnalysis:
    """Measures dispersion in every layer of a model's vision encoder, over some images.

    Args:
        model: one of ours with a language modelling head, such as `HIVTPLlavaForConditionalGeneration`. Its pruning settings
            play no part.
        processor: of the same family; nor do its settings.
        images: as the processor takes them, looked at one by one.
        top_share: the share of each tile's valid cells that count as the most attended, above 0 and below 1.

    Raises:
        ValueError: for a share out of range, where there is no image, and where no tile has two valid cells.
    """
    top_share = checked_share(top_share)
    references: list[Tensor] = []
    measured: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image in images:
        # At a ratio of 1, as a token budget among the settings may be too small for an image.
        inputs = processor(images=image, text=processor.image_token, retention_ratio=1.0, return_tensors="pt").to(model.device)
        kinds = evidence_of_all_layers(model, inputs)
        for evidence, found in zip(kinds, measured, strict=True):
            if evidence is not None:
                found.append(_measured(evidence, top_share))
        references.append(mean_pairwise_distance(kinds.received.valid.cpu()))
    if not references:
        raise ValueError("`images` holds no image; give at least one.")

    reference = torch.cat(references)
    counted = reference.isfinite()
    if not counted.any():
        raise ValueError(
            f"none of the {len(reference)} tiles has two cells, so there is no distance to measure. Use a checkpoint whose "
            "vision tower has smaller patches."
        )
    curves = []
    for found in filter(None, measured):
        dispersion, share = torch.cat(found, dim=2)[:, :, counted].mean(2).tolist()
        curves.append(LayerCurve(tuple(dispersion), tuple(share)))
    return LayerAnalysis(
        top_share=top_share,
        num_images=len(references),
        num_tiles=int(counted.sum()),
        feature_layer=kinds.received.feature_layer,
        random_dispersion=float(reference[counted].mean()),
        received=curves[0],
        class_token=curves[1] if len(curves) > 1 else None,
    )


class EvidenceOfAllLayers(NamedTuple):
    """What `evidence_of_all_layers` returns: the same evidence twice, but for its scores.

    Attributes:
        received: scored by what every cell receives from all tokens.
        class_token: scored by what the class token attends to; None where the encoder has none.
    """

    received: VisualEvidence
    class_token: VisualEvidence | None


@torch.no_grad()
def evidence_of_all_layers(model: Any, inputs: Mapping[str, Any]) -> EvidenceOfAllLayers:
    """What pruning methods look at, with scores of every encoder layer, from one pass of the vision tower.

    Args:
        model: one of ours with a language modelling head. Its pruning settings play no part.
        inputs: what the processor returned for some images: `pixel_values`, and `image_sizes` for LLaVA-NeXT.

    Raises:
        ValueError: for inputs that do not fit each other.
    """
    base = model.model
    num_layers = base.config.vision_config.num_hidden_layers
    layouts = base._layouts(inputs["pixel_values"], **sizes_of(inputs), retention_ratio=1.0)
    both = BothAttentions(range(num_layers), range(num_layers) if base._has_cls_token else ())
    # Called like this, the tower runs every layer, also those behind the feature.
    features = base._received_attention_tap.call(stock_pass(base, inputs), both).pooler_output
    layer = feature_layer(base.config.vision_feature_layer, num_layers)
    received = gather_evidence(features, layouts, both.received.by_layer(), layer)
    if not base._has_cls_token:
        return EvidenceOfAllLayers(received, None)
    return EvidenceOfAllLayers(received, gather_evidence(features, layouts, both.from_class_token.by_layer(), layer))


def _measured(evidence: VisualEvidence, top_share: float) -> Tensor:
    """Dispersion and attention share in every layer and tile, float64 (2, layers, tiles) on the CPU."""
    scores = torch.stack([evidence.scores[layer] for layer in sorted(evidence.scores)]).cpu()
    layers, tiles = scores.shape[:2]
    # The tiles of all layers as those of one batch.
    flat, valid = scores.flatten(0, 1), evidence.valid.cpu().repeat(layers, 1, 1)
    chosen = most_attended_cells(flat, valid, top_share)
    both = torch.stack((mean_pairwise_distance(chosen), attention_share(flat, valid, chosen)))
    return both.view(2, layers, tiles)
