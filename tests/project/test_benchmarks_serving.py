"""What `python -m benchmarks.serving` asks of which model, and what its results say; vLLM itself is left out."""

import csv
import itertools

import pytest
import torch

from benchmarks.serving.command import main
from benchmarks.serving.models import half_billion_config, squares_of_noise, trained_model
from benchmarks.serving.rows import Row, write_results
from benchmarks.speed.environment import this_environment
from examples.tiny_checkpoint import tiny_processor

pytestmark = pytest.mark.once


def row(**changes):
    values = {"variant": "stock", "ratio": 1.0, "concurrency": 8, "requests": 16, "repeats": 1, "prompt_tokens": 1190.0}
    values |= {"requests_per_second": 0.25, "slowest": 0.25, "fastest": 0.25, "latency": 30.0, "correct": None}
    return Row(**values | changes)


def test_every_image_of_the_large_model_has_1176_tokens_and_is_another():
    config = half_billion_config()
    processor = tiny_processor(config)
    questions = list(itertools.islice(squares_of_noise(), 3))
    for question in questions:
        ids = processor(images=question.image, text="<image>", return_tensors="pt")["input_ids"]
        assert int((ids == config.image_token_index).sum()) == 1176
        assert question.answer is None
    assert len({question.image.tobytes() for question in questions}) == len(questions)


def test_the_large_language_model_has_the_shape_of_half_a_billion():
    text = half_billion_config().text_config
    assert text.hidden_size == text.num_attention_heads * text.head_dim == 896
    layer = 896 * (2 * 896 + 2 * 2 * 64) + 3 * 896 * 4864
    assert 0.35e9 < text.num_hidden_layers * layer < 0.36e9  # what Qwen2.5-0.5B has beside its embeddings


def test_the_trained_model_is_asked_what_has_an_answer(tmp_path):
    questions = list(itertools.islice(trained_model(tmp_path).questions, 2))
    assert all(question.answer for question in questions)


def test_answers_that_cannot_be_right_are_left_open(tmp_path):
    environment = this_environment(torch.device("cpu"), torch.float32, "serving-0.5b", "abc1234")
    table, page = write_results(tmp_path, [row(), row(correct=0.5)], environment, "0.0", "Some words.", "command", "A note.")
    text = page.read_text()
    assert "Some words.\n" in text
    assert "A note.\n" in text
    assert "| 30000 ms | - |" in text
    assert "| 30000 ms | 50% |" in text
    with table.open(newline="") as file:
        assert [line["correct"] for line in csv.DictReader(file)] == ["", "0.5"]


def test_an_unknown_model_is_named():
    with pytest.raises(SystemExit, match=r"--model is 'large'; it must be one of trained, 0\.5b"):
        main(model="large")
