"""The list of methods that the tests go by: a new method adds its line here."""

from typing import Any, NamedTuple


class Tested(NamedTuple):
    """What the tests must know of a method.

    Attributes:
        defaults: its own settings and their published values.
        small: settings in addition to a ratio, for towers of ten layers; the defaults where they fit.
        reads_attention: whether it must look into the vision tower.
    """

    defaults: dict[str, Any]
    small: dict[str, Any] = {}  # noqa: RUF012  (read only)
    reads_attention: bool = False


_HIVTP = {"global_ratio": 0.25, "local_window": 2, "regions": 2, "importance_start_layer": 6, "importance_num_layers": 3}
_HIPRUNE = {"alpha": 0.1, "object_layer": 8, "deep_layer": None, "published_borders": False}

TESTED = {
    "hivtp": Tested(_HIVTP, reads_attention=True),
    "hiprune": Tested(_HIPRUNE, small={"object_layer": 5}, reads_attention=True),
    "gprune": Tested({"similarity_threshold": 0.5, "temperature": 0.03, "iterations": 5}),
    "cls_attention": Tested({"layer": None}, reads_attention=True),
    "random": Tested({"seed": 0}, small={"seed": 7}),
    "uniform": Tested({}),
    "none": Tested({}),
}
