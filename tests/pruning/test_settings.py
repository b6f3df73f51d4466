"""`VisualTokenPruningConfig`: defaults, ranges, errors, round trips."""

import math

import numpy as np
import pytest
import torch

from hivtp_hf import EncoderFacts, VisualTokenPruningConfig
from hivtp_hf.pruning.registry import METHODS
from tested_methods import TESTED

pytestmark = pytest.mark.once

SHARED = {
    **{"token_budget": None, "exact_count": True, "keep_newlines": True},
    **{"token_weights": "none", "weight_strength": 1.0, "positions": "packed", "stages": [], "video_scope": "frame"},
}
EVERY_SETTING = [
    pytest.param(method.name, setting, id=f"{method.name}-{setting.name}")
    for method in METHODS.values()
    for setting in method.settings
]


def test_the_default_method_is_hivtp():
    assert VisualTokenPruningConfig() == VisualTokenPruningConfig("hivtp")


def test_methods_that_are_known():
    assert list(METHODS) == list(TESTED)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_published_settings(method):
    pruning = VisualTokenPruningConfig(method=method)
    ratio = None if method in ("hivtp", "none") else 0.5
    assert pruning.to_dict() == {"method": method, "retention_ratio": ratio, **SHARED, **TESTED[method].defaults}
    for name, value in pruning.to_dict().items():
        assert getattr(pruning, name) == (() if name == "stages" else value)
        assert name == "stages" or type(getattr(pruning, name)) is type(value)
    assert VisualTokenPruningConfig.from_dict({"method": method}) == pruning


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_its_own_settings_only(method):
    pruning = VisualTokenPruningConfig(method=method)
    others = {name for entry in METHODS.values() for name in (h.name for h in entry.settings)} - set(TESTED[method].defaults)
    for name in others:
        assert not hasattr(pruning, name)
        with pytest.raises(ValueError, match=f"`{name}`.*not a setting of the method {method!r}"):
            VisualTokenPruningConfig(method=method, **{name: 1})


def test_which_settings_tell_the_language_model_more():
    for settings, weighs, any_of_both in (
        ({}, False, False),
        ({"weight_strength": 0.5}, False, False),
        ({"token_weights": "cluster_size", "weight_strength": 0}, False, False),
        ({"token_weights": "cluster_size"}, True, True),
        ({"positions": "original"}, False, True),
        ({"method": "uniform", "token_weights": "inclusion"}, True, True),
        ({"method": "none", "token_weights": "inclusion"}, True, True),
    ):
        pruning = VisualTokenPruningConfig(**settings)
        assert (pruning.weighs_tokens, pruning.marks_columns) == (weighs, any_of_both)


SCORED_LAYERS = [
    ({}, [6, 7, 8]),
    ({"importance_start_layer": 0, "importance_num_layers": 2}, [0, 1]),
    ({"importance_start_layer": 4}, [4, 5, 6]),
    ({"importance_num_layers": 2}, [6, 7]),
    ({"importance_layers": [9, 3, 3]}, [3, 9]),
    ({"importance_layers": "3+9"}, [3, 9]),
    ({"method": "hiprune"}, [8, 22]),
    ({"method": "hiprune", "deep_layer": 3}, [3, 8]),
    ({"method": "hiprune", "deep_layer": 8}, [8]),
    ({"method": "cls_attention"}, [22]),
    ({"method": "cls_attention", "layer": 0}, [0]),
    ({"method": "gprune"}, []),
]


@pytest.mark.parametrize(("settings", "layers"), SCORED_LAYERS, ids=str)
def test_scored_layers(settings, layers):
    assert list(VisualTokenPruningConfig(**settings).scored_layers(EncoderFacts(24, 22))) == layers


def test_layers_of_a_family_stand_where_none_are_named():
    own = EncoderFacts(32, 31, {"importance_layers": (7, 15), "object_layer": 15})
    for settings, layers in (
        ({}, [7, 15]),
        ({"importance_num_layers": 2}, [7, 8]),
        ({"importance_layers": 3}, [3]),
        ({"method": "hiprune"}, [15, 31]),
        ({"method": "hiprune", "object_layer": 7}, [7, 31]),
    ):
        assert list(VisualTokenPruningConfig(**settings).scored_layers(own)) == layers


def test_layers_themselves_or_the_first_and_their_number():
    pruning = VisualTokenPruningConfig(importance_layers=[7, 15])
    assert pruning.to_dict()["importance_layers"] == [7, 15]
    assert (
        VisualTokenPruningConfig.from_dict(pruning.to_dict()) == pruning == VisualTokenPruningConfig(importance_layers="7+15")
    )
    with pytest.raises(ValueError, match=r"`importance_layers` is \(7, 15\) .* and `importance_num_layers` 2; give the layers"):
        pruning.replace(importance_num_layers=2)


def test_only_methods_with_a_content_dependent_count_may_lack_an_exact_one(monkeypatch):
    fixed = type("Fixed", (type(METHODS["hivtp"]),), {"name": "fixed", "content_dependent_count": False})()
    monkeypatch.setitem(METHODS, "fixed", fixed)
    assert VisualTokenPruningConfig(method="fixed").exact_count
    assert not VisualTokenPruningConfig(exact_count=False).exact_count
    with pytest.raises(ValueError, match="`exact_count` is False; the method 'fixed'"):
        VisualTokenPruningConfig(method="fixed", exact_count=False)


@pytest.mark.parametrize(("method", "setting"), EVERY_SETTING)
def test_settings_hold_to_their_ranges(method, setting):
    def given(value):
        return getattr(VisualTokenPruningConfig(method=method, **{setting.name: value}), setting.name)

    wrong = ["1", [1], {}, object, float("nan")]
    wrong += [] if setting.default is None else [None]
    if setting.kind is bool:
        right = [True, False]
        wrong += [0, 1, 1.0]
        allowed = "True or False"
    elif setting.kind is tuple:
        right = [(0,), (3, 9)]
        wrong = [{}, object, float("nan"), [], "", "3,9", [1.5], [True], -1, [3, -9], 10**400]
        allowed = "encoder layers from 0"
    elif setting.choices:
        right, allowed = list(setting.choices), f"one of {', '.join(map(repr, setting.choices))}"
        wrong += ["", setting.choices[0].upper(), 1, True]
    else:
        low, high = setting.minimum, setting.maximum
        right = [high if high is not None else 10**6]
        right += [] if setting.above_minimum else [low]
        wrong += [True, False, low - 1, float("inf"), -float("inf"), 10**400, 1j]
        wrong += [low] if setting.above_minimum else []
        wrong += [] if high is None else [high + 1]
        wrong += [2.5, 1.0] if setting.kind is int else []
        allowed = "whole number " if setting.kind is int else "number "
        allowed += f"{'above' if setting.above_minimum else 'from'} {low}"
        allowed += "" if high is None else f" {'and at most' if setting.above_minimum else 'to'} {high}"
    if setting.kind is float:
        right.append(low + 0.75)
        wrong += [math.nextafter(low, -math.inf)] + ([] if high is None else [math.nextafter(high, math.inf)])
    for value in right:
        assert given(value) == value
        assert type(given(value)) is setting.kind
    assert given(setting.default) == setting.default
    for value in wrong:
        with pytest.raises(ValueError, match=f"`{setting.name}` is .*; it must be a? ?{allowed}"):
            given(value)


def test_layers_are_marked_as_such():
    for method in METHODS.values():
        layers = [setting.name for setting in method.settings if setting.is_layer]
        # Those of stages are layers of the language model.
        of_language_model = [layer for layer in TESTED[method.name].defaults if layer.endswith("_stage_layer")]
        assert layers == [name for name in TESTED[method.name].defaults if "layer" in name and name not in of_language_model]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"retention": 0.5}, "Did you mean `retention_ratio`?"),
        ({"method": "gprune", "similarity_treshold": 0.4, "temprature": 1}, "`similarity_threshold` and `temperature`?"),
        ({"banana": 1}, "Remove it."),
        ({"self": 1}, "`self`: not a setting of the method 'hivtp'"),
    ],
)
def test_a_misspelt_setting_gets_advice(settings, advice):
    with pytest.raises(ValueError, match="not a setting of the method") as error:
        VisualTokenPruningConfig.from_dict(settings)
    assert advice in str(error.value)
    for name in VisualTokenPruningConfig(method=settings.get("method", "hivtp")).to_dict():
        assert f"`{name}`" in str(error.value)


@pytest.mark.parametrize(("value", "advice"), [(22.5, "For 22.5 % write 0.225;"), (100, "For 100 % write 1;")])
def test_percentages_get_advice(value, advice):
    with pytest.raises(ValueError, match=r"`retention_ratio` is .* above 0 and at most 1\.") as error:
        VisualTokenPruningConfig(retention_ratio=value)
    assert advice in str(error.value)
    assert f"for {value} tokens use `token_budget`" in str(error.value)


@pytest.mark.parametrize("value", [101, 1.5, 0, "50", float("inf")])
def test_other_wrong_ratios_get_no_advice_on_percentages(value):
    with pytest.raises(ValueError, match="`retention_ratio` is") as error:
        VisualTokenPruningConfig(retention_ratio=value)
    assert "%" not in str(error.value)


def test_the_method_none_takes_no_budget():
    everything = VisualTokenPruningConfig(method="none")
    assert VisualTokenPruningConfig(method="none", retention_ratio=1).retention_ratio == 1
    assert everything.for_call(retention_ratio=1).retention_ratio == 1
    for setting, value in (("retention_ratio", 0.5), ("token_budget", 640), ("token_budget", 10**9)):
        for attempt in (
            lambda **given: VisualTokenPruningConfig(method="none", **given),
            everything.replace,
            everything.for_call,
        ):
            with pytest.raises(ValueError, match=f"`{setting}` is {value}; the method 'none' keeps every token"):
                attempt(**{setting: value})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


RATIO = r"`retention_ratio` is .*above 0 and at most 1"
WINDOW = r"`local_window` is .*whole number from 1"
NO_SETTINGS = "`pruning_config` is .*it must be a dict of settings"
# name: (settings, piece of the error's message)
BAD_SETTINGS = {
    "a list": ([], NO_SETTINGS),
    "a string": ("hivtp", NO_SETTINGS),
    "keys that are no strings": ({1: 2}, NO_SETTINGS),
    "the class itself": (VisualTokenPruningConfig, NO_SETTINGS),
    "a very deep list": (nested(100_000), f"a value that cannot be printed.*{NO_SETTINGS[-20:]}"),
    "unknown key": ({"budget": 100}, "`budget`: not a setting of the method 'hivtp'.*`retention_ratio`"),
    "key of another method": ({"alpha": 0.1}, "`alpha`: not a setting of the method 'hivtp'"),
    "ratio and budget": ({"retention_ratio": 0.5, "token_budget": 10}, "`retention_ratio` is .*`token_budget` 10.*one of them"),
    "budget of zero": ({"token_budget": 0}, "`token_budget` is 0 .*whole number from 1"),
    "published counts that are fixed": ({"method": "hiprune", "exact_count": False}, "`exact_count` is False; .*'hiprune'"),
    "unknown method": ({"method": "nonesuch"}, "`method` is 'nonesuch'.*one of 'hivtp'"),
    "ratio as a string": ({"retention_ratio": "0.5"}, RATIO),
    "ratio as a boolean": ({"retention_ratio": True}, RATIO),
    "ratio of nan": ({"retention_ratio": float("nan")}, RATIO),
    "negative ratio": ({"retention_ratio": -0.0}, RATIO),
    "ratio as a tensor": ({"retention_ratio": torch.tensor(0.5)}, RATIO),
    "ratio as an array": ({"retention_ratio": np.array([0.5])}, RATIO),
    "ratio of more digits than Python prints": ({"retention_ratio": 10**5000}, "cannot be printed.*above 0 and at most 1"),
    "huge window": ({"local_window": 10**101}, f"`local_window` is .*whole number from 1 to {10**100}"),
    "window of more digits than Python prints": ({"local_window": -(10**5000)}, WINDOW),
    "weights that nobody has": ({"token_weights": "area"}, "`token_weights` is 'area' .*'none', 'cluster_size', 'inclusion'"),
    "no weights at all": ({"token_weights": None}, "`token_weights` is None .*must be one of"),
    "weights that are too strong": ({"weight_strength": 1.5}, "`weight_strength` is 1.5 .*from 0 to 1"),
    "places that nobody has": ({"positions": "Original"}, "`positions` is 'Original' .*'packed', 'original'"),
    "weights of unknown chances": ({"token_weights": "inclusion"}, "'hivtp' does not know the chance .*'random', 'uniform'"),
    "weights of a published count": (
        {"exact_count": False, "token_weights": "cluster_size"},
        "`exact_count` is False and `token_weights` 'cluster_size'",
    ),
    "places of a published count": (
        {"exact_count": False, "positions": "original"},
        "`exact_count` is False and `positions` 'original'",
    ),
    "flag as a number": ({"exact_count": 1}, "`exact_count` is 1 .*True or False"),
    "a very long string": ({"method": "x" * 10**6}, r"`method` is 'x{399} \.\.\. x{49}' \(str\)"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        VisualTokenPruningConfig.from_dict(settings)
    assert len(str(error.value)) < 2000


def test_settings_cannot_be_assigned():
    pruning = VisualTokenPruningConfig()
    with pytest.raises(AttributeError, match=r"does not change; use `pruning\.replace\(method='gprune'\)`"):
        pruning.method = "gprune"
    with pytest.raises(AttributeError, match=r"does not change; use `pruning\.replace\(method='gprune'\)`"):
        pruning["method"] = "gprune"
    with pytest.raises(AttributeError):
        del pruning.method
    pruning.to_dict()["method"] = "gprune"
    assert pruning == VisualTokenPruningConfig()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("former", METHODS)
def test_replace_with_another_method(former, method):
    budget = {} if "none" in (former, method) else {"retention_ratio": 0.25}
    pruning = VisualTokenPruningConfig(method=former, keep_newlines=False, **budget)
    assert pruning.replace(method=method) == VisualTokenPruningConfig(method=method, keep_newlines=False, **budget)
    assert pruning.to_dict()["method"] == former


def test_replace_with_another_method_and_its_settings():
    pruning = VisualTokenPruningConfig(local_window=3)
    assert pruning.replace(method="hiprune", alpha=0.2) == VisualTokenPruningConfig(method="hiprune", alpha=0.2)
    assert pruning.replace(method="none") == VisualTokenPruningConfig(method="none")
    assert pruning.replace(method="random", retention_ratio=0.1, seed=3).seed == 3
    with pytest.raises(ValueError, match="`local_window`: not a setting of the method 'random'"):
        pruning.replace(method="random", local_window=3)
    for wrong in ("hivpt", None, ["hivtp"]):
        with pytest.raises(ValueError, match=r"`method` is .*'hivtp', 'hiprune', 'gprune'"):
            pruning.replace(method=wrong)


def test_replace_does_not_lose_what_all_methods_share():
    content_dependent = VisualTokenPruningConfig(exact_count=False)
    with pytest.raises(ValueError, match="`exact_count` is False; the method 'uniform'"):
        content_dependent.replace(method="uniform")
    assert content_dependent.replace(method="uniform", exact_count=True) == VisualTokenPruningConfig(method="uniform")


def test_coerce_takes_what_users_write():
    pruning = VisualTokenPruningConfig(retention_ratio=0.5)

    class OtherCopy:  # the class of the same name in another copy of the code
        def to_dict(self):
            return pruning.to_dict()

    assert VisualTokenPruningConfig.coerce(pruning) is pruning
    assert VisualTokenPruningConfig.coerce({"retention_ratio": 0.5}) == pruning
    assert VisualTokenPruningConfig.coerce(OtherCopy()) == pruning
    assert VisualTokenPruningConfig.coerce(None) == VisualTokenPruningConfig.coerce({}) == VisualTokenPruningConfig()
