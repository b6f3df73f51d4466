"""`choice_of_image`: what a model keeps of one image, and the scores that chose it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.evidence import Evidence
from ..pruning.features import gather_evidence, prune_features
from ..pruning.layout import TokenLayout
from ..pruning.registry import pruning_method
from ..tower_passes import stock_pass


class ImageChoice(NamedTuple):
    """What a method keeps of one image, and why.

    Attributes:
        kept_indices: int64 (n,), ascending positions in the packed sequence, newlines included.
        scores: float32 (tiles, grid, grid), the scores by which the method ranks cells, base tile first, on the CPU; NaN
            where a method scores no cell. None for a method that looks at nothing.
    """

    kept_indices: Tensor
    scores: Tensor | None


@torch.no_grad()
def choice_of_image(model: Any, inputs: Mapping[str, Any], layout: TokenLayout) -> ImageChoice:
    """What a model keeps of one image, and the scores by which it chooses, from one pass of its vision tower.

    Args:
        model: a pruned model with a language modelling head, such as `HIVTPLlavaNextForConditionalGeneration`.
        inputs: what the processor returned for the image: `pixel_values`, and `image_sizes` for LLaVA-NeXT.
        layout: of the image, `processor.token_layout(image.height, image.width)`. Its settings rule, not the model's.

    Raises:
        ValueError: for inputs of several images, and for settings or a layout that do not fit the model.
    """
    base, pruning = model.model, layout.pruning
    if len(inputs["pixel_values"]) != 1:
        raise ValueError(f"`inputs` holds {len(inputs['pixel_values'])} images; give one at a time.")
    layer, kinds = base._feature_layer_and_evidence(pruning, {})
    from_class_token = Evidence.CLASS_ATTENTION in kinds
    output, collector = base._scored_pass(stock_pass(base, inputs), pruning.scored_layers(layer), from_class_token)
    scores = {scored: base.family.cell_scores(found, [layout]) for scored, found in collector.by_layer().items()}
    evidence = gather_evidence(output.pooler_output, [layout], scores, layer)
    _, (kept_indices,) = prune_features(evidence)
    importance = pruning_method(pruning.method).importance(evidence, pruning)
    return ImageChoice(kept_indices, None if importance is None else importance.float().cpu())
