"""Views of configurations, through which an attention module finds a function of ours as its attention implementation.

An attention module asks its configuration for the implementation. A view names ours, and in all else is the configuration
behind it. Our function then runs what that names, with a view of the module that shows it. So `set_attn_implementation` goes on
working, copies of a model have views of their own, and nothing is patched for others.
"""

from typing import Any

from torch import nn


class ConfigView:
    """A configuration, except that it names another attention implementation: that of the subclass.

    Attributes whose names begin with `_hivtp_` are the view's own: `_hivtp_config`, and what a subclass is given besides.
    """

    _attn_implementation: str

    def __init__(self, config: Any, **own: Any):
        # Written past __setattr__, which passes on to the real configuration.
        for name, value in {"config": config, **own}.items():
            object.__setattr__(self, f"_hivtp_{name}", value)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask a half-made object for dunder names and for ours; they must not end up in a recursion.
        if name.startswith(("__", "_hivtp_")):
            raise AttributeError(name)
        return getattr(self._hivtp_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._hivtp_config, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Serves copy.deepcopy too, which then copies the real configuration once for all that share it.
        own = {name.removeprefix("_hivtp_"): value for name, value in vars(self).items()}
        return _view_again, (type(self), own)


def _view_again(kind: type[ConfigView], own: dict[str, Any]) -> ConfigView:
    return kind(**own)


class ModuleView:
    """An attention module as the implementation behind ours must see it: with its real configuration."""

    def __init__(self, module: nn.Module, config: Any):
        self._hivtp_module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hivtp_module, name)
