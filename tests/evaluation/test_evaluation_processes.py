"""`accelerate launch` of `hivtp evaluate`: several processes share the images and end as one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import GEOMETRY
from evaluations import data_folder, evaluated, without_times
from forked import run_together
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
OPTIONS = ("--methods", "uniform,random,downsample", "--ratios", "1/2", "--batch-size", "1", "--max-new-tokens", "4")
FILES = ["accuracy.png", "config.json", "environment.json", "metrics.csv", "predictions.csv"]
# What `accelerate launch` sets for each of two processes, which then run the command line.
PROGRAM = """
import os, sys
from hivtp_hf import cli
from hivtp_hf.evaluation import answering

rank, port, broken, *arguments = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
original = answering.pruned_tokens

def pruned_tokens(seen, layouts):
    print("image", *layouts[0].image_size)
    if str(layouts[0].image_size) == broken:
        raise IndexError("out of range")
    return original(seen, layouts)

answering.pruned_tokens = pruned_tokens
sys.argv = ["hivtp", "evaluate", *arguments]
cli.main()
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("next") / "stock", **GEOMETRY)


@pytest.fixture
def data(tmp_path):
    return data_folder(tmp_path / "data")


def on_two_processes(stock, data, output, port, broken=""):
    arguments = ["--checkpoint", stock, "--data", data, "--output", output, "--device", "cpu", *OPTIONS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    return run_together([["-c", PROGRAM, rank, port, broken, *arguments] for rank in range(2)], ROOT, environment)


def alone(stock, data, output):
    options = dict(zip((name.removeprefix("--").replace("-", "_") for name in OPTIONS[::2]), OPTIONS[1::2], strict=True))
    return evaluated(stock, data, output, **{**options, "batch_size": 1, "max_new_tokens": 4}).folder


def check_same(folder, expected):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "predictions.csv").read_bytes() == (expected / "predictions.csv").read_bytes()
    assert without_times(folder / "metrics.csv") == without_times(expected / "metrics.csv")


def images_of(ended):
    return {line for line in ended.stdout.splitlines() if line.startswith("image")}


def test_accelerate_launches_what_ends_as_one_process_would(stock, data, tmp_path, free_port):
    # With "--cpu" it would start one alone.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port)]
    arguments = ["--checkpoint", stock, "--data", data, "--output", tmp_path / "runs", *OPTIONS]
    command = [sys.executable, *launch, "-m", "hivtp_hf.cli", "evaluate", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    check_same(folder, alone(stock, data, tmp_path / "alone"))
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    # One of them speaks.
    assert ended.stdout.splitlines()[-1] == str(folder)
    assert sum("questions. Tokens of an image" in line for line in ended.stdout.splitlines()) == 1


def test_an_error_in_one_process_stops_all_and_one_goes_on_alone(stock, data, tmp_path, free_port):
    # Of three images the main process has the first, and the third in the second round.
    ended = on_two_processes(stock, data, tmp_path / "runs", free_port, broken="(60, 60)")
    assert [images_of(process) for process in ended] == [{"image 60 100", "image 60 60"}, {"image 110 40"}]
    assert "Evaluating" not in ended[1].stderr
    for process in ended:
        assert process.returncode == 1
        assert "row 4 (image 'square.png', question 'Is there a dog" in process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "environment.json", "partial.jsonl"]
    assert len((folder / "partial.jsonl").read_text().splitlines()) == 2
    assert alone(stock, data, tmp_path / "runs") == folder
    check_same(folder, alone(stock, data, tmp_path / "alone"))


@pytest.mark.nightly
def test_an_error_in_the_other_process_leaves_nothing(stock, data, tmp_path, free_port):
    ended = on_two_processes(stock, data, tmp_path / "runs", free_port, broken="(110, 40)")
    assert [process.returncode for process in ended] == [1, 1]
    assert all("row 2 (image 'deep/tall.png', question 'How many?')" in process.stderr for process in ended)
    assert not list((tmp_path / "runs").iterdir())
    # What no process can read is said by each.
    (data / "questions.csv").unlink()
    ended = on_two_processes(stock, data, tmp_path / "runs", free_port)
    assert all("hivtp: `--data` is" in process.stderr for process in ended)
