"""`hivtp compare`: what one method wins and loses against another on the same questions."""

import csv
import json
import math

import pytest

from checkpoints import GEOMETRY
from evaluations import ROWS, data_folder, evaluated, table_of
from hivtp_hf.evaluation.paired_answers import Comparison, compared, mcnemar
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

HEADINGS = (
    *("row", "image", "question_type", "question", "answer", "method", "ratio", "seed", "correct", "patch_tokens"),
    *("newline_tokens", "weights_and_positions", "tokens_per_layer", "asked_ratio"),
)
TYPES = ("count", "count", "count", "shape", "colour")
# By method, way and the ratio that was asked for, whether five questions are answered rightly.
ANSWERS = {
    ("none", "published", "1"): "11110",
    ("hivtp", "published", "0.5"): "10010",
    ("hivtp", "both", "0.5"): "11100",
    ("hivtp", "both", "0.25"): "00001",
    ("uniform", "both", "0.5"): "01010",
    ("base-only", "published", ""): "00000",
    ("downsample", "published", "0.5"): "11111",
}
TOKENS = {"1": 100, "0.5": 50, "0.25": 25, "": 20}


def lines(answers=ANSWERS):
    for (method, told, asked), right in answers.items():
        ratio = {"base-only": "0.2", "downsample": "0.44"}.get(method, asked)
        for row, (correct, kind) in enumerate(zip(right, TYPES, strict=False), 1):
            tokens = TOKENS[asked]
            yield (
                *(str(row), "scene.png", kind, f"question {row}", "yes", method, ratio, "", correct, str(tokens - 5), "5"),
                *(told, str(tokens), asked),
            )


def run_of(folder, written, headings=HEADINGS):
    folder.mkdir()
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([headings, *written])
    return folder


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "run", lines())


def numbers(comparisons):
    return {
        (one.ratio, one.question_type): (one.n, one.right, one.against_right, one.won, one.lost, one.p) for one in comparisons
    }


def test_pairs_are_counted_by_ratio_and_type(run):
    said = []
    found = compared(run, "hivtp:both", ["hivtp"], say=said.append)
    assert found[0] == Comparison("0.5", "hivtp:both", "0.5", 50, "hivtp", "0.5", 50, "all", 5, 3, 2, 2, 1, 1)
    assert numbers(found) == {
        ("0.5", "all"): (5, 3, 2, 2, 1, 1),
        ("0.5", "count"): (3, 3, 1, 2, 0, 0.5),
        ("0.5", "shape"): (1, 0, 1, 0, 1, 1),
        ("0.5", "colour"): (1, 0, 0, 0, 0, 1),
    }
    assert said == ["Not compared, as only one of the two has it: hivtp:both at 0.25."]
    # The other way round.
    turned = numbers(compared(run, "hivtp", ["hivtp:both"], say=said.append))
    assert turned["0.5", "all"] == (5, 2, 3, 1, 2, 1)
    # One type, and the others together.
    apart = numbers(compared(run, "hivtp:both", ["hivtp"], question_type="count", say=said.append))
    assert apart == {
        **{kind: value for kind, value in numbers(found).items() if kind[1] in ("all", "count")},
        ("0.5", "others"): (2, 0, 1, 0, 1, 1),
    }


def test_methods_are_paired_by_the_ratio_that_was_asked_for(run):
    # Whatever share a smaller image has come to.
    (all_questions, *_) = compared(run, "hivtp", ["downsample"])
    assert (all_questions.asked_ratio, all_questions.ratio, all_questions.against_ratio) == ("0.5", "0.5", "0.44")
    # The unpruned model and the base tile stand against every ratio, on either side.
    for against, right in (("none", 4), ("base-only", 0)):
        found = [one for one in compared(run, "hivtp:both", [against]) if one.question_type == "all"]
        assert [(one.asked_ratio, one.against_right) for one in found] == [("0.5", right), ("0.25", right)]
        turned = [one for one in compared(run, against, ["hivtp:both"]) if one.question_type == "all"]
        assert [(one.asked_ratio, one.right, one.against_tokens) for one in turned] == [
            ("0.5", right, 50),
            ("0.25", right, 25),
        ]


def test_several_methods_and_the_only_way_of_one(run):
    found = compared(run, "none", ["hivtp", "uniform"])
    assert list(dict.fromkeys((one.method, one.against) for one in found)) == [("none", "hivtp"), ("none", "uniform:both")]


def test_without_methods_every_way_is_held_against_the_published_one(run, tmp_path):
    found = compared(run, say=lambda text: None)
    assert {(one.method, one.against) for one in found} == {("hivtp:both", "hivtp")}
    assert numbers(found) == numbers(compared(run, "hivtp:both", ["hivtp"], say=lambda text: None))
    # The published way may be of another run, which has more questions.
    both = run_of(tmp_path / "both", [line for line in lines() if "both" in line and line[0] != "5"])
    said = []
    of_two = compared(both, other_run=run, question_type="count", say=said.append)
    assert [one.n for one in of_two] == [4, 3, 1]
    assert "uniform:both, of which" in said[0]


def test_a_method_may_be_compared_with_itself_in_another_run(run, tmp_path):
    later = run_of(tmp_path / "later", lines({("hivtp", "published", "0.5"): "11110"}))
    (all_questions, *_) = compared(later, "hivtp", ["hivtp"], other_run=run)
    assert (all_questions.won, all_questions.lost) == (2, 0)
    with pytest.raises(ValueError, match="compared with itself"):
        compared(run, "hivtp", ["hivtp:published"])


def test_the_first_draw_is_compared(tmp_path):
    answers = {"0": "10010", "1": "11111"}
    drawn = [
        (*line[:5], "random", "0.5", seed, right[int(line[0]) - 1], *line[9:])
        for seed, right in answers.items()
        for line in lines({("hivtp", "published", "0.5"): "00000"})
    ]
    run = run_of(tmp_path / "run", [*lines(), *drawn])
    (all_questions, *_) = compared(run, "random", ["base-only"])
    assert (all_questions.n, all_questions.right) == (5, 2)


def test_runs_of_earlier_releases_have_fewer_columns(tmp_path):
    kept = [number for number, name in enumerate(HEADINGS) if name not in HEADINGS[-3:]]
    shorter = [[line[number] for number in kept] for line in lines() if line[5] != "downsample" and "both" not in line]
    run = run_of(tmp_path / "run", shorter, [HEADINGS[number] for number in kept])
    (all_questions, *_) = compared(run, "hivtp", ["none"])
    assert (all_questions.n, all_questions.tokens, all_questions.against_tokens) == (5, 50, 100)
    # Of smaller images they name the ratio that was measured alone; config.json has those that were asked for.
    measured = [line[:-1] for line in lines() if "both" not in line]
    measured += [(*line[:5], "downsample", "0.2", *line[7:]) for line in measured if line[5] == "downsample"]
    earlier = run_of(tmp_path / "earlier", measured, HEADINGS[:-1])
    with pytest.raises(ValueError, match=r"the ratios 0.5 and downsample for 0.44, 0.2, none of which is the same"):
        compared(earlier, "hivtp", ["downsample"])
    for ratios, pairs in (([1.0, 0.5, 0.25], [("0.5", "0.44")]), ([1.0, 0.7, 0.5], [("0.5", "0.2")])):
        (earlier / "config.json").write_text(json.dumps({"ratios": ratios}))
        found = compared(earlier, "hivtp", ["downsample"], say=lambda text: None)
        assert [(one.ratio, one.against_ratio) for one in found if one.question_type == "all"] == pairs


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    # scipy.stats.binomtest(won, won + lost).pvalue
    [(0, 0, 1), (3, 3, 1), (16, 5, 0.0266037), (5, 16, 0.0266037), (29, 8, 0.000752897), (0, 1, 1), (0, 6, 0.03125)],
)
def test_p_is_mcnemars(won, lost, p):
    assert math.isclose(mcnemar(won, lost), p, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}x", "hivtp", "none"], "is no finished run of `hivtp evaluate`: it has no predictions.csv"),
        (["{run}", "hivpt", "none"], "has no method 'hivpt'; give one of none, hivtp, uniform, base-only, downsample"),
        (["{run}", "hivtp:weights", "none"], "has no hivtp:weights; give one of hivtp:published, hivtp:both"),
        (["{run}", "hivtp"], "'hivtp' is to be compared with nothing"),
        (["{run}", "hivtp", "none", "--type", "number"], "has questions of the types: count, shape, colour"),
        (["{run}", "hivtp", "hivtp", "--other-run", "{other}"], "row 4 is 'question 4' about 'scene.png'"),
        (["{other}"], "has nothing to compare: no method has several ways"),
        (["{other}", "uniform", "hivtp"], "none of which is the same"),
        (["{run}", "hivtp", "none", "--output", "{run}/none/paired.csv"], "is no folder"),
        (["{run}", "hivtp", "none", "--output", "{run}/predictions.csv"], "exists already"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, tmp_path, hivtp, arguments, message):
    fewer = {("hivtp", "published", "0.5"): "100", ("uniform", "published", "0.25"): "100"}
    other, before = run_of(tmp_path / "other", lines(fewer)), (run / "predictions.csv").read_bytes()
    ended = hivtp("compare", *(argument.format(run=run, other=other) for argument in arguments))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert message in ended.stderr
    assert (run / "predictions.csv").read_bytes() == before


def test_an_unfinished_run_is_refused(run, hivtp):
    (run / "partial.jsonl").touch()
    assert "has not finished" in hivtp("compare", run, "hivtp", "none").stderr
    (run / "partial.jsonl").unlink()
    (run / "predictions.csv").write_text("row,method\n1,none\n")
    assert "lacks the columns image, question, answer, ratio, seed, correct" in hivtp("compare", run, "hivtp", "none").stderr


def test_it_prints_a_table_or_writes_one(run, tmp_path, hivtp, monkeypatch):
    shown = hivtp("compare", run, "hivtp:both", "hivtp", "none")
    assert shown.returncode == 0, shown.stderr
    assert "hivtp:both against hivtp\n" in shown.stdout
    rows = [" ".join(line.split()) for line in shown.stdout.splitlines() if " all " in line]
    assert rows[0] == "0.5 50 / 50 all 5 60.0 / 40.0 2 / 1 1"
    assert rows[1] == "0.5 50 / 100 all 5 60.0 / 80.0 0 / 1 1"
    assert "…" not in shown.stdout
    table = tmp_path / "paired.csv"
    assert hivtp("compare", run, "hivtp:both", "hivtp", "--output", table).returncode == 0
    assert table_of(table)[0] == dict(
        zip(Comparison._fields, ["0.5", "hivtp:both", "0.5", "50", "hivtp", "0.5", "50", "all", *"532211"], strict=True)
    )
    assert "--force" in hivtp("compare", run, "hivtp", "none", "--output", table).stderr
    assert hivtp("compare", run, "hivtp", "none", "--output", table, "--force").returncode == 0
    assert {line["against"] for line in table_of(table)} == {"none"}


def test_what_evaluate_writes_can_be_compared(tmp_path):
    stock = build_stock_checkpoint(tmp_path / "stock", **GEOMETRY)
    methods = {"methods": "uniform,random,base-only,downsample", "ratios": "1/2,1/9"}
    run = evaluated(stock, data_folder(tmp_path / "data"), tmp_path / "runs", **methods)
    right = {(row.method, row.ratio, row.question_type): row.correct for row in run.metrics if row.method != "random"}
    found = compared(run.folder, "uniform", ["random", "base-only", "downsample", "none"])
    assert len(found) == 4 * 2 * 3
    for one in found:
        exact = {f"{ratio:.6g}": ratio for _, ratio, _ in right}
        assert one.right == right["uniform", exact[one.ratio], one.question_type]
        if one.against != "random":
            assert one.against_right == right[one.against, exact[one.against_ratio], one.question_type]
        assert one.n == (len(ROWS) if one.question_type == "all" else 2)
    assert not compared(run.folder, "none", ["none"], other_run=run.folder)[0].won
