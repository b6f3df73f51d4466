"""vLLM's offline engine and its server answer as transformers' `generate` does, from the code that lies in the checkpoint."""

import pytest

from asked import MAX_TOKENS, NUMBER, generated, prompt_of, rows
from benchmarks.serving.client import Asked, ask
from benchmarks.serving.server import serving
from engine_runs import run_engine
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf import HIVTPLlavaNextProcessor
from hivtp_hf.checkpoints import convert_checkpoint

# At a ratio of 1 no method has anything to choose.
SETTINGS = {
    "1": {"retention_ratio": 1.0},
    "hivtp, 1/2": {"retention_ratio": 1 / 2},
    "hivtp, 2/9": {"retention_ratio": 2 / 9},
    "gprune, 1/2": {"method": "gprune", "retention_ratio": 1 / 2},
    "gprune, 2/9": {"method": "gprune", "retention_ratio": 2 / 9},
}


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index}.png" for index in range(NUMBER)]
    for path, row in zip(paths, rows(), strict=True):
        row.open_image().save(path)
    return paths


@pytest.fixture(scope="module", params=SETTINGS)
def checkpoint(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "checkpoint"
    return convert_checkpoint(str(CHECKPOINT), target, SETTINGS[request.param], show_progress=False)


@pytest.fixture(scope="module")
def prompts(checkpoint):
    processor = HIVTPLlavaNextProcessor.from_pretrained(checkpoint)
    return [prompt_of(processor, row) for row in rows()]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    return generated(checkpoint, prompts, [[row.open_image()] for row in rows()], MAX_TOKENS)


def test_the_images_have_many_sizes():
    assert len({row.open_image().size for row in rows()}) > NUMBER / 2


def test_offline_engine(checkpoint, prompts, expected, image_paths, tmp_path):
    run = run_engine(tmp_path, checkpoint, prompts, [[path] for path in image_paths], MAX_TOKENS)
    assert run.answers is not None, run.output[-8000:]
    assert list(tmp_path.glob("modules/**/hivtp_llava_next.py"))  # the code of the checkpoint, which ran
    assert [answer["prompt_tokens"] for answer in run.answers] == [answer.prompt_tokens for answer in expected]
    assert [answer["token_ids"] for answer in run.answers] == [answer.token_ids for answer in expected]


def test_server(checkpoint, expected, tmp_path):
    questions = [Asked.about(row.question, row.open_image()) for row in rows()]
    with serving(checkpoint, tmp_path) as address:
        answers = ask(address, questions, concurrency=NUMBER, max_tokens=MAX_TOKENS)
    assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in expected]
    assert [answer.text.strip() for answer in answers] == [answer.text for answer in expected]
