"""`VisualTokenPruningConfig`: defaults, ranges, errors, round trips."""

import copy
import dataclasses
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.methods import METHODS

DEFAULTS = {
    "method": "hivtp",
    "retention_ratio": None,
    "exact_count": True,
    "keep_newlines": True,
    "global_ratio": 0.25,
    "local_window": 2,
    "regions": 2,
    "importance_start_layer": 6,
    "importance_num_layers": 3,
}


def test_defaults_are_the_published_setting():
    assert VisualTokenPruningConfig().to_dict() == DEFAULTS
    assert VisualTokenPruningConfig().scored_layers == range(6, 9)


def test_round_trip_through_json_loses_nothing():
    pruning = VisualTokenPruningConfig(retention_ratio=2 / 9, keep_newlines=False, global_ratio=0.1, local_window=5)
    assert VisualTokenPruningConfig.from_dict(json.loads(json.dumps(pruning.to_dict()))) == pruning


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda pruning: pickle.loads(pickle.dumps(pruning))])
def test_copies_are_equal_and_hash_alike(twin):
    pruning = VisualTokenPruningConfig(retention_ratio=0.3)
    assert twin(pruning) == pruning
    assert hash(twin(pruning)) == hash(pruning)
    assert pruning != VisualTokenPruningConfig()


def test_numbers_become_plain_python():
    pruning = VisualTokenPruningConfig(retention_ratio=Fraction(1, 2), local_window=np.int32(3), global_ratio=np.float32(0.5))
    assert [type(pruning.to_dict()[key]) for key in ("retention_ratio", "local_window", "global_ratio")] == [float, int, float]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *[("retention_ratio", value, "above 0 to 1") for value in (0, -0.5, 1.0001, float("nan"), "0.5", True, [0.5], 10**400)],
        *[("global_ratio", value, "from 0 to 1") for value in (-0.1, 1.1, float("inf"), None, "0.25", False)],
        *[("local_window", value, "whole number from 1") for value in (0, -1, 2.0, "2", None, True)],
        *[("regions", value, "whole number from 1") for value in (0, 1.5, None)],
        *[("importance_start_layer", value, "whole number from 0") for value in (-1, 6.0, "6")],
        *[("importance_num_layers", value, "whole number from 1") for value in (0, None)],
        *[("exact_count", value, "True or False") for value in (1, None, "true")],
        *[("keep_newlines", value, "True or False") for value in (0, "no")],
        *[("method", value, "'hivtp'") for value in ("HIVTP", None, 3, ["hivtp"])],
    ],
)
def test_errors_name_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError, match=f"`{field}` is .*{allowed}") as error:
        VisualTokenPruningConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_a_setting_that_the_method_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"`alpha`.*'hivtp'.*`global_ratio`"):
        VisualTokenPruningConfig(alpha=0.1)


def test_only_methods_with_a_content_dependent_count_may_lack_an_exact_one(monkeypatch):
    fixed = dataclasses.replace(METHODS["hivtp"], name="fixed", content_dependent_count=False)
    monkeypatch.setitem(METHODS, "fixed", fixed)
    assert VisualTokenPruningConfig(method="fixed").exact_count
    assert not VisualTokenPruningConfig(exact_count=False).exact_count
    with pytest.raises(ValueError, match="`exact_count` is False; the method 'fixed'"):
        VisualTokenPruningConfig(method="fixed", exact_count=False)


@pytest.mark.parametrize("settings", [[], "hivtp", 3, {1: 2}, [("method", "hivtp")]])
def test_from_dict_takes_a_dict_of_settings(settings):
    with pytest.raises(ValueError, match="`pruning_config` is"):
        VisualTokenPruningConfig.from_dict(settings)


def test_instances_do_not_change():
    pruning = VisualTokenPruningConfig()
    with pytest.raises(AttributeError, match="replace"):
        pruning.retention_ratio = 0.5
    with pytest.raises(AttributeError):
        del pruning.method
    changed = pruning.replace(retention_ratio=0.5)
    assert (changed.retention_ratio, pruning.retention_ratio) == (0.5, None)


def test_coerce_takes_what_users_write():
    pruning = VisualTokenPruningConfig(retention_ratio=0.5)

    class OtherCopy:  # the class of the same name in another copy of the code
        def to_dict(self):
            return pruning.to_dict()

    assert VisualTokenPruningConfig.coerce(pruning) is pruning
    assert VisualTokenPruningConfig.coerce({"retention_ratio": 0.5}) == pruning
    assert VisualTokenPruningConfig.coerce(OtherCopy()) == pruning
    assert VisualTokenPruningConfig.coerce(None) == VisualTokenPruningConfig.coerce({}) == VisualTokenPruningConfig()


def test_unknown_attributes_are_missing():
    assert not hasattr(VisualTokenPruningConfig(), "alpha")
