"""`choice_of_image`: what a model keeps of one image, and the scores that chose it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.layout import TokenLayout
from ..pruning.registry import pruning_method


class ImageChoice(NamedTuple):
    """What a method keeps of one image, and why.

    Attributes:
        kept_indices: int64 (n,), ascending positions in the packed sequence, newlines included.
        scores: float32 (cells,), the scores by which the method ranks cells, view by view, on the CPU; NaN
            where a method scores no cell. None for a method that looks at nothing.
    """

    kept_indices: Tensor
    scores: Tensor | None


@torch.no_grad()
def choice_of_image(model: Any, inputs: Mapping[str, Any], layout: TokenLayout) -> ImageChoice:
    """What a model keeps of one image, and the scores by which it chooses, from one pass of its vision tower.

    Args:
        model: a pruned model with a language modelling head, such as `HIVTPLlavaNextForConditionalGeneration`.
        inputs: what the processor returned for the image.
        layout: of the image, `processor.token_layout(image.height, image.width)`. Its settings rule, not the model's.

    Raises:
        ValueError: for inputs of several images, and for settings or a layout that do not fit the model.
    """
    look = model.look(inputs, [layout.pruning])
    if len(look.features) != 1:
        raise ValueError(f"`inputs` holds {len(look.features)} images; give one at a time.")
    _, (kept_indices,) = look.kept(layout.pruning, [layout])
    # What a method draws without looking says nothing of an image.
    looks = bool(pruning_method(layout.pruning.method).reads(layout.pruning)[0])
    importance = look.importance(layout.pruning, [layout]) if looks else None
    return ImageChoice(kept_indices, None if importance is None else importance.float().cpu())
