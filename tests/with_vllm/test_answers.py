"""vLLM's offline engine and its server answer as transformers' `generate` does, from the code that lies in the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asked import MAX_TOKENS, NUMBER, generated, prompt_of, rows
from benchmarks.serving.client import Asked, ask
from benchmarks.serving.server import engine_environment, serving
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf import HIVTPLlavaNextProcessor
from hivtp_hf.conversion import convert_checkpoint

# At a ratio of 1 no method has anything to choose.
SETTINGS = {
    "1": {"retention_ratio": 1.0},
    "hivtp, 1/2": {"retention_ratio": 1 / 2},
    "hivtp, 2/9": {"retention_ratio": 2 / 9},
    "gprune, 1/2": {"method": "gprune", "retention_ratio": 1 / 2},
    "gprune, 2/9": {"method": "gprune", "retention_ratio": 2 / 9},
}
ENGINE = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
}


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index}.png" for index in range(NUMBER)]
    for path, row in zip(paths, rows(), strict=True):
        row.open_image().save(path)
    return paths


def converted(settings, folder: Path) -> Path:
    return convert_checkpoint(str(CHECKPOINT), folder / "checkpoint", settings, show_progress=False)


@pytest.fixture(scope="module", params=SETTINGS)
def checkpoint(request, tmp_path_factory):
    return converted(SETTINGS[request.param], tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return generated(checkpoint)


def of_offline_engine(folder: Path, checkpoint: Path, image_paths, **task):
    """What the offline engine answers to all questions at once, in a process of its own."""
    processor = HIVTPLlavaNextProcessor.from_pretrained(checkpoint)
    task = {
        "engine": {"model": str(checkpoint), **ENGINE},
        "prompts": [prompt_of(processor, row) for row in rows()],
        "images": [[str(path)] for path in image_paths],
        "max_tokens": MAX_TOKENS,
        **task,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_engine.py")), "task.json", "answers.json"],
        cwd=folder,
        env=engine_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-8000:]
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def test_the_images_have_many_sizes():
    assert len({row.open_image().size for row in rows()}) > NUMBER / 2


def test_offline_engine(checkpoint, expected, image_paths, tmp_path):
    answers = of_offline_engine(tmp_path, checkpoint, image_paths)
    assert list(tmp_path.glob("modules/**/modeling_hivtp_llava_next.py"))  # the code of the checkpoint, which ran
    assert [answer["prompt_tokens"] for answer in answers] == [answer.prompt_tokens for answer in expected]
    assert [answer["token_ids"] for answer in answers] == [answer.token_ids for answer in expected]


def test_server(checkpoint, expected, tmp_path):
    questions = [Asked.about(row.question, row.open_image()) for row in rows()]
    with serving(checkpoint, tmp_path) as address:
        answers = ask(address, questions, concurrency=NUMBER, max_tokens=MAX_TOKENS)
    assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in expected]
    assert [answer.text.strip() for answer in answers] == [answer.text for answer in expected]
