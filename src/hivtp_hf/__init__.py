"""Visual token pruning for vision-language models, as ordinary transformers classes.

Importing this package registers its classes with transformers' Auto classes.
"""

import sys
from typing import Any

from ._version import __version__
from .families import FAMILIES, register_auto_classes
from .families.base import Family
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
from .methods.base import PruningMethod
from .pruning.checked_values import shown
from .pruning.evidence import Evidence, VisualEvidence
from .pruning.layout import TokenLayout
from .pruning.registry import METHODS, register_method
from .pruning.settings import Setting, VisualTokenPruningConfig

__all__ = [
    "Evidence",
    "HIVTPLlavaConfig",
    "HIVTPLlavaForConditionalGeneration",
    "HIVTPLlavaModel",
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "HIVTPLlavaProcessor",
    "PruningMethod",
    "Setting",
    "TokenLayout",
    "VisualEvidence",
    "VisualTokenPruningConfig",
    "__version__",
    "register_method",
    "select_hivtp",
]


def __getattr__(name: str) -> Any:
    """`select_hivtp` and the other methods' selections, `select_<method>`, from the files of their methods."""
    method = METHODS.get(name.removeprefix("select_")) if name.startswith("select_") else None
    selection = None if method is None else getattr(sys.modules[type(method).__module__], name, None)
    if selection is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return selection


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"select_{name}" for name, method in METHODS.items() if not method.keeps_everything)})


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


register_auto_classes()
