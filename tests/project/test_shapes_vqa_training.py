"""Training of the reference model: its stages learn, go on where they stopped, and train on the prompts of use."""

import numpy as np
import pytest
import torch

from examples.shapes_vqa.scenes import draw, make_practice_scene, make_scene
from examples.shapes_vqa.splits import PRACTICE, VALIDATION
from examples.shapes_vqa.vocabulary import QUESTION_TYPES
from research.shapes_vqa.language_training import accuracy_by_type, answer_logits, answer_loss, seen_images
from research.shapes_vqa.mixed_precision import MasterWeights
from research.shapes_vqa.model import PATCH, make_config, make_model, make_processor
from research.shapes_vqa.packed_questions import prompt_of
from research.shapes_vqa.stages import Stage, run_stage
from research.shapes_vqa.starting_point import patches_of, set_starting_point
from research.shapes_vqa.tower_training import TowerHeads, dense_loss, tower_batch
from research.shapes_vqa.training_log import TrainingLog
from research.shapes_vqa.training_plot import plot_training

pytestmark = pytest.mark.once

GRID = 12


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_config())


@pytest.fixture(scope="module")
def practice(processor):
    return tower_batch(processor, [make_practice_scene((PRACTICE, index)) for index in range(4)])


@pytest.fixture
def model(practice):
    model = make_model(make_config(), seed=0)
    set_starting_point(model, patches_of(practice.pixel_values, PATCH, 2000, np.random.default_rng(0)))
    return model


def test_packed_questions_are_single_prompts(model, processor):
    """The logits where an answer begins, for a question behind its image alone and among others, in a padded batch."""
    images = list(seen_images(model, processor, VALIDATION, range(3), most=dict.fromkeys(QUESTION_TYPES, 2)))
    with torch.no_grad():
        logits, labels = answer_logits(model, images)
        first, row = logits[::2], 0
        for index, image in enumerate(images):
            picture = draw(make_scene((VALIDATION, index)))
            for question in image.questions:
                message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
                prompt = processor.apply_chat_template([message], add_generation_prompt=True)
                assert prompt == prompt_of(question.text)
                alone = model(**processor(images=picture, text=prompt, return_tensors="pt")).logits[0, -1]
                torch.testing.assert_close(first[row], alone, atol=1e-4, rtol=1e-4)
                assert processor.tokenizer.decode(labels[2 * row : 2 * row + 1]) == question.answer
                row += 1
    assert row == len(first) > 6


def test_a_few_steps_learn_the_same_batch(model, practice):
    heads = TowerHeads(128, 192, GRID)
    weights = MasterWeights([model.model.vision_tower, model.model.multi_modal_projector, heads], 1e-3)
    losses = []
    for _ in range(4):
        loss, right = dense_loss(model, heads, practice)
        loss.backward()
        weights.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {"kind", "colour", "digit", "centre", "place"} <= set(right)


def test_a_few_steps_learn_the_same_questions(model, processor):
    images = list(seen_images(model, processor, VALIDATION, range(2), most=dict.fromkeys(QUESTION_TYPES, 2)))
    before = answer_loss(model, images).item()
    weights = MasterWeights([model.model.language_model], 1e-3)
    for _ in range(15):
        answer_loss(model, images).backward()
        weights.step(1.0)
    assert answer_loss(model, images).item() < 0.5 * before
    counts = accuracy_by_type(model, images)
    assert sum(asked for _, asked in counts.values()) == sum(len(image.questions) for image in images)
    assert sum(right for right, _ in counts.values()) > 0


def test_small_steps_are_not_lost_in_bfloat16():
    linear = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    weights = MasterWeights([linear], 1e-4, weight_decay=0.0)
    for _ in range(100):
        linear(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        weights.step(1.0)
    # One step of 1e-4 alone would be rounded away: bfloat16 has 1 and 0.996 next to each other.
    assert float(linear.weight) == pytest.approx(0.99, abs=0.003)


class _Stop(Exception):
    pass


def _stage(linear, steps, stop_at=None, seen=None):
    def batches(first):
        for step in range(first, steps):
            if step == stop_at:
                raise _Stop
            if seen is not None:
                seen.append(step)
            yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    def loss(batch):
        return linear(batch).square().sum(), {"right": 1.0}

    return Stage("toy", steps, 0.1, (linear,), batches, loss, lambda: {"checked": 2.0}, steps_between_checks=10)


def test_a_stopped_stage_goes_on_as_if_nothing_had_been(tmp_path):
    def linear():
        torch.manual_seed(0)
        return torch.nn.Linear(4, 3)

    whole, stopped = linear(), linear()
    (tmp_path / "whole").mkdir()
    log = TrainingLog(tmp_path / "whole.csv")
    run_stage(_stage(whole, 35), tmp_path / "whole", log)
    assert [(row[1], row[3]) for row in log.rows if row[3] == "checked"] == [(step, "checked") for step in (10, 20, 30, 35)]

    (tmp_path / "stopped").mkdir()
    with pytest.raises(_Stop):
        run_stage(_stage(stopped, 35, stop_at=27), tmp_path / "stopped", TrainingLog(tmp_path / "stopped.csv"))
    again, seen = linear(), []
    run_stage(_stage(again, 35, seen=seen), tmp_path / "stopped", TrainingLog(tmp_path / "stopped.csv"))
    assert seen == list(range(20, 35))
    assert torch.equal(again.weight, whole.weight)
    of_stopped = [(row[0], row[1], row[3], row[4]) for row in TrainingLog(tmp_path / "stopped.csv").rows]
    assert of_stopped == [(row[0], row[1], row[3], row[4]) for row in log.rows]


def test_the_figure_of_a_training(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="no rows"):
        plot_training(log, tmp_path / "empty.png")
    log.add("tower", 50, 1.0, {"loss": 3.0, "kind": 0.2, "colour": 0.5, "digit": 0.1, "tile": 0.3, "place": 0.4})
    log.add("language", 200, 2.0, {"loss": 1.0, "colour": 0.9, "all": 0.8})
    plot_training(log, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
