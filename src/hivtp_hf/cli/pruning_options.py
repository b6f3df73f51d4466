"""Options for every pruning setting, made of the registry: a new method brings its own."""

import inspect
from collections.abc import Callable
from typing import Any

import typer

from ..pruning.registry import METHODS
from ..pruning.settings import SHARED_SETTINGS

_BUDGET = "How much to keep"


def with_pruning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a command that takes `pruning`, a dict of the settings that were given: each becomes an option of its own."""
    options = {"method": _option("method", str, f"How tokens are chosen: {', '.join(METHODS)}.", _BUDGET)}
    panels = {_BUDGET: SHARED_SETTINGS.values()} | {f"Settings of {name}": method.settings for name, method in METHODS.items()}
    for panel, settings in panels.items():
        for setting in settings:
            default = "" if setting.default in (None, ()) else f" Default: {setting.default}."
            meaning = f"{setting.meaning[0].upper()}{setting.meaning[1:]}.{default}"
            kind = str if setting.kind in (tuple, list) else setting.kind
            options[setting.name] = _option(setting.name, kind, meaning, panel)

    def run(**arguments: Any) -> Any:
        pruning = {name: value for name in options if (value := arguments.pop(name)) is not None}
        return command(**arguments, pruning=pruning)

    own = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "pruning"]
    parameters = [*own, *options.values()]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, kind: type, meaning: str, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    declaration = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
    default = typer.Option(None, declaration, help=meaning, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind | None)
