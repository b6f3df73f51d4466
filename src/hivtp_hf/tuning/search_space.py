"""`SearchSpace`: the numbers and words that a search may choose, and the pruning settings that they mean."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..pruning.checked_values import shown
from ..pruning.evidence import EncoderFacts
from ..pruning.registry import METHODS, pruning_method
from ..pruning.settings import SHARED_SETTINGS, Setting, VisualTokenPruningConfig

# Shared settings that leave the number of tokens as it is. They are searched where they are named, and not by default.
_SHARED = ("token_weights", "weight_strength", "positions")
# What a stage leaves at least: with less, most of a space would be far from any ratio that is asked for.
_LEAST_STAGE_RATIO = 0.1
# A range is searched by its logarithm where its ends are so many times apart.
_LOGARITHMIC = 100
MOST_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One number, or one word, of a search.

    Attributes:
        name: of the setting, with what of it is meant where it takes several parameters, as in "importance_layers.first".
        low, high: the range of a number, both ends included.
        is_whole: whether only whole numbers are meant.
        is_logarithmic: whether the search goes by the number's logarithm.
        choices: the words, or True and False; empty for a number.
    """

    name: str
    low: float = 0
    high: float = 0
    is_whole: bool = False
    is_logarithmic: bool = False
    choices: tuple[Any, ...] = ()


class SearchSpace:
    """Which settings a search changes, where it looks, and what a point of it means.

    Every point means the retention ratio that is asked for: a method keeps it by itself, and with stages the ratio of what
    enters the language model follows from theirs, so that the average over its layers is that ratio. Nothing is clamped: a
    point that means nothing is a ValueError of `settings`.

    Args:
        start: the settings whose others stay as they are, with a retention ratio.
        names: of the settings to search; None for all of the method's own that tuning does not leave alone.
        fixed: names of settings that somebody has given a value, which are left alone.
        encoder: the vision encoder, whose depth bounds layers.
        num_layers: of the language model.
        stages: how many stages inside the language model are searched, in place of those of `start`.

    Attributes:
        parameters: what a point is made of.

    Raises:
        ValueError: for names that are no settings of the method or cannot be searched, where nothing is left to search, and for
            stages that the method or the language model does not go with.
    """

    def __init__(
        self,
        start: VisualTokenPruningConfig,
        names: Sequence[str] | None,
        fixed: Sequence[str],
        encoder: EncoderFacts,
        num_layers: int,
        stages: int = 0,
    ):
        self._start, self._encoder, self._num_layers, self._stages = start, encoder, num_layers, stages
        self._ratio: Any = start.retention_ratio
        layers = range(encoder.num_layers) if encoder.comparable_layers is None else encoder.comparable_layers
        self.layers = sorted(layers)
        _check_stages(start, stages, num_layers)
        self._searched = self._chosen(names, fixed)
        self._check_fixed(fixed)
        parameters = [parameter for setting in self._searched for parameter in self._parameters_of(setting)]
        for stage in range(1, stages + 1):
            parameters.append(Parameter(f"stage_{stage}.layer", 1, num_layers - 1, is_whole=True))
            parameters.append(Parameter(f"stage_{stage}.ratio", _LEAST_STAGE_RATIO, 1))
        self.parameters = tuple(parameters)
        if not parameters:
            raise ValueError(
                f"the method {start.method!r} has nothing to tune. Such methods have: {', '.join(_tunable_methods())}; or give "
                "`--stages`, where the method ranks."
            )

    def changing(self, settings: VisualTokenPruningConfig) -> dict[str, Any]:
        """What differs from point to point, by name, as JSON types; of layers that are named otherwise those that are read."""
        every = settings.to_dict()
        found = {setting.name: every[setting.name] for setting in self._searched}
        for setting in self._searched:
            if setting.kind is tuple and found[setting.name] is None:
                found[setting.name] = list(settings.scored_layers(self._encoder))
        if self._stages:
            found |= {"stages": every["stages"], "retention_ratio": every["retention_ratio"]}
        return found

    @property
    def reads_layers(self) -> bool:
        """Whether points differ in the encoder layers that they read."""
        return any(setting.is_layer for setting in self._searched)

    def settings(self, point: Mapping[str, Any]) -> VisualTokenPruningConfig:
        """The settings that a point means, by the names of its parameters.

        Raises:
            ValueError: for a point that means none, such as layers beyond the encoder's depth; says why.
        """
        changes: dict[str, Any] = {}
        for setting in self._searched:
            if setting.kind is tuple:
                first, number = point[f"{setting.name}.first"], point[f"{setting.name}.number"]
                if first + number > len(self.layers):
                    raise ValueError(
                        f"`{setting.name}` would be {number} layers from {self.layers[first]} on, but the encoder's last is "
                        f"{self.layers[-1]}."
                    )
                # Named one by one, they take the place of a first one and a number.
                changes.update(self._other_ways_to_name_layers())
                changes[setting.name] = tuple(self.layers[first : first + number])
            elif setting.is_layer:
                changes[setting.name] = self.layers[point[setting.name]]
            else:
                changes[setting.name] = point[setting.name]
        if self._stages:
            changes.update(self._stages_of(point))
        return self._start.replace(**changes)

    def point(self, settings: VisualTokenPruningConfig) -> dict[str, Any] | None:
        """The point that means these settings; None where none does, as where they leave something to the method."""
        point: dict[str, Any] = {}
        for setting in self._searched:
            value = getattr(settings, setting.name)
            if setting.kind is tuple:
                read = list(settings.scored_layers(self._encoder))
                if not read or not set(read) <= set(self.layers):
                    return None
                point[f"{setting.name}.first"] = self.layers.index(read[0])
                point[f"{setting.name}.number"] = len(read)
            else:
                point[setting.name] = self.layers.index(value) if setting.is_layer and value in self.layers else value
        if self._stages:
            if len(settings.stages) != self._stages:
                return None
            for number, (layer, ratio) in enumerate(settings.stages, 1):
                point |= {f"stage_{number}.layer": layer, f"stage_{number}.ratio": ratio}
        try:
            is_there = all(_contains(parameter, point[parameter.name]) for parameter in self.parameters)
            return point if is_there and self._reads_alike(self.settings(point), settings) else None
        except ValueError:
            return None

    def _reads_alike(self, found: VisualTokenPruningConfig, settings: VisualTokenPruningConfig) -> bool:
        same_layers = list(found.scored_layers(self._encoder)) == list(settings.scored_layers(self._encoder))
        others = [setting.name for setting in self._searched if setting.kind is not tuple]
        return same_layers and all(getattr(found, name) == getattr(settings, name) for name in others)

    def _chosen(self, names: Sequence[str] | None, fixed: Sequence[str]) -> list[Setting]:
        own = {setting.name: setting for setting in pruning_method(self._start.method).settings}
        by_default = [setting for setting in own.values() if setting.name not in fixed and self._range_of(setting)]
        if names is None:
            return by_default
        known = {**own, **{name: SHARED_SETTINGS[name] for name in _SHARED}}
        for name in names:
            if name in fixed:
                raise ValueError(f"`--search` names {name!r}, which `--set` gives a value. Leave one of them out.")
            if name not in known or not self._range_of(known[name]):
                can = [setting.name for setting in known.values() if self._range_of(setting)]
                raise ValueError(
                    f"`--search` names {name!r}; settings of {self._start.method!r} that can be searched are {', '.join(can)}."
                )
        return [setting for name, setting in known.items() if name in names]

    def _check_fixed(self, fixed: Sequence[str]) -> None:
        """A ValueError where what is searched would replace what was given."""
        replaced = {"stages": "--stages"} if self._stages else {}
        for setting in self._searched:
            if setting.kind is tuple:
                replaced |= dict.fromkeys(self._other_ways_to_name_layers(), setting.name)
        for name in fixed:
            if name in replaced:
                raise ValueError(
                    f"`--set` gives {name!r} a value, which the search of {replaced[name]} would replace. Leave one out "
                    "(`--search` names what is searched)."
                )

    def _range_of(self, setting: Setting) -> tuple[Any, ...]:
        """Where a setting is searched; empty where it is left alone."""
        found = setting.search_range(self._ratio)
        if found is not None:
            if setting.kind is tuple and found:
                return found[0], min(found[1], len(self.layers))
            return found
        if setting.kind is bool:
            return (False, True)
        if setting.kind is str:
            return setting.choices
        if setting.is_layer:
            return 0, len(self.layers) - 1
        raise ValueError(
            f"the setting {setting.name!r} of the method {self._start.method!r} has no upper end and no range to search. Give "
            f"its `Setting` one, such as search=(1, 8), or search=() to leave it alone."
        )

    def _parameters_of(self, setting: Setting) -> list[Parameter]:
        found = self._range_of(setting)
        if setting.kind in (bool, str):
            return [Parameter(setting.name, choices=tuple(found))]
        low, high = found
        if setting.kind is tuple:
            first = Parameter(f"{setting.name}.first", 0, len(self.layers) - 1, is_whole=True)
            return [first, Parameter(f"{setting.name}.number", low, high, is_whole=True)]
        is_logarithmic = low > 0 and high / low >= _LOGARITHMIC
        return [Parameter(setting.name, low, high, setting.kind is int, is_logarithmic)]

    def _other_ways_to_name_layers(self) -> dict[str, None]:
        settings = pruning_method(self._start.method).settings
        return {setting.name: None for setting in settings if setting.is_layer and setting not in self._searched}

    def _stages_of(self, point: Mapping[str, Any]) -> dict[str, Any]:
        stages = [(point[f"stage_{n}.layer"], point[f"stage_{n}.ratio"]) for n in range(1, self._stages + 1)]
        ascending = [layer for layer, _ in stages]
        if any(first >= second for first, second in itertools.pairwise(ascending)):
            raise ValueError(f"the layers of its stages are {ascending}, which do not ascend.")
        entering = self._ratio / average_share(stages, self._num_layers)
        if entering > 1:
            raise ValueError(
                f"with the stages {stages} a retention ratio of {entering:.4g} would have to enter the language model, so that "
                f"its layers see {self._ratio:.4g} on average; all is 1."
            )
        return {"retention_ratio": entering, "stages": stages}


def average_share(stages: Sequence[tuple[int, float]], num_layers: int) -> float:
    """What a language model's layers see on average of what enters it, rounding to whole tokens apart.

    Args:
        stages: before which layers which share of what is left goes on, ascending.
        num_layers: the depth of the language model.
    """
    bounds, share, total = [0, *(layer for layer, _ in stages), num_layers], 1.0, 0.0
    for (first, behind), ratio in zip(itertools.pairwise(bounds), [1.0, *(ratio for _, ratio in stages)], strict=True):
        share *= ratio
        total += share * (behind - first)
    return total / num_layers


def _contains(parameter: Parameter, value: Any) -> bool:
    if parameter.choices:
        return value in parameter.choices
    if value is None or (parameter.is_whole and not isinstance(value, int)):
        return False
    return parameter.low <= value <= parameter.high


def _check_stages(start: VisualTokenPruningConfig, stages: int, num_layers: int) -> None:
    if stages not in range(MOST_STAGES + 1):
        raise ValueError(f"`--stages` is {shown(stages)}; it must be a whole number from 0 to {MOST_STAGES}.")
    if not stages:
        return
    if stages > num_layers - 1:
        raise ValueError(f"`--stages` is {stages}; a language model of {num_layers} layers has room for {num_layers - 1}.")
    # Refused by name, as the method's own settings are.
    start.replace(stages=[(1, 0.5)])


def _tunable_methods() -> list[str]:
    return [name for name, method in METHODS.items() if any(setting.search != () for setting in method.settings)]
