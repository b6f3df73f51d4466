"""`VisualTokenPruningConfig`: which visual tokens to keep, as validated numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from .methods import checked_number, pruning_method, shown


def _checked_flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"`{field}` is {shown(value)}; it must be True or False.")
    return value


class VisualTokenPruningConfig:
    """Settings of visual token pruning: a method, what all methods share, and the method's own hyperparameters.

    Instances are immutable and hashable; `replace` makes a changed copy.

    Args:
        method (`str`, defaults to `"hivtp"`):
            The pruning method.
        retention_ratio (`float`, *optional*):
            The share of an image's patch tokens to keep, above 0 and at most 1. It counts patch tokens tile by tile;
            newline tokens come on top. When given, it rules over `global_ratio` and `local_window`. 1 keeps everything.
        exact_count (`bool`, defaults to `True`):
            Whether the number of kept tokens depends on the image's size and these settings alone, which processors
            and serving engines rely on. False gives the published selection, whose number depends on the content.
        keep_newlines (`bool`, defaults to `True`):
            Whether the newline token after each row of the crops is kept; False drops them all, at every ratio.
        global_ratio (`float`, defaults to 0.25):
            hivtp, global stage: the share of a region's cells that is kept, from 0 to 1.
        local_window (`int`, defaults to 2):
            hivtp, local stage: side of the windows, in cells, of which each keeps its best remaining cell; from 1.
        regions (`int`, defaults to 2):
            hivtp, global stage: regions per side of a tile, so 2 means four quadrants; from 1.
        importance_start_layer (`int`, defaults to 6):
            hivtp: first encoder layer whose attention counts, from 0.
        importance_num_layers (`int`, defaults to 3):
            hivtp: number of layers, from that one on, that are averaged; from 1.

    Raises:
        ValueError: names the field, the value given and what is allowed. A hyperparameter that the method does not have
            is an error too.

    Source: HIVTP, arXiv 2509.23663, section 3; `retention_ratio` and `exact_count` are ours.
    """

    method: str
    retention_ratio: float | None
    exact_count: bool
    keep_newlines: bool

    def __init__(
        self,
        /,  # so that a stored setting may even be called "self", and is refused like any other
        method: str = "hivtp",
        retention_ratio: float | None = None,
        exact_count: bool = True,
        keep_newlines: bool = True,
        **hyperparameters: Any,
    ):
        entry = pruning_method(method)
        if _checked_flag("exact_count", exact_count) is False and not entry.content_dependent_count:
            raise ValueError(
                f"`exact_count` is False; the method {entry.name!r} keeps a number that the image's size determines, so it "
                "must be True."
            )
        if retention_ratio is not None:
            retention_ratio = checked_number("retention_ratio", retention_ratio, float, 0, 1, above_minimum=True)
        settings: dict[str, Any] = {
            "method": entry.name,
            "retention_ratio": retention_ratio,
            "exact_count": exact_count,
            "keep_newlines": _checked_flag("keep_newlines", keep_newlines),
        }
        for hyperparameter in entry.hyperparameters:
            given = hyperparameters.pop(hyperparameter.name, hyperparameter.default)
            settings[hyperparameter.name] = hyperparameter.checked(given)
        if hyperparameters:
            known = ", ".join(f"`{name}`" for name in settings)
            unknown = ", ".join(f"`{name}`" for name in sorted(map(str, hyperparameters)))
            raise ValueError(f"{unknown}: not a setting of the method {entry.name!r}, which has {known}. Remove it.")
        # Written past our own __setattr__, which refuses: settings that were checked once stay as they are.
        self.__dict__.update(settings)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "VisualTokenPruningConfig":
        """The config that `to_dict` wrote; missing keys take their defaults. ValueError for anything but a mapping."""
        if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
            raise ValueError(
                f"`pruning_config` is {shown(settings)}; it must be a dict of settings such as "
                "{'method': 'hivtp', 'retention_ratio': 0.5}, or a VisualTokenPruningConfig."
            )
        return cls(**settings)

    @classmethod
    def coerce(cls, settings: Any) -> "VisualTokenPruningConfig":
        """What a user may write for `pruning_config`, as an instance.

        None means the defaults. An object of another copy of this code (the installed package beside remote code) is no
        instance of `cls`, so whatever has `to_dict` is accepted.
        """
        if isinstance(settings, cls):
            return settings
        if settings is None:
            return cls()
        to_dict = None if isinstance(settings, type) else getattr(settings, "to_dict", None)
        return cls.from_dict(to_dict() if callable(to_dict) else settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings, shared ones first, as plain JSON types; `from_dict` takes them back without loss."""
        return dict(self.__dict__)

    def replace(self, /, **changes: Any) -> "VisualTokenPruningConfig":
        """A copy with some settings changed, validated as a whole."""
        return type(self)(**{**self.to_dict(), **changes})

    @property
    def scored_layers(self) -> Sequence[int]:
        """The encoder layers, 0-based and ascending, whose attention this config reads."""
        return pruning_method(self.method).scored_layers(self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"a VisualTokenPruningConfig does not change; use `pruning.replace({name}={value!r})` and assign the result."
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a VisualTokenPruningConfig does not change.")

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no setting of the method; tells type checkers that hyperparameters exist.
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisualTokenPruningConfig) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.__dict__.items())})"
