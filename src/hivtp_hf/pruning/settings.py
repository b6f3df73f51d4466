"""`VisualTokenPruningConfig`: which visual tokens to keep, as validated settings."""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checked_values import checked_choice, checked_flag, checked_layers, checked_number, shown
from .registry import METHODS, pruning_method
from .stages import checked_stages


@dataclass(frozen=True)
class Setting:
    """One setting: its name, type, default, range and meaning.

    The type is `int`, `float`, `bool`, `str`, `tuple` for layers, or `list` for stages.

    Attributes:
        choices: what a `str` may be; a setting of another type has none.
        meaning: for a reader, in a line or two; docstrings, command line, model cards and docs show it.
        minimum, maximum: the range, both ends included; None for no upper end.
        above_minimum: whether `minimum` itself is outside the range.
        is_layer: whether it counts encoder layers, so that it can be named where an encoder is not deep enough.
        search: where tuning looks, both ends included: a range of its own, of layers in a list how many stand side by side; a
            function that returns one for a retention ratio; an empty tuple where tuning leaves it alone. None for all that is
            allowed, which of layers is the encoder's depth.
    """

    name: str
    kind: type
    default: Any
    minimum: float = 0
    maximum: float | None = None
    above_minimum: bool = False
    is_layer: bool = False
    meaning: str = ""
    choices: tuple[str, ...] = ()
    search: Callable[[float], tuple[float, ...]] | tuple[float, ...] | None = None

    def checked(self, value: Any) -> Any:
        """`value` as a plain `kind` inside the range, or None where that is the default; ValueError otherwise."""
        if value is None and self.default is None:
            return None
        if self.kind is bool:
            return checked_flag(self.name, value)
        if self.kind is str:
            return checked_choice(self.name, value, self.choices)
        if self.kind is tuple:
            return checked_layers(self.name, value)
        if self.kind is list:
            return checked_stages(self.name, value)
        return checked_number(self.name, value, self.kind, self.minimum, self.maximum, self.above_minimum)

    def search_range(self, ratio: float) -> tuple[float, ...] | None:
        """Where tuning looks at a retention ratio; empty where it leaves the setting alone, None where that is not bounded."""
        if self.search is not None:
            return self.search(ratio) if callable(self.search) else self.search
        return None if self.maximum is None else (self.minimum, self.maximum)

    @property
    def kind_name(self) -> str:
        """What the type is called in texts."""
        if self.kind is list:
            return "stages"
        return "layers" if self.kind is tuple else self.kind.__name__

    @property
    def range(self) -> str:
        """What is allowed, in words; empty where the type says it all."""
        if self.kind is bool:
            return ""
        if self.kind is str:
            return f"one of {', '.join(self.choices)}"
        if self.kind is tuple:
            return "such as [7, 15] or 7+15"
        if self.kind is list:
            return "such as [[8, 0.5], [16, 0.5]] or 8:0.5+16:0.5"
        upper = "" if self.maximum is None else f" to {self.maximum}"
        return f"{'above' if self.above_minimum else 'from'} {self.minimum}{upper}"

    def __str__(self) -> str:
        allowed = f", {self.range}" if self.range else ""
        return f"{self.name} ({self.kind_name}, {self.default}{allowed}): {self.meaning}."


_RETENTION_RATIO = Setting(
    "retention_ratio",
    float,
    None,
    maximum=1,
    above_minimum=True,
    meaning=(
        "share of an image's patch tokens to keep; newline tokens come on top, and 1 keeps everything. For vflowopt what is "
        "left of all tokens, newlines included, on average over the layers of the language model"
    ),
)
_TOKEN_BUDGET = Setting(
    "token_budget",
    int,
    None,
    minimum=1,
    meaning="instead of a ratio, at most this many language-model tokens per image, newlines included",
)
_EXACT_COUNT = Setting(
    "exact_count",
    bool,
    True,
    meaning=(
        "whether the number of kept tokens depends on the image's size and the settings alone, as processors and serving "
        "engines need; False, for hivtp and vflowopt only, gives the published selection, whose number depends on the content"
    ),
)
_KEEP_NEWLINES = Setting(
    "keep_newlines",
    bool,
    True,
    meaning="whether the newline token after each row of the crops is kept; False drops them all, at every ratio",
)
_TOKEN_WEIGHTS = Setting(
    "token_weights",
    str,
    "none",
    choices=("none", "cluster_size", "inclusion"),
    meaning=(
        "how much a kept token weighs in the language model's attention: as published, like any other; as many cells as it "
        "stands for, which are itself and the dropped ones that resemble it most; or 1 / its chance to be kept, for methods "
        "that know it"
    ),
)
_WEIGHT_STRENGTH = Setting(
    "weight_strength", float, 1.0, maximum=1, meaning="the power to which a weight is taken; 0 leaves all tokens alike"
)
_POSITIONS = Setting(
    "positions",
    str,
    "packed",
    choices=("packed", "original"),
    meaning="where kept tokens stand: one behind the other, as published, or where they stand in the unpruned sequence",
)
_STAGES = Setting(
    "stages",
    list,
    (),
    meaning=(
        "where visual tokens are dropped inside the language model: pairs of a decoder layer, as an index from 1 or a fraction "
        "of the depth, and the share of an image's patch tokens left that goes on from there, the best ranked ones; for "
        "methods that rank"
    ),
)
_VIDEO_SCOPE = Setting(
    "video_scope",
    str,
    "frame",
    choices=("frame", "video"),
    meaning=(
        "among which cells of a video tokens are chosen: those of each frame by itself, or those of all frames together, as if "
        "these stood one below the other; for families that prune videos"
    ),
)
# By name. These mean nothing else in a configuration; a method's own may (`temperature`, for one).
SHARED_SETTINGS = {
    setting.name: setting
    for setting in (
        *(_RETENTION_RATIO, _TOKEN_BUDGET, _EXACT_COUNT, _KEEP_NEWLINES),
        *(_TOKEN_WEIGHTS, _WEIGHT_STRENGTH, _POSITIONS, _STAGES, _VIDEO_SCOPE),
    )
}


def check_one_budget(retention_ratio: Any, token_budget: Any) -> None:
    """A ValueError if both are given: each says how much to keep, and they would say different things."""
    if retention_ratio is not None and token_budget is not None:
        raise ValueError(
            f"`retention_ratio` is {shown(retention_ratio)} and `token_budget` {shown(token_budget)}; give one of them. The "
            "first is a share of the patch tokens, the second a number of language-model tokens per image."
        )


def _check_weights_and_positions(method: Any, settings: Mapping[str, Any]) -> None:
    """A ValueError where a method cannot say how much a kept token weighs, or where it stands."""
    if settings["token_weights"] == "inclusion" and not method.knows_inclusion:
        knowing = ", ".join(repr(entry.name) for entry in METHODS.values() if entry.knows_inclusion)
        raise ValueError(
            f"`token_weights` is 'inclusion'; the method {method.name!r} does not know the chance of a token to be kept, so it "
            f"must be 'none' or 'cluster_size'. Methods that know it: {knowing}."
        )
    if settings["exact_count"]:
        return
    for name in ("token_weights", "positions"):
        if settings[name] != SHARED_SETTINGS[name].default:
            raise ValueError(
                f"`exact_count` is False and `{name}` {settings[name]!r}; placeholders without a token have neither weight nor "
                f"place, so `{name}` must be {SHARED_SETTINGS[name].default!r}, or `exact_count` True."
            )


def _check_stages(method: Any, settings: Mapping[str, Any]) -> None:
    """A ValueError where a method cannot say what to drop in stages."""
    if not settings["stages"]:
        return
    given = f"`stages` is {shown(settings['stages'])}"
    if not method.ranks:
        ranking = ", ".join(repr(entry.name) for entry in METHODS.values() if entry.ranks)
        raise ValueError(
            f"{given}; the method {method.name!r} does not rank tokens, so it must be empty. Those that do: {ranking}."
        )
    if not settings["exact_count"]:
        raise ValueError(
            f"{given} and `exact_count` False; how many tokens a stage leaves must be known before. Set `exact_count` to True, "
            "or no `stages`."
        )


def _as_json(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def checked_ratio(value: Any) -> float:
    """`value` as a retention ratio, a float above 0 and at most 1; ValueError otherwise."""
    try:
        return checked_number("retention_ratio", value, float, 0, 1, above_minimum=True)
    except ValueError as error:
        number = float(value) if isinstance(value, (int, float)) and abs(value) < 2**53 else 0.0
        if number < 2:
            raise
        advice = f"For {number:g} % write {number / 100:g}; for" if number <= 100 else "For"
        raise ValueError(f"{error} {advice} {number:g} tokens use `token_budget`.") from None


def checked_budget(value: Any) -> int:
    """`value` as a token budget, a whole number from 1; ValueError otherwise."""
    return checked_number("token_budget", value, int, 1)


def setting_meant_by(name: str) -> str | None:
    """The pruning setting, or `pruning_config`, that a keyword is or was meant to be; None for any other keyword."""
    if name == "pruning":
        return "pruning_config"
    of_methods = (setting.name for method in METHODS.values() for setting in method.settings)
    return _closest(name, frozenset(("method", *SHARED_SETTINGS, "pruning_config", *of_methods)))


@functools.cache
def _closest(name: str, settings: frozenset[str]) -> str | None:
    close = difflib.get_close_matches(name, settings, n=1, cutoff=0.88)
    return close[0] if close else None


def check_no_setting_among(keywords: Iterable[str]) -> None:
    """A ValueError for pruning settings among keywords that transformers may drop in silence, misspelt ones included."""
    for name in keywords:
        meant = None if name == "pruning_config" else setting_meant_by(name)
        if meant == name:
            raise ValueError(f"`{name}` is a pruning setting; give it as `pruning_config={{{name!r}: ...}}`.")
        if meant is not None:
            advice = "`pruning_config`" if meant == "pruning_config" else f"`pruning_config={{{meant!r}: ...}}`"
            raise ValueError(f"`{name}` is no argument. Did you mean {advice}?")


class VisualTokenPruningConfig:
    """Settings of visual token pruning: a method, what all methods share, and the method's own.

    Instances are immutable and hashable; `replace` makes a changed copy.

    Args:
        method (`str`, defaults to `"hivtp"`):
            How tokens are chosen; all methods are listed below.
        retention_ratio, token_budget, exact_count, keep_newlines, token_weights, weight_strength, positions, stages,
        video_scope:
            What all methods share, listed below. At most one of a ratio and a budget is given. For hivtp a ratio rules over
            `global_ratio` and `local_window`, which stand where neither is given; other methods then read a ratio of 0.5.
            Of the numbers that a ratio can reach, a budget keeps the largest one not above it. The method "none" takes
            no ratio below 1.
        **of_method:
            The method's own settings, listed below with their type, default and range. Encoder layers count from 0.

    Raises:
        ValueError: names the field, the value given and what is allowed. A setting that the method does not have
            is an error too, and so are a ratio and a budget together.

    `retention_ratio`, `token_budget` and `exact_count` are ours. All methods share:

    {shared}

    Methods keep:

    {methods}
    """

    method: str
    retention_ratio: float | None
    token_budget: int | None
    exact_count: bool
    keep_newlines: bool
    token_weights: str
    weight_strength: float
    positions: str
    video_scope: str

    def __init__(
        self,
        /,  # so that a stored setting may even be called "self", and is refused like any other
        method: str = "hivtp",
        retention_ratio: float | None = None,
        token_budget: int | None = None,
        exact_count: bool = True,
        keep_newlines: bool = True,
        token_weights: str = "none",
        weight_strength: float = 1.0,
        positions: str = "packed",
        stages: Any = (),
        video_scope: str = "frame",
        **of_method: Any,
    ):
        entry = pruning_method(method)
        if checked_flag("exact_count", exact_count) is False and not entry.content_dependent_count:
            raise ValueError(
                f"`exact_count` is False; the method {entry.name!r} keeps a number that the image's size determines, so it "
                "must be True."
            )
        check_one_budget(retention_ratio, token_budget)
        if token_budget is not None:
            token_budget = checked_budget(token_budget)
        elif retention_ratio is not None:
            retention_ratio = checked_ratio(retention_ratio)
        else:
            retention_ratio = entry.default_retention_ratio
        if entry.keeps_everything and (token_budget is not None or retention_ratio not in (None, 1)):
            given = f"`retention_ratio` is {retention_ratio}" if token_budget is None else f"`token_budget` is {token_budget}"
            raise ValueError(
                f"{given}; the method {entry.name!r} keeps every token. Leave it out, or choose another method "
                '(such as `method="hivtp"`).'
            )
        settings: dict[str, Any] = {
            "method": entry.name,
            "retention_ratio": retention_ratio,
            "token_budget": token_budget,
            "exact_count": exact_count,
            "keep_newlines": checked_flag("keep_newlines", keep_newlines),
            "token_weights": _TOKEN_WEIGHTS.checked(token_weights),
            "weight_strength": _WEIGHT_STRENGTH.checked(weight_strength),
            "positions": _POSITIONS.checked(positions),
            "stages": _STAGES.checked(stages),
            "video_scope": _VIDEO_SCOPE.checked(video_scope),
        }
        _check_weights_and_positions(entry, settings)
        _check_stages(entry, settings)
        for setting in entry.settings:
            settings[setting.name] = setting.checked(of_method.pop(setting.name, setting.default))
        if of_method:
            known = ", ".join(f"`{name}`" for name in settings)
            unknown = ", ".join(f"`{name}`" for name in sorted(map(str, of_method)))
            close = [match for name in of_method for match in difflib.get_close_matches(str(name), settings, n=1)]
            advice = f"Did you mean {' and '.join(f'`{match}`' for match in close)}?" if close else "Remove it."
            raise ValueError(f"{unknown}: not a setting of the method {entry.name!r}, which has {known}. {advice}")
        # Written past our own __setattr__, which refuses: settings that were checked once stay as they are.
        self.__dict__.update(settings)
        entry.check_settings(self)

    @property
    def weighs_tokens(self) -> bool:
        """Whether kept tokens weigh other than 1 in the language model's attention."""
        return self.token_weights != "none" and self.weight_strength > 0

    @property
    def drops_in_stages(self) -> bool:
        """Whether tokens are dropped inside the language model as well."""
        return pruning_method(self.method).drops_in_stages(self)

    @property
    def marks_columns(self) -> bool:
        """Whether the language model is told more of kept tokens than features: their places, weights or stages."""
        return self.weighs_tokens or self.positions != "packed" or self.drops_in_stages

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
        return {name: _as_json(value) for name, value in self.__dict__.items()}

    def replace(self, /, **changes: Any) -> "VisualTokenPruningConfig":
        """A copy with some settings changed, validated as a whole.

        A new ratio takes the place of a budget, and the other way round. With a new method, the old one's own settings
        go; what all methods share stays, except that the method "none" takes no budget along.
        """
        settings = self.to_dict()
        if changes.get("method", self.method) != self.method:
            dropped = {setting.name for setting in pruning_method(self.method).settings}
            if pruning_method(changes["method"]).keeps_everything:
                dropped |= {"retention_ratio", "token_budget"}
            settings = {name: value for name, value in settings.items() if name not in dropped}
        for budget, other in (("retention_ratio", "token_budget"), ("token_budget", "retention_ratio")):
            if changes.get(budget) is not None:
                settings.pop(other, None)
        return type(self)(**{**settings, **changes})

    def for_call(self, retention_ratio: float | None = None, token_budget: int | None = None) -> "VisualTokenPruningConfig":
        """These settings with the budget of one call, which rules; themselves where the call gives none."""
        check_one_budget(retention_ratio, token_budget)
        if retention_ratio is not None:
            return self.replace(retention_ratio=retention_ratio)
        return self if token_budget is None else self.replace(token_budget=token_budget)

    def scored_layers(self, encoder: Any) -> Sequence[int]:
        """The encoder layers, 0-based and ascending, whose attention this config reads.

        Args:
            encoder: `EncoderFacts`, as `model.model.encoder_facts()` says them.
        """
        return pruning_method(self.method).layers(self, encoder)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"a VisualTokenPruningConfig does not change; use `pruning.replace({name}={value!r})` and assign the result."
        )

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a VisualTokenPruningConfig does not change.")

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no setting of the method; tells type checkers that such settings exist.
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisualTokenPruningConfig) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.__dict__.items())})"


def describe_settings() -> None:
    """Writes all settings into the docstring of `VisualTokenPruningConfig`, once the methods are registered."""
    shared = [str(setting) for setting in SHARED_SETTINGS.values()]
    methods = []
    for method in METHODS.values():
        methods += [f'"{method.name}": {method.rule}.', *(f"    {setting}" for setting in method.settings)]
    documentation = VisualTokenPruningConfig.__doc__
    if documentation:  # None under `python -OO`
        for place, lines in (("{shared}", shared), ("{methods}", methods)):
            documentation = documentation.replace(place, "\n    ".join(lines))
        VisualTokenPruningConfig.__doc__ = documentation
