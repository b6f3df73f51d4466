"""Pruning as methods are published: an eager tower that returns all of its attention maps, and the same selection after it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hivtp_hf import Evidence, HIVTPLlavaNextConfig, VisualTokenPruningConfig
from hivtp_hf.pruning.evidence import EncoderFacts
from hivtp_hf.pruning.features import choose, cut, gather_evidence
from hivtp_hf.pruning.registry import pruning_method

from .images import Images, token_layout

_FAMILY = HIVTPLlavaNextConfig.family


def published_features(model: Any, images: Images, method: str, ratio: float) -> tuple[list[Tensor], list[Tensor]]:
    """What is kept of every image.

    Args:
        model: a stock LLaVA-NeXT whose tower runs eager attention.
        images: of the batch.
        method: one that reads attention.
        ratio: the share of patch tokens to keep.

    Returns:
        The projected features (num_retained, hidden) and their indices in the stock sequence, a list each.

    Raises:
        ValueError: for a method that reads no attention.
    """
    pruning = VisualTokenPruningConfig(method=method, retention_ratio=ratio)
    encoder = _FAMILY.encoder_facts(model.config, {})
    layers = pruning.scored_layers(encoder)
    if not layers:
        raise ValueError(f"the method {method!r} reads no attention, so it has no published way by attention maps.")
    output = model.model.get_image_features(
        images.pixel_values,
        images.image_sizes,
        output_attentions=True,
        return_dict=True,
    )
    from_class_token = Evidence.CLASS_ATTENTION in pruning_method(method).reads(pruning)[0]
    scores = scores_from_maps(output.attentions, layers, from_class_token)
    layouts = [token_layout(model.config, (images.height, images.width), method, ratio)] * images.batch
    return select_from_scores(output.pooler_output, layouts, scores, encoder)


def scores_from_maps(maps: Sequence[Tensor], layers: Sequence[int], from_class_token: bool) -> dict[int, Tensor]:
    """Of every wanted layer what each token receives: float32 (tiles, tokens), from maps (tiles, heads, tokens, tokens)."""
    scores = {}
    for layer in layers:
        rows = maps[layer][:, :, :1] if from_class_token else maps[layer]
        scores[layer] = rows.float().mean(dim=(1, 2))
    return scores


def select_from_scores(
    features: Sequence[Tensor], layouts: Sequence[Any], scores: Mapping[int, Tensor], encoder: EncoderFacts
) -> tuple[list[Tensor], list[Tensor]]:
    """hivtp_hf's own selection of packed features by these scores."""
    of_cells = {layer: _FAMILY.cell_scores(None, [found], layouts) for layer, found in scores.items()}
    kinds = pruning_method(layouts[0].pruning.method).reads(layouts[0].pruning)[0]
    of_kinds = ({}, of_cells) if Evidence.CLASS_ATTENTION in kinds else (of_cells, {})
    kept = choose(gather_evidence(features, layouts, *of_kinds, encoder))
    return cut(features, kept, layouts), kept
