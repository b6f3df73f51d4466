"""lmms-eval's own command line with our models, on a local task: answers, results, failures, several processes."""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.lmms_eval_task import write_task
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf import HIVTPLlavaNextProcessor, VisualTokenPruningConfig
from hivtp_hf.evaluation import evaluate_checkpoint
from lmms_eval_runs import EXACT, QUESTIONS, ROOT, run_lmms_eval

# One image size has a placeholder more than the model keeps tokens.
PLANTED = """
import sys

from hivtp_hf import HIVTPLlavaNextProcessor

counted = HIVTPLlavaNextProcessor._get_number_of_features

def miscounted(self, height, width, *rest):
    return counted(self, height, width, *rest) + ((height, width) == {size})

HIVTPLlavaNextProcessor._get_number_of_features = miscounted
from lmms_eval.cli.dispatch import main

main()
"""


@pytest.fixture(scope="module")
def rows():
    return list(held_out_rows(QUESTIONS))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "shapes"
    write_task(folder, QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def pruned(task, tmp_path_factory):
    run = run_lmms_eval(
        task, tmp_path_factory.mktemp("pruned"), "hivtp_llava_next", f"{EXACT},retention_ratio=2/9", "--batch_size", "4"
    )
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    run = evaluate_checkpoint(
        str(CHECKPOINT),
        methods="hivtp",
        ratios="1,2/9",
        questions=QUESTIONS,
        dtype="float32",
        output=tmp_path_factory.mktemp("own"),
    )
    with open(run.folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers_under(evaluation, method):
    return [row["prediction"].strip() for row in evaluation if row["method"] == method]


def test_answers_are_those_of_hivtp_evaluate(pruned, evaluation):
    answers = pruned.answers()
    assert [answer.strip() for answer in answers] == answers_under(evaluation, "hivtp")
    assert answers_under(evaluation, "hivtp") != answers_under(evaluation, "none")
    scores = [float(row["correct"]) for row in evaluation if row["method"] == "hivtp"]
    assert pruned.results()["results"]["shapes_vqa"]["accuracy,none"] == pytest.approx(sum(scores) / len(scores))


def test_results_say_method_settings_and_tokens(pruned, evaluation, rows):
    written = pruned.results()["throughput"]
    own = VisualTokenPruningConfig.coerce(json.loads((CHECKPOINT / "config.json").read_text())["pruning_config"])
    settings = own.replace(retention_ratio=2 / 9).to_dict()
    assert settings.pop("stages") == []  # which says nothing
    # Results are numbers: words are names of their own.
    words = {f"{name}_{value}": 1 for name, value in settings.items() if isinstance(value, str)}
    numbers = {name: float(value) for name, value in settings.items() if value is not None and not isinstance(value, str)}
    expected = words | numbers
    assert {name: written[f"avg_{name}"] for name in expected} == pytest.approx(expected)
    of_method = [row for row in evaluation if row["method"] == "hivtp"]
    for name in ("patch", "newline"):
        mean = sum(int(row[f"{name}_tokens"]) for row in of_method) / len(of_method)
        assert written[f"avg_retained_{name}_tokens"] == pytest.approx(mean)
    stock = [int(row["patch_tokens"]) + int(row["newline_tokens"]) for row in evaluation if row["method"] == "none"]
    assert written["avg_stock_tokens"] == pytest.approx(sum(stock) / len(stock))
    assert (written["avg_rows"], written["avg_images"]) == (QUESTIONS, QUESTIONS)
    processor = HIVTPLlavaNextProcessor.from_pretrained(CHECKPOINT)
    for row, sample in zip(rows, pruned.samples(), strict=True):
        image = row.open_image()
        kept = processor.token_layout(image.height, image.width, retention_ratio=2 / 9).num_retained
        (counts,) = sample["token_counts"]
        assert kept < counts["input_tokens"] < kept + 40
        assert 1 <= counts["output_tokens"] <= 8


def launched(port, *what):
    """Two processes. accelerate has no other launcher for them on one machine, with accelerators or without."""
    return "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port), *what


@pytest.mark.nightly
def test_two_processes_answer_as_one(task, pruned, tmp_path, free_port):
    limit = ("--batch_size", "4", "--limit", "17")
    launcher = launched(free_port, "-m", "lmms_eval")
    run = run_lmms_eval(task, tmp_path, "hivtp_llava_next", f"{EXACT},retention_ratio=2/9", *limit, launcher=launcher)
    assert run.status == 0, run.output
    assert "Running on rank 1 " in run.output
    assert run.answers() == pruned.answers()[:17]
    written = run.results()["throughput"]
    # Of 17 rows one process gets 9, and the other has one asked twice to have as many.
    assert (written["avg_rows"], written["avg_images"]) == (17, 17)


def test_at_a_ratio_of_one_it_is_lmms_evals_own_model(task, evaluation, tmp_path):
    calls = {
        "own": ("llava_hf", f"{EXACT},device_map=cpu", "--batch_size", "1", "--device", "cpu"),
        "ours": ("hivtp_llava_next", f"{EXACT},retention_ratio=1", "--batch_size", "4"),
    }
    with ThreadPoolExecutor(2) as pool:
        own, ours = pool.map(lambda name: run_lmms_eval(task, tmp_path / name, *calls[name]), calls)
    assert own.status == ours.status == 0, own.output + ours.output
    assert ours.answers() == own.answers()
    assert [answer.strip() for answer in ours.answers()] == answers_under(evaluation, "none")


def test_a_mismatch_in_a_row_ends_the_run(task, rows, tmp_path):
    sizes = [row.open_image().size[::-1] for row in rows]
    size = sizes[7]
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(size=size))
    run = run_lmms_eval(task, tmp_path / "results", "hivtp_llava_next", EXACT, "--batch_size", "4", launcher=(str(program),))
    assert run.status == 1
    assert f"row {sizes.index(size)} of the task 'shapes_vqa' (split 'test'): ValueError: " in run.output
    assert "placeholders" in run.output
    assert not list(tmp_path.rglob("*_results.json"))


@pytest.mark.nightly
def test_a_mismatch_in_one_of_two_processes_ends_both(task, rows, tmp_path, free_port):
    sizes = [row.open_image().size[::-1] for row in rows]
    # Every other row goes to the first process.
    alone = next(size for size in sizes if len({index % 2 for index, other in enumerate(sizes) if other == size}) == 1)
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(size=alone))
    launcher = launched(free_port, str(program))
    run = run_lmms_eval(task, tmp_path / "results", "hivtp_llava_next", EXACT, "--batch_size", "4", launcher=launcher)
    assert run.status != 0
    assert "Running on rank 1 " in run.output
    assert f"row {sizes.index(alone)} of the task 'shapes_vqa' (split 'test'): ValueError: " in run.output
    assert not list(tmp_path.rglob("*_results.json"))


def test_an_argument_that_is_none_ends_the_run(task, tmp_path):
    run = run_lmms_eval(task, tmp_path, "hivtp_llava_next", f"pretrained={CHECKPOINT},retension_ratio=0.5")
    assert run.status == 1
    assert "Did you mean `retention_ratio`?" in run.output
    assert not list(tmp_path.rglob("*_results.json"))


@pytest.mark.nightly
def test_the_script_makes_the_table(task, tmp_path):
    """Of the local task, in place of the eight that need the network."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "huggingface"),
        "ACCELERATE_USE_CPU": "true",
        "TASKS": "shapes_vqa",
        "METHODS": "hivtp",
        "RATIOS": "2/9",
        "MORE": f"--include_path {task}",
    }
    command = ["bash", str(ROOT / "examples" / "lmms_eval.sh"), str(CHECKPOINT), "runs"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    runs = {line[0]: line for line in lines if line[0] in ("stock", "blind") or line[0].startswith("hivtp")}
    assert list(runs) == ["stock", "blind", "hivtp-2of9", "hivtp-2of9-both"]
    assert runs["stock"][2].endswith("(100.0%)")
    assert runs["blind"][1] == "0"
    assert float(runs["blind"][2].split()[0]) < float(runs["hivtp-2of9"][2].split()[0])
    assert 0 < float(runs["hivtp-2of9"][1]) < float(runs["stock"][1]) / 3
    assert runs["hivtp-2of9-both"][1] == runs["hivtp-2of9"][1]
    told = []
    for name in ("hivtp-2of9", "hivtp-2of9-both"):
        (path,) = (tmp_path / "runs" / name).rglob("*_results.json")
        measured = json.loads(path.read_text(encoding="utf-8"))["throughput"]
        told.append({name for name in measured if name.startswith(("avg_token_weights", "avg_positions"))})
    assert told[0] == {"avg_token_weights_none", "avg_positions_packed"}
    assert told[1] == {"avg_token_weights_cluster_size", "avg_positions_original"}
    environment["WEIGHTS_AND_POSITIONS"] = "published all"
    refused = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert (refused.returncode, "has 'all'; give some of" in refused.stderr) == (1, True)
