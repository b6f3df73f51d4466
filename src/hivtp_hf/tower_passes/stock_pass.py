"""`stock_pass`: the pass of the vision tower that pruning is applied to."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..pruning.model import PrunedModelMixin


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
