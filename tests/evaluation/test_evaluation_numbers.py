"""The numbers of `hivtp evaluate`: what is compared, intervals, averages."""

import csv
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.evaluation import Row
from hivtp_hf.evaluation.data import ImageGroup, checked_data, normalised
from hivtp_hf.evaluation.metrics import (
    VariantAnswers,
    answers_of_variants,
    metrics_rows,
    wilson_interval,
    write_metrics,
    write_predictions,
)
from hivtp_hf.evaluation.variants import (
    COMPARED,
    DEFAULT_RATIOS,
    Variant,
    chosen_methods,
    chosen_weights_and_positions,
    parsed_ratios,
    planned_variants,
    settings_of_methods,
    shrunken_grid,
)
from hivtp_hf.pruning.registry import METHODS

pytestmark = pytest.mark.once

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # R's prop.test(correct, n, correct = FALSE)
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
    ],
)
def test_intervals_are_wilsons(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-6)
    with pytest.raises(ValueError, match="is no share"):
        wilson_interval(n + 1, n)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        (" red.\n", "red"),
        ("Red !?", "red"),
        ("a.b", "a.b"),
        (" ... ", ""),
        ("yes, it is.", "yes, it is"),
    ],
)
def test_answers_are_compared_without_case_and_final_punctuation(written, compared):
    assert normalised(written) == compared


def test_ratios_are_exact():
    assert parsed_ratios(DEFAULT_RATIOS) == (1, HALF, Fraction(2, 9), Fraction(1, 9), Fraction(1, 18))
    assert parsed_ratios(" 0.25, 1/4 ,.5") == (HALF, Fraction(1, 4))


@pytest.mark.parametrize("text", ["", "0", "1.5", "-1/2", "1/0", "half", "1/2,,1", "1e-400", "1e400"])
def test_ratios_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="is no ratio"):
        parsed_ratios(text)


def test_methods_are_chosen_by_name():
    assert chosen_methods(None) == COMPARED
    assert set(METHODS) | {"base-only", "downsample"} == set(COMPARED)
    assert chosen_methods("downsample, hivtp") == ("none", "hivtp", "downsample")
    with pytest.raises(ValueError, match="'hivpt' is unknown"):
        chosen_methods("hivpt")


def test_a_plan_has_every_method_and_ratio():
    settings = settings_of_methods(COMPARED, VisualTokenPruningConfig(), [])
    plan = planned_variants(COMPARED, parsed_ratios("1,1/2,1/9"), settings, grid=12)
    assert str(plan[0]) == "method none, ratio 1"
    pruning = [name for name in METHODS if name not in ("none", "random")]
    for method in pruning:
        chosen = [variant for variant in plan if variant.method == method]
        assert [variant.ratio for variant in chosen] == [HALF, Fraction(1, 9)]
        assert [variant.settings for variant in chosen] == [
            VisualTokenPruningConfig(method=method, retention_ratio=ratio) for ratio in (0.5, 1 / 9)
        ]
    drawn = [(variant.ratio, variant.seed, variant.settings.seed) for variant in plan if variant.method == "random"]
    assert drawn == [(ratio, seed, seed) for ratio in (HALF, Fraction(1, 9)) for seed in (0, 1, 2)]
    assert [variant.grid for variant in plan if variant.method == "downsample"] == [8, 4]
    assert [variant.method for variant in plan].count("base-only") == 1
    assert len(plan) == 1 + 2 * len(pruning) + 6 + 2 + 1
    # At a ratio of 1 every method is the unpruned model.
    assert len(planned_variants(COMPARED, parsed_ratios("1"), settings, grid=12)) == 2


def test_a_plan_varies_weights_and_positions():
    names = chosen_weights_and_positions("both, positions,published,weights")
    assert names == ("published", "weights", "positions", "both")
    changes = ["uniform.token_weights=inclusion", "uniform.weight_strength=0.5"]
    settings = settings_of_methods(("none", "uniform", "random"), VisualTokenPruningConfig(), changes, names)
    plan = planned_variants(("none", "uniform", "random", "base-only"), (HALF,), settings, 12, names)
    uniform = [variant for variant in plan if variant.method == "uniform"]
    # The weights that the settings name, and else "cluster_size".
    assert [(one.settings.token_weights, one.settings.positions) for one in uniform] == [
        *(("none", "packed"), ("inclusion", "packed"), ("none", "original"), ("inclusion", "original"))
    ]
    assert {one.settings.weight_strength for one in uniform} == {0.5}
    assert [one.weights_and_positions for one in uniform] == list(names)
    assert str(uniform[3]) == "method uniform, ratio 0.5, weights and positions: both"
    random = [(one.settings.token_weights, one.settings.positions, one.seed) for one in plan if one.method == "random"]
    told = [("none", "packed"), ("cluster_size", "packed"), ("none", "original"), ("cluster_size", "original")]
    assert random == [(*pair, seed) for pair in told for seed in (0, 1, 2)]
    assert len({variant.group for variant in plan}) == 1 + 4 + 4 + 1
    assert [variant.weights_and_positions for variant in plan if variant.settings is None] == ["published"]


def test_weights_and_positions_that_cannot_be_are_refused():
    assert chosen_weights_and_positions(None) is None
    with pytest.raises(ValueError, match="`--weights-and-positions` is 'both,packed', in which 'packed' is unknown"):
        chosen_weights_and_positions("both,packed")
    changes = ["uniform.positions=original"]
    assert settings_of_methods(("uniform",), VisualTokenPruningConfig(), changes)["uniform"].positions == "original"
    with pytest.raises(ValueError, match="the run itself varies 'positions'; give `--weights-and-positions`"):
        settings_of_methods(("uniform",), VisualTokenPruningConfig(), changes, ("both",))


@given(st.integers(1, 60), st.fractions(0, 1).filter(lambda ratio: 0 < ratio < 1))
def test_shrunken_tiles_are_the_largest_that_fit(grid, ratio):
    side = shrunken_grid(grid, ratio)
    assert side == 1 or side * side <= ratio * grid * grid
    assert (side + 1) ** 2 > ratio * grid * grid


def test_equal_shrunken_tiles_run_once():
    plan = planned_variants(("none", "downsample"), parsed_ratios("0.3,0.28,0.1"), {}, grid=8)
    assert [(float(variant.ratio), variant.grid) for variant in plan[1:]] == [(0.3, 4), (0.1, 2)]


def test_settings_are_the_checkpoints_where_it_is_its_own_method():
    own = VisualTokenPruningConfig(method="hiprune", alpha=0.2, keep_newlines=False, token_budget=30)
    settings = settings_of_methods(("none", "hivtp", "hiprune", "base-only"), own, ["hivtp.importance_start_layer=2"])
    assert list(settings) == ["hivtp", "hiprune"]
    assert settings["hivtp"] == VisualTokenPruningConfig(importance_start_layer=2)
    assert settings["hiprune"] == own
    (_, variant) = planned_variants(("none", "hiprune"), (HALF,), settings, 8)
    expected = VisualTokenPruningConfig(method="hiprune", alpha=0.2, keep_newlines=False, retention_ratio=0.5)
    assert variant.settings == expected


def test_values_are_read_by_their_kind():
    changes = ["hiprune.alpha=0.3", "hiprune.published_borders=True", "hiprune.deep_layer=none", "hiprune.object_layer= 3"]
    (settings,) = settings_of_methods(("hiprune",), VisualTokenPruningConfig(), changes).values()
    assert settings == VisualTokenPruningConfig(method="hiprune", alpha=0.3, published_borders=True, object_layer=3)
    # A word is a value where the method's own setting takes words.
    (settings,) = settings_of_methods(("spread",), VisualTokenPruningConfig(), ["spread.score=features"]).values()
    assert settings == VisualTokenPruningConfig(method="spread", score="features")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("alpha=0.3", "must be METHOD.NAME=VALUE"),
        ("gprune.iterations=3", "'gprune' is no method with settings that is compared"),
        ("hiprune.retention_ratio=0.3", "give `--ratios`"),
        ("random.seed=5", "seeds"),
        ("hiprune.alpha=much", "must be a number, layers such as 7.15, true, false or none"),
        ("hiprune.alpha=3", "`alpha` is 3"),
        ("hiprune.aplha=0.3", "Did you mean `alpha`"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings_of_methods(("none", "hiprune", "random"), VisualTokenPruningConfig(), [change])


def test_questions_about_an_image_belong_together():
    rows = [Row(Image.new("RGB", (2, 2)), name, "?", "yes") for name in ("a", "b", "a", "c", "b", "a")]
    a, b, c = ImageGroup("a", (0, 2, 5)), ImageGroup("b", (1, 4)), ImageGroup("c", (3,))
    assert checked_data("data", rows, None).parts(2) == [[a, b], [c]]


@pytest.fixture
def four_rows():
    """Four questions about two images, and what four variants answered; the images have 100 and 300 patch tokens."""
    picture = Image.new("RGB", (3, 2))
    data = checked_data(
        "four",
        [
            Row(picture, "small", "Colour?", "red", "colour"),
            Row(picture, "large", "Colour?", "Blue", "colour"),
            Row(picture, "large", "How many?", "two", "count"),
            Row(picture, "large", "And here?", "one", "count"),
        ],
        None,
    )
    none = VisualTokenPruningConfig(method="none")
    plan = [
        Variant("none", Fraction(1), none),
        *(Variant("random", HALF, VisualTokenPruningConfig(method="random", seed=seed), seed) for seed in (0, 1)),
        Variant("base-only", None),
    ]
    table = [
        VariantAnswers(
            ["red", "blue.", "three", "one"], [100, 300, 300, 300], [5, 7, 7, 7], [105, 307, 307, 307], [0.004, 0.006, 0.1]
        ),
        VariantAnswers(["Red", "red", "two", "one"], [50, 150, 150, 150], [5, 7, 7, 7], [55, 157, 157, 157], [0.001, 0.003]),
        VariantAnswers(["", "blue", "three", "two"], [50, 150, 150, 150], [5, 7, 7, 7], [40.5, 100, 100, 100], [0.002, 0.008]),
        VariantAnswers(["red", "blue", "three", "one"], [40, 40, 40, 40], [0, 0, 0, 0], [40, 40, 40, 40], [0.0015]),
    ]
    return data, plan, table


def test_metrics_are_counted_by_method_ratio_and_type(four_rows):
    metrics = {(row.method, row.question_type): row for row in metrics_rows(*four_rows)}
    assert [question_type for _, question_type in metrics] == ["all", "colour", "count"] * 3
    none = metrics["none", "all"]
    assert (none.ratio, none.n, none.correct, none.accuracy, none.agreement) == (1, 4, 3, 0.75, 1)
    assert (none.patch_tokens, none.newline_tokens, none.prefill_ms) == (250, 6.5, 6)
    drawn = metrics["random", "all"]
    # Both seeds together: right are three of the first and one of the second.
    assert (drawn.ratio, drawn.n, drawn.correct, drawn.accuracy) == (0.5, 8, 4, 0.5)
    assert (drawn.agreement, drawn.ci_low, drawn.ci_high) == (4 / 8, *wilson_interval(4, 8))
    assert drawn.prefill_ms == pytest.approx(2.5)
    assert metrics["random", "count"].prefill_ms == drawn.prefill_ms
    assert (metrics["random", "count"].n, metrics["random", "count"].correct) == (4, 2)
    assert (metrics["random", "colour"].patch_tokens, metrics["random", "colour"].newline_tokens) == (100, 6)
    # The share of all images' tokens, each image once: 80 of 400.
    assert {metrics["base-only", kind].ratio for kind in ("all", "colour", "count")} == {0.2}
    assert metrics["base-only", "all"].patch_tokens == 40
    assert metrics["random", "colour"].tokens_per_layer == (55 + 157 + 40.5 + 100) / 4


def test_files_have_the_columns_that_readers_count_on(four_rows, tmp_path):
    metrics = metrics_rows(*four_rows)
    write_metrics(tmp_path / "metrics.csv", metrics)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == (
        "method,ratio,question_type,n,correct,accuracy,ci_low,ci_high,patch_tokens,newline_tokens,agreement,"
        "prefill_ms,weights_and_positions,tokens_per_layer"
    )
    low, high = wilson_interval(3, 4)
    assert lines[1] == f"none,1,all,4,3,0.75,{low:.6g},{high:.6g},250,6.5,1,6,published,256.5"
    assert len(lines) == 1 + 9
    write_predictions(tmp_path / "predictions.csv", *four_rows)
    with open(tmp_path / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 16
    assert list(predictions[6].values()) == [
        *(
            "2",
            "large",
            "colour",
            "Colour?",
            "Blue",
            "random",
            "0.5",
            "1",
            "blue",
            "1",
            "1",
            "150",
            "7",
            "published",
            "100",
            "0.5",
        )
    ]
    assert {line["method"]: line["asked_ratio"] for line in predictions} == {"none": "1", "random": "0.5", "base-only": ""}
    by_row = [(line["row"], line["method"], line["seed"]) for line in predictions]
    assert by_row == sorted(by_row, key=lambda line: int(line[0]))


@pytest.mark.parametrize("answer", ["a\rb", "a\nb", "\r\n", 'a "b", c'])
def test_any_answer_can_be_read_again(four_rows, tmp_path, answer):
    data, plan, table = four_rows
    table[0].answers[0] = answer
    write_predictions(tmp_path / "predictions.csv", data, plan, table)
    with open(tmp_path / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 16
    assert predictions[0]["prediction"] == answer
    assert (tmp_path / "predictions.csv").read_bytes().partition(b"\n")[0].endswith(b"asked_ratio")


def test_parts_come_together_in_the_order_of_the_rows():
    plan = [Variant("none", Fraction(1))]
    parts = [[ImageGroup("a", (0, 3)), ImageGroup("b", (1,))], [ImageGroup("c", (2,))]]
    results = {
        1: [{"answers": ["c2"], "patches": [30], "newlines": [3], "tokens_per_layer": [33], "prefill_seconds": [0.3]}],
        0: [
            {
                "answers": ["a0", "a3", "b1"],
                "patches": [10, 20],
                "newlines": [1, 2],
                "tokens_per_layer": [11, 22],
                "prefill_seconds": [0.1, 0.2],
            }
        ],
    }
    (whole,) = answers_of_variants(plan, parts, results)
    assert whole == VariantAnswers(["a0", "b1", "c2", "a3"], [10, 20, 30, 10], [1, 2, 3, 1], [11, 22, 33, 11], [0.1, 0.2, 0.3])
