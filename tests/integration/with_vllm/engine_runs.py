"""Runs of vLLM's offline engine in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.serving.server import engine_environment

_ENGINE = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
}


class EngineRun(NamedTuple):
    """What an engine answered, as `offline_engine.py` writes it, or None where it ended early; and all that it printed."""

    answers: list[dict[str, Any]] | None
    output: str


def run_engine(
    folder: Path,
    checkpoint: Path,
    prompts: Sequence[str],
    images: Sequence[Sequence[Path]],
    max_tokens: int,
    variables: Mapping[str, str] | None = None,
    processor: Sequence[Mapping[str, Any]] | None = None,
    **engine: Any,
) -> EngineRun:
    """Asks the engine everything at once, greedily.

    Args:
        folder: an empty one, for the engine's files.
        checkpoint: a folder.
        prompts: with a placeholder for each image.
        images: of every prompt the paths of its images.
        max_tokens: of an answer.
        variables: of the environment, in addition.
        processor: of every prompt what the request says to the processor.
        engine: arguments of `LLM`, in addition.
    """
    task = {
        "engine": {"model": str(checkpoint), **_ENGINE, **engine},
        "prompts": list(prompts),
        "images": [list(map(str, paths)) for paths in images],
        "processor": [{}] * len(prompts) if processor is None else list(processor),
        "max_tokens": max_tokens,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    program = Path(__file__).with_name("offline_engine.py")
    finished = subprocess.run(
        [sys.executable, str(program), "task.json", "answers.json"],
        cwd=folder,
        env={**engine_environment(folder), **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    answers = None
    if finished.returncode == 0:
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return EngineRun(answers, finished.stdout)
