"""Visual token pruning for vision-language models, as ordinary transformers classes.

Importing this package registers its classes with transformers' Auto classes.
"""

import transformers

from ._version import __version__
from .configuration_hivtp_llava_next import HIVTPLlavaNextConfig
from .modeling_hivtp_llava_next import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextModel
from .processing_hivtp_llava_next import HIVTPLlavaNextProcessor
from .pruning_config import VisualTokenPruningConfig
from .selectors_hivtp import select_hivtp
from .token_layout import TokenLayout

__all__ = [
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "TokenLayout",
    "VisualTokenPruningConfig",
    "__version__",
    "select_hivtp",
]


def _register_auto_classes() -> None:
    transformers.AutoConfig.register(HIVTPLlavaNextConfig.model_type, HIVTPLlavaNextConfig, exist_ok=True)
    transformers.AutoModel.register(HIVTPLlavaNextConfig, HIVTPLlavaNextModel, exist_ok=True)
    transformers.AutoProcessor.register(HIVTPLlavaNextConfig, HIVTPLlavaNextProcessor, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto_class = getattr(transformers, name, None)  # the second is newer than our oldest release
        if auto_class is not None:
            auto_class.register(HIVTPLlavaNextConfig, HIVTPLlavaNextForConditionalGeneration, exist_ok=True)


_register_auto_classes()
