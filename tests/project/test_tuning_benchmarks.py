"""What is committed beside docs/tuning.md can be made again."""

import csv

import pytest

from benchmarks.tuning import __main__ as objectives
from benchmarks.tuning import held_out

pytestmark = pytest.mark.once


def table_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_objectives_beside_right_answers(tmp_path):
    objectives.main(tmp_path, settings=3, questions=6, images=5, ratio="1/9")
    values = table_of(tmp_path / "values.csv")
    assert [row["settings"] for row in values] == ["unpruned", "default", "checkpoint's own", "1", "2", "3"]
    assert {row["questions"] for row in values} == {"6"}
    assert all(0 <= int(row["right"]) <= 6 for row in values)
    assert len({row["state_5"] for row in values[1:]}) == 5
    correlations = table_of(tmp_path / "correlations.csv")
    assert [(row["objective"], row["images"], row["groups"]) for row in correlations] == [
        (name, "5", "1") for name in ("state", "answer", "next-token")
    ]


def test_a_rank_correlation_is_of_groups_that_do_not_meet():
    values = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]
    assert objectives.correlations(values, [10, 20, 30], 1) == pytest.approx([1, -1])


def test_held_out_answers_are_paired(tmp_path, monkeypatch):
    names = ("hivtp, 6 to 8, the default", "hivtp, 4 to 6, by labels")
    monkeypatch.setattr(held_out, "SETTINGS", {name: held_out.SETTINGS[name] for name in names})
    monkeypatch.setattr(held_out, "PAIRS", (names,))
    held_out.main(tmp_path, questions=18)
    answers, paired = table_of(tmp_path / "answers.csv"), table_of(tmp_path / "paired.csv")
    assert len(answers) == 18
    won = sum(row[names[0]] > row[names[1]] for row in answers)
    right = sum(row[names[0]] == "1" for row in answers)
    assert (paired[0]["n"], paired[0]["won"], paired[0]["right"]) == ("18", str(won), str(right))
    assert [row["questions"] for row in paired] == ["all", "count", "others"]
    assert sum(int(row["n"]) for row in paired[1:]) == 18
