"""Visual token pruning for vision-language models, as ordinary transformers classes.

Importing this package registers its classes with transformers' Auto classes.
"""

import importlib
import sys
from typing import Any

from ._version import __version__
from .families import register_auto_classes
from .families.llava import (
    HIVTPLlavaConfig,
    HIVTPLlavaForConditionalGeneration,
    HIVTPLlavaModel,
    HIVTPLlavaProcessor,
)
from .families.llava_next import (
    HIVTPLlavaNextConfig,
    HIVTPLlavaNextForConditionalGeneration,
    HIVTPLlavaNextModel,
    HIVTPLlavaNextProcessor,
)
from .families.llava_onevision import (
    HIVTPLlavaOnevisionConfig,
    HIVTPLlavaOnevisionForConditionalGeneration,
    HIVTPLlavaOnevisionModel,
    HIVTPLlavaOnevisionProcessor,
)
from .families.qwen2_5_vl import (
    HIVTPQwen2_5_VLConfig,
    HIVTPQwen2_5_VLForConditionalGeneration,
    HIVTPQwen2_5_VLModel,
    HIVTPQwen2_5_VLProcessor,
)
from .families.qwen2_vl import (
    HIVTPQwen2VLConfig,
    HIVTPQwen2VLForConditionalGeneration,
    HIVTPQwen2VLModel,
    HIVTPQwen2VLProcessor,
)
from .families.qwen3_vl import (
    HIVTPQwen3VLConfig,
    HIVTPQwen3VLForConditionalGeneration,
    HIVTPQwen3VLModel,
    HIVTPQwen3VLProcessor,
)
from .methods.base import PruningMethod
from .pruning.evidence import EncoderFacts, Evidence, ViewEvidence, VisualEvidence
from .pruning.layout import StitchedViews, TokenLayout
from .pruning.registry import METHODS, register_method
from .pruning.settings import Setting, VisualTokenPruningConfig

__all__ = [
    "EncoderFacts",
    "Evidence",
    "HIVTPLlavaConfig",
    "HIVTPLlavaForConditionalGeneration",
    "HIVTPLlavaModel",
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "HIVTPLlavaOnevisionConfig",
    "HIVTPLlavaOnevisionForConditionalGeneration",
    "HIVTPLlavaOnevisionModel",
    "HIVTPLlavaOnevisionProcessor",
    "HIVTPLlavaProcessor",
    "HIVTPQwen2VLConfig",
    "HIVTPQwen2VLForConditionalGeneration",
    "HIVTPQwen2VLModel",
    "HIVTPQwen2VLProcessor",
    "HIVTPQwen2_5_VLConfig",
    "HIVTPQwen2_5_VLForConditionalGeneration",
    "HIVTPQwen2_5_VLModel",
    "HIVTPQwen2_5_VLProcessor",
    "HIVTPQwen3VLConfig",
    "HIVTPQwen3VLForConditionalGeneration",
    "HIVTPQwen3VLModel",
    "HIVTPQwen3VLProcessor",
    "PruningMethod",
    "Setting",
    "StitchedViews",
    "TokenLayout",
    "ViewEvidence",
    "VisualEvidence",
    "VisualTokenPruningConfig",
    "__version__",
    "register_method",
    "select_hivtp",
    "tune",
]


def __getattr__(name: str) -> Any:
    """`select_hivtp` and the other methods' selections, `select_<method>`, from the files of their methods; and `tune`."""
    if name == "tune":  # imported when it is asked for, as it needs Pillow
        return importlib.import_module(".tuning", __name__).tune
    method = METHODS.get(name.removeprefix("select_")) if name.startswith("select_") else None
    selection = None if method is None else getattr(sys.modules[type(method).__module__], name, None)
    if selection is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return selection


def __dir__() -> list[str]:
    return sorted({*globals(), "tune", *(f"select_{name}" for name, method in METHODS.items() if not method.keeps_everything)})


register_auto_classes()
