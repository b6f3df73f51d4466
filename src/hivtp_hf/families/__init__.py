"""The model families. A new one is a file of this folder and its line in `FAMILIES`."""

from typing import Any

import transformers

from ..pruning.checked_values import shown
from .base import Family
from .llava import LlavaFamily
from .llava_next import LlavaNextFamily
from .llava_onevision import LlavaOnevisionFamily
from .qwen2_5_vl import Qwen2_5_VLFamily
from .qwen2_vl import Qwen2VLFamily
from .qwen3_vl import Qwen3VLFamily

FAMILIES: tuple[Family, ...] = (
    LlavaNextFamily(),
    LlavaFamily(),
    Qwen2_5_VLFamily(),
    Qwen3VLFamily(),
    Qwen2VLFamily(),
    LlavaOnevisionFamily(),
)


def register_auto_classes() -> None:
    """Lets transformers' Auto classes find the classes of every family."""
    for family in FAMILIES:
        config, base_model, model, processor = family.classes
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, base_model, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
        transformers.AutoModelForMultimodalLM.register(config, model, exist_ok=True)


def family_of_model_type(model_type: Any, checkpoint: str) -> Family:
    """The family of a checkpoint's model type, stock's or ours; a ValueError that names the known ones otherwise.

    Args:
        model_type: as config.json says it.
        checkpoint: how to call the checkpoint in the message.
    """
    types = {kind.model_type: family for family in FAMILIES for kind in (family.stock_classes.config, family.classes.config)}
    if not isinstance(model_type, str) or model_type not in types:
        raise ValueError(
            f"{checkpoint} has the model type {shown(model_type)}; known are {', '.join(map(repr, types))}. Give a checkpoint "
            "of one of these."
        )
    return types[model_type]
