"""The trials of a search: what is drawn next, again and again the same."""

import logging

import optuna
import pytest

from hivtp_hf.tuning.search_space import Parameter
from hivtp_hf.tuning.study import Study, Trial

pytestmark = pytest.mark.once

PARAMETERS = (Parameter("x", -2, 2), Parameter("n", 0, 9, is_whole=True), Parameter("word", choices=("a", "b")))


def value_at(point):
    """Best at x = 1, n = 7; the word plays no part. Beyond x = 1.2 there is nothing."""
    return None if point["x"] > 1.2 else -((point["x"] - 1) ** 2) - (point["n"] - 7) ** 2 / 30


def run(study, number, until_finished=True):
    while len(study.finished if until_finished else study.trials) < number:
        point = study.next_point()
        value = value_at(point)
        reason = "x is too large." if value is None else None
        study.trials.append(Trial(point, {"x": point["x"]}, value, 1.0, 0.0, reason))
    return study


def points(study):
    return [trial.point for trial in study.trials]


def test_a_seed_means_a_study():
    first = run(Study(PARAMETERS, 3), 14)
    again = Study(PARAMETERS, 3)
    again.trials = list(first.trials[:5])  # interrupted, and gone on with
    assert points(run(again, 14)) == points(first)
    assert points(run(Study(PARAMETERS, 4), 14)) != points(first)


def test_it_learns():
    study = run(Study(PARAMETERS, 0), 25)
    assert study.best.point["n"] == 7
    assert abs(study.best.point["x"] - 1) < 0.2
    at_random = [trial.value for trial in study.finished[:10]]
    assert max(at_random) < study.best.value
    # What means nothing is rejected, and the sampler stays away from it.
    late = study.trials[-12:]
    assert sum(trial.value is None for trial in late) <= 4
    assert any(trial.value is None for trial in study.trials)


def test_importance_is_of_what_matters():
    study = run(Study(PARAMETERS, 0), 30)
    importance = study.importance()
    assert sum(importance.values()) == pytest.approx(1)
    assert min(importance, key=importance.get) == "word"
    assert list(importance.values()) == sorted(importance.values(), reverse=True)
    assert run(Study(PARAMETERS, 0), 9).importance() == {}


def test_nothing_is_tried_twice():
    study = Study((Parameter("n", 0, 12, is_whole=True),), 0)
    while (point := study.next_point()) is not None:
        study.trials.append(Trial(point, {}, float(point["n"] % 5), 1.0, 0.0))
    assert sorted(point["n"] for point in points(study)) == list(range(13))


def test_optuna_reads_what_is_saved(tmp_path):
    study = run(Study(PARAMETERS, 1), 12)
    study.trials.insert(0, Trial(None, {"x": 0}, 0.0, 1.0, 0.0))  # a start that no point means is not among them
    study.save(tmp_path / "study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    read = optuna.load_study(study_name="hivtp", storage=storage)
    assert [trial.params for trial in read.trials] == points(study)[1:]
    assert [trial.state.name == "PRUNED" for trial in read.trials] == [trial.value is None for trial in study.trials[1:]]
    assert read.best_value == max(trial.value for trial in study.finished[1:])


def test_optuna_stays_as_it_was(caplog):
    before = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    with caplog.at_level(logging.INFO):
        run(Study(PARAMETERS, 0), 11)
    optuna.logging.disable_propagation()
    assert optuna.logging.get_verbosity() == before
    assert not caplog.records
