"""The names in `--model_args` that are pruning settings, and what their values mean."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.variants import parsed_ratio
from ..pruning.registry import METHODS
from ..pruning.settings import SHARED_SETTINGS, VisualTokenPruningConfig

_OF_METHODS = sorted({setting.name for method in METHODS.values() for setting in method.settings})
SETTINGS = ("method", *SHARED_SETTINGS, *_OF_METHODS)


def with_arguments(own: VisualTokenPruningConfig, given: Mapping[str, Any], others: Sequence[str]) -> VisualTokenPruningConfig:
    """The settings of a checkpoint, with those that were given in their place.

    Args:
        own: the checkpoint's.
        given: by name, as lmms-eval has parsed them; a share may be a fraction such as "2/9", and "none" means None.
        others: arguments of the model that are no settings, for the message.

    Raises:
        ValueError: for a name that no method has, and as `VisualTokenPruningConfig`.
    """
    for name in given:
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, [*others, *SETTINGS], n=1)
            advice = f"Did you mean `{close[0]}`? " if close else ""
            raise ValueError(
                f"`{name}` is no argument. {advice}Arguments are {', '.join(others)}, and the pruning settings "
                f"{', '.join(SETTINGS)}."
            )
    return own.replace(**{name: _value(name, value) for name, value in given.items()})


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name == "method" or (name in SHARED_SETTINGS and SHARED_SETTINGS[name].kind is str):
        return value
    if value.strip().lower() == "none":
        return None
    try:
        return float(parsed_ratio(value))
    except ValueError:
        return value  # its setting says what is allowed
