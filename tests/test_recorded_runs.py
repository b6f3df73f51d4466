"""What explains a run: its answers read back, what methods keep of shapes, and pictures of failures."""

import csv
import json
import statistics
import sys

import pytest
from PIL import Image

from examples.shapes_vqa.reference import CHECKPOINT
from examples.shapes_vqa.vocabulary import COUNTS
from hivtp_hf.evaluation import evaluate_checkpoint
from research.shapes_vqa import failures, kept_shapes
from research.shapes_vqa.dense_targets import dense_targets
from research.shapes_vqa.kept_shapes import count_errors, table_text
from research.shapes_vqa.recorded_runs import UNPRUNED, Chosen, RecordedRun, kept_of_scenes

pytestmark = pytest.mark.once

HIVTP, RANDOM = Chosen("hivtp", 1 / 18), Chosen("random", 1 / 18)
WHOLE = Chosen(UNPRUNED, 1.0)
SCENES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = {"methods": "hivtp,random,base-only", "ratios": "1,1/2,1/18", "questions": 36, "dtype": "float32"}
    return evaluate_checkpoint(str(CHECKPOINT), output=tmp_path_factory.mktemp("runs"), **settings).folder


@pytest.fixture(scope="module")
def run(folder):
    return RecordedRun(folder)


@pytest.fixture(scope="module")
def lines(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.fixture(scope="module")
def kept(run):
    scenes = {asked.number: asked.scene for asked in reversed(run.asked)}
    return dict(kept_of_scenes({number: scenes[number] for number in sorted(scenes)[:SCENES]}, run.settings))


def test_answers_are_those_of_the_table(run, lines):
    assert [asked.question.text for asked in run.asked] == [line["question"] for line in lines if line["method"] == UNPRUNED]
    assert {chosen.method for chosen in run.settings} == {"hivtp", "random"}
    assert all(set(answers) == {WHOLE, *run.settings} for answers in run.answers)
    for chosen, seed in ((HIVTP, ""), (RANDOM, "0"), (WHOLE, "")):
        mine = [
            (line["prediction"], line["correct"] == "1")
            for line in lines
            if (line["method"], line["ratio"], line["seed"]) == (chosen.method, f"{chosen.ratio:.6g}", seed)
        ]
        assert mine == [answers[chosen] for answers in run.answers]
    assert run.settings[HIVTP].importance_start_layer == 4  # as the checkpoint names it
    assert run.settings[RANDOM].seed == 0


def test_as_many_tokens_are_kept_as_in_the_run(run, lines, kept):
    assert len(kept) == SCENES
    for line in lines:
        chosen = next((chosen for chosen in run.settings if f"{chosen.ratio:.6g}" == line["ratio"]), None)
        number = int(line["image"].removeprefix("test-"))
        if chosen is None or line["method"] not in ("hivtp", "random") or number not in kept:
            continue
        _, indices = kept[number][Chosen(line["method"], chosen.ratio)]
        assert len(indices) == int(line["patch_tokens"]) + int(line["newline_tokens"])


def test_kept_shapes_equal_plain_loops(run, kept):
    found = kept_shapes.kept_shapes(run, SCENES)
    assert set(found) == set(run.settings)
    scenes = {asked.number: asked.scene for asked in run.asked}
    for chosen in run.settings:
        lost, of_shape, on_shapes = [], [], []
        for number, of_methods in kept.items():
            indices = set(of_methods[chosen][1].tolist())
            targets = dense_targets(scenes[number])
            cells = list(zip(targets.positions.tolist(), targets.shape.tolist(), strict=True))
            of_shape += [position in indices for position, shape in cells if shape >= 0]
            on_shapes += [shape >= 0 for position, shape in cells if position in indices]
            for shape in range(len(scenes[number].shapes)):
                lost.append(not any(position in indices for position, other in cells if other == shape))
        assert found[chosen] == pytest.approx(tuple(map(statistics.fmean, (lost, of_shape, on_shapes))))
    assert found[HIVTP].lost < found[RANDOM].lost
    assert found[HIVTP].on_shapes > 2 * found[RANDOM].on_shapes


def test_miscounts(run):
    errors = count_errors(run)
    for chosen in run.settings:
        low = high = number = 0
        for asked, answers in zip(run.asked, run.answers, strict=True):
            if asked.question.type == "count" and answers[WHOLE].correct:
                number += 1
                said, right = answers[chosen].prediction.strip(), asked.question.answer
                low += said in COUNTS and COUNTS.index(said) < COUNTS.index(right)
                high += said in COUNTS and COUNTS.index(said) > COUNTS.index(right)
        assert number
        assert errors[chosen] == pytest.approx((low / number, high / number))
    assert any(sum(of_method) for of_method in errors.values())


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_the_table(folder, run, monkeypatch, capsys):
    call(kept_shapes, monkeypatch, folder, "--scenes", 3)
    printed = capsys.readouterr().out.strip()
    assert printed == table_text(kept_shapes.kept_shapes(run, 3), count_errors(run))
    assert len(printed.splitlines()) == 2 + len(run.settings)


def test_pictures_of_failures(folder, run, tmp_path, monkeypatch, capsys):
    call(failures, monkeypatch, folder, tmp_path / "new", "--method", "random", "--ratio", 1 / 18, "--number", 1)
    printed = capsys.readouterr().out.splitlines()
    failed = list(failures.failed_questions(run, RANDOM, 1))
    assert len(failed) > 2
    types = [run.asked[index].question.type for index in failed]
    assert len(set(types)) == len(types)
    for index, line in zip(failed, printed, strict=True):
        assert run.answers[index][WHOLE].correct
        assert not run.answers[index][RANDOM].correct
        path, _, said = line.partition(": ")
        question = run.asked[index].question
        assert said == f"{question.text} {question.answer}, not {run.answers[index][RANDOM].prediction}"
        with Image.open(path) as picture:
            assert picture.width > 300
    assert len(list((tmp_path / "new").iterdir())) == len(failed)


@pytest.mark.parametrize("missing", ["config.json", "predictions.csv"])
def test_folders_that_are_no_run(missing, folder, tmp_path, monkeypatch, capsys):
    for name in {"config.json", "predictions.csv"} - {missing}:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=f"it lacks {missing}"):
        RecordedRun(tmp_path)
    for module, arguments in ((kept_shapes, ()), (failures, (tmp_path / "new",))):
        with pytest.raises(SystemExit, match="2"):
            call(module, monkeypatch, tmp_path, *arguments)
        assert f"it lacks {missing}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_runs_on_other_questions(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["data"]["name"] = "mine"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "predictions.csv").write_bytes((folder / "predictions.csv").read_bytes())
    with pytest.raises(ValueError, match="a run on 'mine'"):
        RecordedRun(tmp_path)


def test_methods_that_are_not_in_the_run(folder, tmp_path, monkeypatch, capsys):
    for arguments in (("--method", "gprune"), ("--method", "hivtp", "--ratio", 0.3)):
        with pytest.raises(SystemExit, match="2"):
            call(failures, monkeypatch, folder, tmp_path / "new", *arguments)
        assert "it has hivtp at 0.5, hivtp at 0.05556, random at" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
