"""The model families. A new one is a file of this folder and its line in `FAMILIES`."""

import transformers

from .base import Family
from .llava import LlavaFamily
from .llava_next import LlavaNextFamily

FAMILIES: tuple[Family, ...] = (LlavaNextFamily(), LlavaFamily())


def register_auto_classes() -> None:
    """Lets transformers' Auto classes find the classes of every family."""
    for family in FAMILIES:
        config, base_model, model, processor = family.classes
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, base_model, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
        transformers.AutoModelForMultimodalLM.register(config, model, exist_ok=True)
