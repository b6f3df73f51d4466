"""Where tuning looks: ranges of all methods, what a point means, and what means nothing."""

import itertools

import pytest

from hivtp_hf import EncoderFacts, Setting, VisualTokenPruningConfig
from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.stages import stages_of_language_model
from hivtp_hf.tuning.search_space import MOST_STAGES, SearchSpace, average_share

pytestmark = pytest.mark.once

CLIP = EncoderFacts(24, 22)
# As Qwen2.5-VL's, of whose layers four see the whole image.
WINDOWS = EncoderFacts(32, 31, {}, frozenset({7, 15, 23, 31}))


def space_of(method, names=None, fixed=(), encoder=CLIP, num_layers=32, stages=0, ratio=0.25, **settings):
    start = VisualTokenPruningConfig(method=method, retention_ratio=ratio, **settings)
    return SearchSpace(start, names, fixed, encoder, num_layers, stages)


def ends_of(space):
    """Points at all ends of all ranges."""
    ends = [parameter.choices or (parameter.low, parameter.high) for parameter in space.parameters]
    names = [parameter.name for parameter in space.parameters]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*ends)]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.keeps_everything])
def test_every_method_has_bounded_ranges(method):
    """Every setting is bounded, or says where to look or that tuning leaves it alone; a range means settings at its ends."""
    if all(setting.search == () for setting in METHODS[method].settings):
        with pytest.raises(ValueError, match="has nothing to tune"):
            space_of(method)
        return
    space = space_of(method)
    # From the last layer on there is one.
    points = [
        point
        for point in ends_of(space)
        if point.get("importance_layers.first") != 23 or point["importance_layers.number"] == 1
    ]
    meant = [space.settings(point) for point in points]
    assert len(set(meant)) > 1
    assert {settings.retention_ratio for settings in meant} == {0.25}
    for settings in meant:
        assert max(settings.scored_layers(CLIP), default=0) < 24


def test_the_published_space_of_vflowopt():
    ranges = {parameter.name: (parameter.low, parameter.high) for parameter in space_of("vflowopt", ratio=0.5).parameters}
    assert ranges == {
        "sink_threshold": (0, 50),
        "entropy_weight": (-1, 1),
        "recycling_cell_side": (3, 24),
        "first_stage_ratio": (0.5, 0.75),
        "second_stage_ratio": (0.533, 1),
    }
    first = next(p for p in space_of("vflowopt", ratio=0.8).parameters if p.name == "first_stage_ratio")
    assert (first.low, first.high) == (0.8, 1)


def test_layers_are_those_that_compare_whole_images():
    space = space_of("hivtp", ["importance_layers"], encoder=WINDOWS)
    first, number = space.parameters
    assert (first.high, number.high) == (3, 4)
    settings = space.settings({"importance_layers.first": 1, "importance_layers.number": 2})
    assert settings.importance_layers == (15, 23)
    assert space.point(settings) == {"importance_layers.first": 1, "importance_layers.number": 2}
    single = space_of("hiprune", ["object_layer"], encoder=WINDOWS)
    assert single.settings({"object_layer": 3}).object_layer == 31
    assert single.point(VisualTokenPruningConfig("hiprune", object_layer=23)) == {"object_layer": 2}


def test_layers_take_the_place_of_a_first_one_and_a_number():
    space = space_of("hivtp", importance_start_layer=4, importance_num_layers=3)
    start = VisualTokenPruningConfig(retention_ratio=0.25, importance_start_layer=4, importance_num_layers=3)
    point = space.point(start)
    assert point == {"regions": 2, "importance_layers.first": 4, "importance_layers.number": 3}
    assert space.settings(point).importance_layers == (4, 5, 6)
    assert space.settings(point).importance_start_layer is None
    assert space.changing(start) == {"regions": 2, "importance_layers": [4, 5, 6]}


def test_what_a_method_finds_by_itself_is_no_point():
    assert space_of("vflowopt").point(VisualTokenPruningConfig("vflowopt", retention_ratio=0.25)) is None
    assert space_of("cls_attention").point(VisualTokenPruningConfig("cls_attention")) is None
    assert space_of("hivtp").point(VisualTokenPruningConfig(regions=9)) is None
    apart = VisualTokenPruningConfig(importance_layers=[3, 9])
    assert space_of("hivtp").point(apart) is None


def test_nothing_is_clamped():
    space = space_of("hivtp", ["importance_layers"])
    with pytest.raises(ValueError, match="would be 3 layers from 22 on, but the encoder's last is 23"):
        space.settings({"importance_layers.first": 22, "importance_layers.number": 3})


@pytest.mark.parametrize("stages", [1, 2, MOST_STAGES])
def test_stages_keep_the_average(stages):
    space = space_of("hivtp", ["regions"], stages=stages, ratio=0.2, num_layers=8)
    layers, ratios = (2, 4, 7)[:stages], (0.5, 0.9, 0.3)[:stages]
    point = {"regions": 3}
    for number, (layer, ratio) in enumerate(zip(layers, ratios, strict=True), 1):
        point |= {f"stage_{number}.layer": layer, f"stage_{number}.ratio": ratio}
    settings = space.settings(point)
    left, seen = settings.retention_ratio, []
    stage_of = dict(stages_of_language_model(settings, 8))
    for layer in range(8):
        left *= stage_of.get(layer, 1)
        seen.append(left)
    assert sum(seen) / 8 == pytest.approx(0.2, rel=1e-12)
    assert settings.retention_ratio == pytest.approx(0.2 / average_share(settings.stages, 8))
    assert space.point(settings) == point
    assert set(space.changing(settings)) == {"regions", "stages", "retention_ratio"}


def test_stages_that_mean_nothing():
    space = space_of("hivtp", ["regions"], stages=2, ratio=0.5, num_layers=8)
    point = {"regions": 2, "stage_1.layer": 5, "stage_1.ratio": 0.9, "stage_2.layer": 5, "stage_2.ratio": 0.9}
    with pytest.raises(ValueError, match=r"are \[5, 5\], which do not ascend"):
        space.settings(point)
    with pytest.raises(ValueError, match="would have to enter the language model"):
        space.settings({**point, "stage_1.layer": 1, "stage_1.ratio": 0.1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "uniform"}, "the method 'uniform' has nothing to tune. Such methods have: hivtp, hiprune"),
        ({"method": "hivtp", "names": ["region"]}, "names 'region'; settings of 'hivtp' that can be searched are regions"),
        ({"method": "hivtp", "names": ["local_window"]}, "`--search` names 'local_window'"),
        ({"method": "hivtp", "names": ["regions"], "fixed": ["regions"]}, "which `--set` gives a value"),
        ({"method": "hivtp", "fixed": ["importance_start_layer"]}, "the search of importance_layers would replace"),
        ({"method": "hivtp", "fixed": ["stages"], "stages": 1}, "the search of --stages would replace"),
        ({"method": "mmtok", "fixed": ["similarity_temperature"]}, "nothing to tune"),
        ({"method": "uniform", "stages": 1}, "does not rank tokens"),
        ({"method": "vflowopt", "stages": 1}, "has stages of its own"),
        ({"method": "hivtp", "stages": 4}, "must be a whole number from 0 to 3"),
        ({"method": "hivtp", "stages": 2, "num_layers": 2}, "has room for 1"),
    ],
)
def test_what_cannot_be_searched(arguments, message):
    with pytest.raises(ValueError, match=message):
        space_of(**arguments)


def test_shared_settings_are_searched_by_name():
    space = space_of("mmtok", ["token_weights", "weight_strength", "positions"])
    weights, strength, positions = space.parameters
    assert positions.choices == ("packed", "original")
    assert (strength.low, strength.high) == (0, 1)
    assert "positions" not in [parameter.name for parameter in space_of("mmtok").parameters]
    point = {weights.name: "inclusion", strength.name: 0.5, positions.name: "packed"}
    with pytest.raises(ValueError, match="does not know the chance"):  # a point that is rejected, not a space
        space.settings(point)


def test_an_unbounded_setting_must_say_where_to_look(monkeypatch):
    method = type(METHODS["mmtok"])
    monkeypatch.setattr(method, "settings", (Setting("similarity_temperature", float, 0.2),))
    with pytest.raises(ValueError, match=r"has no upper end and no range to search. Give its `Setting` one"):
        space_of("mmtok")
    monkeypatch.setattr(method, "settings", (Setting("similarity_temperature", float, 0.2, search=(0.01, 1)),))
    (parameter,) = space_of("mmtok").parameters
    assert parameter.is_logarithmic
