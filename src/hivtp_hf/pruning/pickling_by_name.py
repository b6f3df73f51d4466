"""How a configuration that came from a checkpoint's own code is pickled: by the name of its class and where that lies.

Serving engines send configurations to processes of their own by a pickler that takes classes of remote code along by value, and
everything with them that they reach. Ours reach operators and context variables, which no pickler takes. Transformers, which
those processes have anyway, finds the class again.
"""

import copy
import functools
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module

# The package in which transformers puts modules of checkpoints.
_REMOTE = "transformers_modules"


class _ClassOfCheckpoint:
    """Pickled, it stands for a class in a checkpoint's own code: unpickled, it is that class."""

    def __init__(self, of: type, checkpoint: str, revision: str | None):
        self._find = functools.partial(
            get_class_from_dynamic_module, f"{of.__module__.rpartition('.')[2]}.{of.__name__}", checkpoint, revision=revision
        )

    def __reduce__(self) -> Any:
        return self._find, ()


class PickledByNameMixin:
    """A configuration that is pickled without its class where that came from a checkpoint. Comes before the stock class."""

    pruning_config: Any
    base_model: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        checkpoint = getattr(self, "name_or_path", None)
        if not checkpoint or type(self).__module__.partition(".")[0] != _REMOTE:
            return super().__reduce_ex__(protocol)
        revision = getattr(self, "_commit_hash", None)
        # Settings as plain values, as their classes came from the checkpoint too.
        state = {
            **self.__dict__,
            "pruning_config": self.pruning_config.to_dict(),
            "base_model": None if self.base_model is None else self.base_model.to_dict(),
        }
        return object.__new__, (_ClassOfCheckpoint(type(self), checkpoint, revision),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("pruning_config", "base_model"):
            setattr(self, name, state[name])  # which makes settings of plain values

    # Copies stay in their process, and need no checkpoint.
    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
