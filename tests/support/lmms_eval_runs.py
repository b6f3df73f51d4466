"""What the tests with lmms-eval share: a task of few questions, and runs of its command line as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from examples.shapes_vqa.reference import CHECKPOINT

ROOT = Path(__file__).parents[2]
# Of these, some are answered in another way once tokens are dropped.
QUESTIONS = 36
# Weights are stored as float16; answers that are compared are those of float32.
EXACT = f"pretrained={CHECKPOINT},dtype=float32"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
}


class Run(NamedTuple):
    """A process that has ended.

    Attributes:
        status: its exit status.
        output: standard output and standard error together.
        folder: into which it wrote.
    """

    status: int
    output: str
    folder: Path

    def results(self) -> dict[str, Any]:
        """The file of results."""
        (path,) = self.folder.rglob("*_results.json")
        return json.loads(path.read_text(encoding="utf-8"))

    def samples(self) -> list[dict[str, Any]]:
        """What was written of every row, in the order of the rows."""
        (path,) = self.folder.rglob("*_samples_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return sorted(rows, key=lambda row: row["doc_id"])

    def answers(self) -> list[str]:
        """The answer to every row."""
        return [
            row["filtered_resps"][0] if isinstance(row["filtered_resps"], list) else row["filtered_resps"]
            for row in self.samples()
        ]


def run_lmms_eval(
    task: Path, folder: Path, model: str, model_args: str, *more: str, launcher: tuple[str, ...] = ("-m", "lmms_eval")
) -> Run:
    """Runs a task that `write_task` has written.

    Args:
        task: its folder.
        folder: for the results.
        model, model_args: of lmms-eval.
        more: further arguments.
        launcher: what Python is to run.
    """
    command = [sys.executable, *launcher, "--model", model, "--model_args", model_args, "--include_path", str(task)]
    command += ["--tasks", "shapes_vqa", "--output_path", str(folder), "--log_samples", *more]
    environment = {**os.environ, **_ENVIRONMENT, "HF_HOME": str(task.parent / "huggingface")}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=task.parent, timeout=300
    )
    return Run(done.returncode, done.stdout, folder)
