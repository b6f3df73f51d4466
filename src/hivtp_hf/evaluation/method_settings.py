"""Which settings every method runs under, and `--set METHOD.NAME=VALUE`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import METHODS
from ..pruning_config import VisualTokenPruningConfig
from .variants import RANDOM, SEEDS, UNPRUNED

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
# What the run itself varies.
_NOT_TO_BE_SET = {
    "method": "name methods with `--methods`",
    "retention_ratio": "give `--ratios`",
    "token_budget": "give `--ratios`",
}


def settings_of_methods(
    methods: Sequence[str], own: VisualTokenPruningConfig, changes: Sequence[str]
) -> dict[str, VisualTokenPruningConfig]:
    """The settings of every method of the registry but "none": the checkpoint's where it is its own method, else the defaults.

    Args:
        methods: that are compared.
        own: the checkpoint's settings.
        changes: "METHOD.NAME=VALUE", on top of these.

    Raises:
        ValueError: for a change that cannot be read, of a method that is not compared, and of what the run itself varies; and
            as `VisualTokenPruningConfig`.
    """
    settings = {
        name: own if own.method == name else VisualTokenPruningConfig(method=name)
        for name in methods
        if name in METHODS and name != UNPRUNED
    }
    for method, changed in _by_method(changes, settings).items():
        settings[method] = settings[method].replace(**changed)
    return settings


def _by_method(changes: Sequence[str], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    by_method: dict[str, dict[str, Any]] = {}
    for text in changes:
        place, equals, value = text.partition("=")
        method, dot, name = place.strip().partition(".")
        if not equals or not dot or not name:
            raise ValueError(f"`--set` is {text!r}; it must be METHOD.NAME=VALUE, such as hiprune.object_layer=5.")
        if method not in known:
            compared = ", ".join(known) or "no method"
            raise ValueError(
                f"`--set` is {text!r}, but {method!r} is no method with settings that is compared here; such are: {compared}. "
                "Leave it out, or name the method with `--methods`."
            )
        varied = dict(_NOT_TO_BE_SET, seed=f"leave it out: seeds {SEEDS} are pooled") if method == RANDOM else _NOT_TO_BE_SET
        if name in varied:
            raise ValueError(f"`--set` is {text!r}, but the run itself varies {name!r}; {varied[name]}.")
        by_method.setdefault(method, {})[name] = _value(text, value.strip())
    return by_method


def _value(text: str, value: str) -> Any:
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise ValueError(f"`--set` is {text!r}; a value must be a number, true, false or none.")
