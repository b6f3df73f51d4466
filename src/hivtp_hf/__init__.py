"""Visual token pruning for vision-language models, as ordinary transformers classes.

Importing this package registers its classes with transformers' Auto classes.
"""

import importlib
from typing import Any

import transformers

from ._version import __version__
from .configuration_hivtp_llava import HIVTPLlavaConfig
from .configuration_hivtp_llava_next import HIVTPLlavaNextConfig
from .methods import METHODS
from .modeling_hivtp_llava import HIVTPLlavaForConditionalGeneration, HIVTPLlavaModel
from .modeling_hivtp_llava_next import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextModel
from .processing_hivtp_llava import HIVTPLlavaProcessor
from .processing_hivtp_llava_next import HIVTPLlavaNextProcessor
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout

__all__ = [
    "HIVTPLlavaConfig",
    "HIVTPLlavaForConditionalGeneration",
    "HIVTPLlavaModel",
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "HIVTPLlavaProcessor",
    "TokenLayout",
    "VisualTokenPruningConfig",
    "__version__",
    "select_hivtp",
]


def __getattr__(name: str) -> Any:
    """`select_hivtp` and the other methods' selections, `select_<method>`: imported when they are asked for."""
    method = name.removeprefix("select_")
    if name != method and method in METHODS:
        module = f"{__name__}.selectors_{method}"
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != module:  # the method "none" has no such file
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Of each family: configuration, base model, model with a language modelling head, processor.
FAMILIES = (
    (HIVTPLlavaNextConfig, HIVTPLlavaNextModel, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor),
    (HIVTPLlavaConfig, HIVTPLlavaModel, HIVTPLlavaForConditionalGeneration, HIVTPLlavaProcessor),
)


def _register_auto_classes() -> None:
    for config, base_model, model, processor in FAMILIES:
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, base_model, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            auto_class = getattr(transformers, name, None)  # the second is newer than our oldest release
            if auto_class is not None:
                auto_class.register(config, model, exist_ok=True)


_register_auto_classes()
