"""The pruning methods. A new one is a file of this folder and its line in `METHOD_CLASSES`."""

from ..pruning.registry import register_method
from ..pruning.settings import describe_settings
from .base import PruningMethod
from .cls_attention import ClassAttention
from .divprune import DivPrune
from .dpp import DPP
from .gprune import GPrune
from .hiprune import HiPrune
from .hivtp import HIVTP
from .id_selection import IDSelection
from .keep_everything import KeepEverything
from .mmr import MMR
from .mmtok import MMTok
from .random import Random
from .scope import Scope
from .spread import Spread
from .uniform import Uniform
from .vflowopt import VFlowOpt
from .visionzip import VisionZip

# In this order they are listed everywhere.
METHOD_CLASSES: tuple[type[PruningMethod], ...] = (
    HIVTP,
    HiPrune,
    GPrune,
    VFlowOpt,
    ClassAttention,
    VisionZip,
    DivPrune,
    Scope,
    DPP,
    MMTok,
    IDSelection,
    MMR,
    Spread,
    Random,
    Uniform,
    KeepEverything,
)


def register_methods() -> None:
    """Makes all of them known to settings, models and processors, which find them by name."""
    for method in METHOD_CLASSES:
        register_method(method)
    describe_settings()
