"""examples/lmms_eval_table.py: what it makes of the files that lmms-eval writes."""

import json

import pytest

from lmms_eval_table import runs_in, table

pytestmark = pytest.mark.once


def write_run(folder, name, results, tokens=None, date="20260101"):
    own = folder / name / "model"
    own.mkdir(parents=True, exist_ok=True)
    kinds = ("patch", "newline", "class")
    throughput = {} if tokens is None else {f"avg_retained_{kind}_tokens": n for kind, n in zip(kinds, tokens, strict=True)}
    written = {"results": results, "throughput": throughput}
    (own / f"{date}_results.json").write_text(json.dumps(written), encoding="utf-8")


def scores(perception, cognition, accuracy):
    mme = {"mme_perception_score,none": perception, "mme_cognition_score,none": cognition, "mme_cognition_score_stderr,none": 1}
    return {"mme": mme, "gqa": {"exact_match,none": accuracy, "alias": "gqa"}}


def test_every_run_stands_beside_stock(tmp_path):
    write_run(tmp_path, "hivtp-2of9", scores(1200.0, 240.0, 0.54), (512, 36, 0))
    write_run(tmp_path, "blind", scores(600.0, 150.0, 0.3), (0, 0, 0))
    write_run(tmp_path, "stock", scores(1.0, 1.0, 0.1), (2304, 36, 0), date="20250101")
    write_run(tmp_path, "stock", scores(1200.0, 300.0, 0.6), (2304, 36, 0))
    (tmp_path / "unfinished").mkdir()
    assert table(runs_in(tmp_path)).splitlines() == [
        "| run | tokens | mme | gqa | mean |",
        "|---|---|---|---|---|",
        "| stock | 2340 | 1500 (100.0%) | 0.6 (100.0%) | 100.0% |",
        "| blind | 0 | 750 (50.0%) | 0.3 (50.0%) | 50.0% |",
        "| hivtp-2of9 | 548 | 1440 (96.0%) | 0.54 (90.0%) | 93.0% |",
    ]


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    write_run(tmp_path, "random", scores(1.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="no results of a run called 'stock'"):
        runs_in(tmp_path)
    write_run(tmp_path, "stock", {"gqa": {"exact_match,none": 0.5}})
    with pytest.raises(ValueError, match="random has the tasks mme, gqa; stock has gqa"):
        table(runs_in(tmp_path))
    write_run(tmp_path, "stock", {"gqa": {"accuracy,none": 0.5}})
    with pytest.raises(ValueError, match="has no number 'exact_match', only accuracy,none"):
        runs_in(tmp_path)
    write_run(tmp_path, "stock", {"chess": {"accuracy,none": 0.5}})
    with pytest.raises(ValueError, match="the task 'chess' has no score here; known are mme,"):
        runs_in(tmp_path)
