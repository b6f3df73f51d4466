"""What explains a run: its answers read back, what methods keep of shapes, and pictures of failures."""

import csv
import json
import statistics

import pytest
from PIL import Image

from examples.shapes_vqa.reference import CHECKPOINT
from examples.shapes_vqa.vocabulary import COUNTS
from hivtp_hf.evaluation import evaluate_checkpoint
from research.shapes_vqa import failures, kept_shapes
from research.shapes_vqa.dense_targets import dense_targets
from research.shapes_vqa.recorded_runs import UNPRUNED, Chosen, RecordedRun, kept_of_scenes
from research.shapes_vqa.references import REFERENCES

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


def test_answers_and_tokens_are_those_of_the_run(folder, run):
    kept = dict(kept_of_scenes(dict(sorted(run.scenes.items())[:SCENES]), run.settings))
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as table:
        lines = [line for line in csv.DictReader(table) if line["method"] != "base-only" and line["seed"] in ("", "0")]
    assert {chosen.method for chosen in run.settings} == {"hivtp", "random"}
    assert run.settings[HIVTP].importance_start_layer == 4  # as the checkpoint names it
    assert len(lines) == sum(map(len, run.answers))
    for line in lines:
        asked, answers = run.asked[int(line["row"]) - 1], run.answers[int(line["row"]) - 1]
        (chosen,) = (one for one in answers if (one.method, f"{one.ratio:.6g}") == (line["method"], line["ratio"]))
        assert asked.question.text == line["question"]
        assert answers[chosen] == (line["prediction"], line["correct"] == "1")
        if chosen != WHOLE and asked.number in kept:
            assert len(kept[asked.number][chosen][1]) == int(line["patch_tokens"]) + int(line["newline_tokens"])


def test_kept_shapes_equal_plain_loops(run):
    scenes = dict(list(run.scenes.items())[:SCENES])
    kept, found = dict(kept_of_scenes(scenes, run.settings)), kept_shapes.kept_shapes(run, SCENES)
    for chosen in run.settings:
        lost, of_shape, on_shapes = [], [], []
        for number, of_methods in kept.items():
            indices = set(of_methods[chosen][1].tolist())
            scene = scenes[number]
            targets = dense_targets(scene, REFERENCES["shapes-llava-next"].layout_of(None, scene.height, scene.width))
            cells = list(zip(targets.positions.tolist(), targets.shape.tolist(), strict=True))
            of_shape += [position in indices for position, shape in cells if shape >= 0]
            on_shapes += [shape >= 0 for position, shape in cells if position in indices]
            for shape in range(len(scenes[number].shapes)):
                lost.append(not any(position in indices for position, other in cells if other == shape))
        assert found[chosen] == pytest.approx(tuple(map(statistics.fmean, (lost, of_shape, on_shapes))))
    assert found[HIVTP].lost < found[RANDOM].lost


def test_the_table_counts_what_is_miscounted(folder, run, run_main):
    errors = kept_shapes.count_errors(run)
    for chosen in run.settings:
        low = high = number = 0
        for asked, answers in zip(run.asked, run.answers, strict=True):
            if asked.question.type == "count" and answers[WHOLE].correct:
                number += 1
                said, right = answers[chosen].prediction.strip(), asked.question.answer
                low += said in COUNTS and COUNTS.index(said) < COUNTS.index(right)
                high += said in COUNTS and COUNTS.index(said) > COUNTS.index(right)
        assert errors[chosen] == pytest.approx((low / number, high / number))
    assert any(sum(of_method) for of_method in errors.values())
    printed = run_main(kept_shapes.main, folder, "--scenes", 3).stdout.strip()
    assert printed == kept_shapes.table_text(kept_shapes.kept_shapes(run, 3), errors)


def test_pictures_of_failures(folder, run, tmp_path, run_main):
    asked = (folder, tmp_path / "new", "--method", "random", "--ratio", 1 / 18, "--number", 1)
    printed = run_main(failures.main, *asked).stdout.splitlines()
    failed = list(failures.failed_questions(run, RANDOM, 1))
    types = [run.asked[index].question.type for index in failed]
    assert len(set(types)) == len(types) > 2
    for index, line in zip(failed, printed, strict=True):
        assert run.answers[index][WHOLE].correct
        assert not run.answers[index][RANDOM].correct
        path, _, said = line.partition(": ")
        question = run.asked[index].question
        assert said == f"{question.text} {question.answer}, not {run.answers[index][RANDOM].prediction}"
        with Image.open(path) as picture:
            assert picture.width > 300


def test_what_is_no_such_run_is_refused(folder, tmp_path, run_main):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["data"]["name"] = "mine"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "it lacks predictions.csv" in run_main(kept_shapes.main, tmp_path).stderr
    (tmp_path / "predictions.csv").write_bytes((folder / "predictions.csv").read_bytes())
    assert "a run on 'mine'" in run_main(failures.main, tmp_path, tmp_path / "new").stderr
    config["data"]["name"], config["weights_and_positions"] = "shapes-vqa", {"hivtp": ["published", "both"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "a run with several `--weights-and-positions`" in run_main(kept_shapes.main, tmp_path).stderr
    ended = run_main(failures.main, folder, tmp_path / "new", "--method", "hivtp", "--ratio", 0.3)
    assert ended.returncode == 1
    assert "it has hivtp at 0.5, hivtp at 0.05556, random at" in ended.stderr
    assert not (tmp_path / "new").exists()
