"""What the tests must know of the methods, beyond what these say of themselves."""

from typing import Any, NamedTuple

from hivtp_hf.pruning.registry import METHODS


class Tested(NamedTuple):
    """What the tests must know of a method.

    Attributes:
        defaults: its own settings and their published values.
        small: settings in addition to a ratio, for towers of ten layers; the defaults where they fit.
    """

    defaults: dict[str, Any]
    small: dict[str, Any] = {}  # noqa: RUF012  (read only)


_LAYERS = {"importance_start_layer": None, "importance_num_layers": None, "importance_layers": None}
_HIVTP = {"global_ratio": 0.25, "local_window": 2, "regions": 2, **_LAYERS}
_HIPRUNE = {"alpha": 0.1, "object_layer": None, "deep_layer": None, "published_borders": False}

_VFLOWOPT = {
    "sink_threshold": None,
    "entropy_weight": 0.0,
    "recycling_cell_side": None,
    "first_stage_ratio": None,
    "second_stage_ratio": None,
    "second_stage_layer": None,
    "third_stage_layer": None,
}

_KNOWN = {
    "hivtp": Tested(_HIVTP),
    "hiprune": Tested(_HIPRUNE, small={"object_layer": 5}),
    "gprune": Tested({"similarity_threshold": 0.5, "temperature": 0.03, "iterations": 5}),
    # Of views of few cells the published strategies make no averages, and find no sinks.
    "vflowopt": Tested(_VFLOWOPT, small={"sink_threshold": 1.5, "recycling_cell_side": 3, "entropy_weight": 0.2}),
    "cls_attention": Tested({"layer": None}),
    "visionzip": Tested({"contextual_share": 10 / 64, "layer": None}),
    "divprune": Tested({}),
    "scope": Tested({"saliency_power": 1.0, "layer": None}),
    "dpp": Tested({}),
    "mmtok": Tested({"similarity_temperature": 0.2}),
    "id_selection": Tested({"sharpness": 20.0, "layer": None}),
    "mmr": Tested({"relevance": 0.5, "layer": None}),
    "spread": Tested({"focus": 0.3, "contrast": 2.0, "score": "attention", **_LAYERS}),
    "random": Tested({"seed": 0}, small={"seed": 7}),
    "uniform": Tested({}),
    "none": Tested({}),
}
# A method that is not named above is tested as it is.
TESTED = {
    name: _KNOWN.get(name) or Tested({setting.name: setting.default for setting in method.settings})
    for name, method in METHODS.items()
}
