"""`benchmarks.accuracy.paired`: what one way wins and loses against another on the same questions."""

import csv
import math

import pytest

from benchmarks.accuracy import paired

pytestmark = pytest.mark.once

HEADINGS = ("row", "question_type", "method", "ratio", "seed", "correct", "weights_and_positions")
# By way, whether five questions are answered rightly: three counts, two of another type.
ANSWERS = {"published": "10010", "both": "11100"}


def lines():
    yield ("1", "count", "none", "1", "", "1", "published")
    for method, seeds in (("hivtp", [""]), ("random", ["0", "1"])):
        for way, answers in ANSWERS.items():
            for seed in seeds:
                for row, correct in enumerate(answers, 1):
                    # A second draw, which is left out.
                    correct = "1" if seed == "1" else correct
                    yield (str(row), "count" if row < 4 else "shape", method, "0.5", seed, correct, way)


def test_pairs_are_counted(tmp_path, run_main):
    with (tmp_path / "predictions.csv").open("w", newline="") as table:
        csv.writer(table).writerows([HEADINGS, *lines()])
    printed = list(csv.DictReader(run_main(paired.main, tmp_path).stdout.splitlines()))
    numbers = {"all": "5,3,2,2,1,1", "count": "3,3,1,2,0,0.5", "others": "2,0,1,0,1,1"}
    assert [",".join(line.values()) for line in printed] == [
        f"{method},0.5,both,{kind},{counted}" for method in ("hivtp", "random") for kind, counted in numbers.items()
    ]


def test_the_published_way_may_be_of_another_run(tmp_path, run_main):
    whole, others, published = tmp_path / "whole", tmp_path / "others", tmp_path / "published"
    more = ("6", "count", "hivtp", "0.5", "", "1", "published")
    parts = {
        whole: list(lines()),
        others: [line for line in lines() if line[-1] == "both"],
        published: [*(line for line in lines() if line[-1] == "published"), more],
    }
    for folder, written in parts.items():
        folder.mkdir()
        with (folder / "predictions.csv").open("w", newline="") as table:
            csv.writer(table).writerows([(*HEADINGS, "question"), *((*line, f"question {line[0]}") for line in written)])
    together = run_main(paired.main, others, "--published", published).stdout
    assert "both" in together
    assert together == run_main(paired.main, whole).stdout
    assert "not asked the same questions" in run_main(paired.main, published, "--published", others).stderr


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    # scipy.stats.binomtest(won, won + lost).pvalue
    [(0, 0, 1), (3, 3, 1), (16, 5, 0.0266037), (5, 16, 0.0266037), (29, 8, 0.000752897), (0, 1, 1), (0, 6, 0.03125)],
)
def test_p_is_mcnemars(won, lost, p):
    assert math.isclose(paired.mcnemar(won, lost), p, rel_tol=1e-5)


def test_runs_without_pairs_are_refused(tmp_path, run_main):
    assert "No such file" in run_main(paired.main, tmp_path).stderr
    with (tmp_path / "predictions.csv").open("w", newline="") as table:
        csv.writer(table).writerows([HEADINGS, ("1", "count", "hivtp", "0.5", "", "1", "published")])
    assert "nothing to compare. Give one of" in run_main(paired.main, tmp_path).stderr
