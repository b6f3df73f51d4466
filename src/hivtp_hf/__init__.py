"""Visual token pruning for vision-language models, as ordinary transformers classes.

Importing this package registers its classes with transformers' Auto classes.
"""

import importlib
from typing import Any, NamedTuple

import transformers

from ._version import __version__
from .checked_values import shown
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


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"select_{name}" for name, method in METHODS.items() if not method.keeps_everything)})


class Family(NamedTuple):
    """One family's classes: configuration, base model, model with a language modelling head, processor."""

    config: Any
    base_model: Any
    model: Any
    processor: Any


FAMILIES = (
    Family(HIVTPLlavaNextConfig, HIVTPLlavaNextModel, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor),
    Family(HIVTPLlavaConfig, HIVTPLlavaModel, HIVTPLlavaForConditionalGeneration, HIVTPLlavaProcessor),
)


def family_of_model_type(model_type: Any, checkpoint: str) -> Family:
    """The family of a checkpoint's model type, stock's or ours; a ValueError that names the known ones otherwise.

    Args:
        model_type: as config.json says it.
        checkpoint: how to call the checkpoint in the message.
    """
    for family in FAMILIES:
        if model_type in (family.config.model_type, family.config.stock_model_type):
            return family
    known = ", ".join(repr(kind) for family in FAMILIES for kind in (family.config.stock_model_type, family.config.model_type))
    raise ValueError(
        f"{checkpoint} has the model type {shown(model_type)}; known are {known}. Give a checkpoint of one of these."
    )


def _register_auto_classes() -> None:
    for config, base_model, model, processor in FAMILIES:
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, base_model, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
        transformers.AutoModelForMultimodalLM.register(config, model, exist_ok=True)


_register_auto_classes()
