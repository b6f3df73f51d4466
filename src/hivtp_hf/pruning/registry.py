"""The methods that settings may name.

Methods stand above this folder and register themselves, so that settings, layouts and models find them by name alone. What a
method must provide is in methods/base.py.
"""

import inspect
from typing import Any

from .checked_values import shown

METHODS: dict[str, Any] = {}


def register_method(method: type) -> type:
    """Makes a method known by its name, in this process; usable as a class decorator.

    A method of another package works with every command and class here once that package has registered it. It cannot travel
    with a checkpoint as remote code, so whoever loads the checkpoint needs that package as well.

    Args:
        method: a subclass of `PruningMethod` with all that it must provide.

    Returns:
        The class itself.

    Raises:
        ValueError: for what is no complete `PruningMethod`, and for a name that another method has.
    """
    missing = sorted(getattr(method, "__abstractmethods__", ()))
    if not inspect.isclass(method) or missing or not hasattr(method, "select"):
        lacks = f", which lacks {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"{method!r} is no complete method{lacks}. Register a subclass of `PruningMethod` that defines them all."
        )
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name` of {method.__name__} is {shown(name)}; it must be a name such as 'hivtp'.")
    registered = type(METHODS[name]) if name in METHODS else method
    if (registered.__module__, registered.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(
            f"the method {name!r} is registered already, by {registered.__module__}.{registered.__qualname__}. "
            f"Give {method.__name__} another `name`."
        )
    METHODS[name] = method()
    return method


def pruning_method(name: Any) -> Any:
    """The method called `name`; a ValueError lists the known names."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(f"`method` is {shown(name)}; it must be one of {', '.join(map(repr, METHODS))}.")
    return method
