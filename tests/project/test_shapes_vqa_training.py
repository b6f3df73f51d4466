"""Training of the reference models: stages learn, go on where they stopped, and train on the prompts of use."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from examples.shapes_vqa.scenes import draw, make_practice_scene, make_sign_practice_scene
from examples.shapes_vqa.splits import PRACTICE, TRAINING, VALIDATION
from examples.shapes_vqa.vocabulary import QUESTION_TYPES, READING
from hivtp_hf import HIVTPQwen2_5_VLForConditionalGeneration
from research.shapes_vqa.language_training import LanguageHeads, accuracy_by_type, answer_logits, answer_loss, seen_images
from research.shapes_vqa.mixed_precision import MasterWeights
from research.shapes_vqa.references import REFERENCES
from research.shapes_vqa.stages import Stage, run_stage
from research.shapes_vqa.tower_training import TowerHeads, TowerScenes, dense_loss, tower_batch
from research.shapes_vqa.train import Recipe, train
from research.shapes_vqa.training_log import TrainingLog
from research.shapes_vqa.training_plot import plot_training

pytestmark = pytest.mark.once

MOST = dict.fromkeys((*QUESTION_TYPES, READING), 2)


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request):
    return REFERENCES[request.param]


@pytest.fixture(scope="module")
def processor(reference):
    return reference.make_processor(reference.make_config())


@pytest.fixture(scope="module")
def practice(reference, processor):
    makes = (make_practice_scene, make_sign_practice_scene)
    return tower_batch(reference, processor, [makes[index % 2]((PRACTICE, index)) for index in range(4)])


@pytest.fixture
def model(reference, practice):
    model = reference.make_model(reference.make_config(), seed=0)
    reference.set_starting_point(model, practice.inputs, np.random.default_rng(0))
    return model


def test_packed_questions_are_single_prompts(reference, model, processor):
    """The logits where an answer begins, for a question behind its image alone and among others, in a padded batch."""
    images = list(seen_images(reference, model, processor, VALIDATION, range(3), MOST))
    scenes = next(iter(TowerScenes(reference, processor, range(3), 3, VALIDATION))).scenes
    assert {bool(scene.signs) for scene in scenes} == {True, False}
    with torch.no_grad():
        logits, labels = answer_logits(model, images)
        row = tested = 0
        for scene, image in zip(scenes, images, strict=True):
            picture = draw(scene)
            for question, words in zip(image.questions, image.packed.answer_lengths, strict=True):
                assert processor.tokenizer.decode(labels[row : row + words - 1]) == question.answer
                if image.features.shape[0] == tokens_of(reference, processor, picture):  # not made larger or smaller
                    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
                    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
                    assert prompt == reference.prompt_of(question.text, processor.image_token)
                    inputs = processor(images=picture, text=prompt, return_tensors="pt")
                    torch.testing.assert_close(logits[row], model(**inputs).logits[0, -1], atol=1e-4, rtol=1e-4)
                    tested += 1
                row += words
    assert row == len(logits)
    assert tested > 2


def tokens_of(reference, processor, picture):
    return reference.layout_of(processor, picture.height, picture.width).num_stock


def test_segments_at_once_are_stock_attention(reference, model, practice):
    with torch.no_grad():
        stock = reference.encode(model, practice.inputs).features
        reference.train_faster(model)
        for expected, features in zip(stock, reference.encode(model, practice.inputs).features, strict=True):
            torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_a_few_steps_learn_the_same_batch(reference, model, processor, practice):
    heads = TowerHeads(128, 192)
    reference.train_faster(model)
    weights = MasterWeights([*reference.tower_parts(model), heads], 1e-3)
    losses = []
    for _ in range(4):
        loss, right = dense_loss(reference, model, processor.tokenizer, heads, practice)
        loss.backward()
        weights.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {"kind", "colour", "digit", "characters", "centre"} <= set(right)
    assert ({"place", "tile"} <= set(right)) == reference.has_base_tile


def test_a_few_steps_learn_the_same_questions(reference, model, processor):
    images = list(seen_images(reference, model, processor, VALIDATION, range(3), MOST))
    heads = LanguageHeads(192)
    before = answer_loss(model, heads, images)[0].item()
    weights = MasterWeights([model.model.language_model, heads], 1e-3)
    for _ in range(15):
        answer_loss(model, heads, images)[0].backward()
        weights.step(1.0)
    assert answer_loss(model, heads, images)[0].item() < 0.6 * before
    counts = accuracy_by_type(model, images)
    assert sum(asked for _, asked in counts.values()) == sum(len(image.questions) for image in images)
    assert sum(right for right, _ in counts.values()) > 0
    assert READING in counts


def test_background_that_is_left_out_leaves_places_as_they_are(reference, model, processor):
    image = next(seen_images(reference, model, processor, VALIDATION, range(1), MOST))
    shorter = image.without_most_background(0.1, np.random.default_rng(0))
    assert int(image.is_shown.sum()) <= len(shorter.features) < len(image.features)
    if image.places is None:
        assert shorter.places is None
        return
    where = {tuple(place): features for place, features in zip(image.places.of_tokens.T.tolist(), image.features, strict=True)}
    for place, features in zip(shorter.places.of_tokens.T.tolist(), shorter.features, strict=True):
        assert torch.equal(where[tuple(place)], features)
    assert shorter.places[1:] == image.places[1:]


def test_a_whole_training_of_some_steps(tmp_path, reference):
    """All stages, and a checkpoint that stock classes load; the second call has nothing left to train."""
    recipe = Recipe(
        practice_steps=2,
        tower_steps=2,
        tower_batch=2,
        images=6,
        short_steps=2,
        full_steps=2,
        language_batch=2,
        validation_images=4,
        layer_scenes=2,
    )
    for _ in range(2):
        train(reference, tmp_path, torch.device("cpu"), torch.float32, 0, recipe)
        log = TrainingLog(tmp_path / "training_log.csv")
        stages = [row[0] for row in log.rows if row[3] == "loss"]
        assert stages == ["practice", "tower", "language_short", "language"]
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = tmp_path / "checkpoint"
    assert (checkpoint / "model.safetensors").stat().st_size < 8_000_000
    model, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert type(model) is type(reference.make_model(reference.make_config(), 0))
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_qwen_checkpoint_prunes_under_our_classes(tmp_path):
    reference = REFERENCES["shapes-qwen2_5-vl"]
    config = reference.make_config()
    reference.write(reference.make_model(config, 0), reference.make_processor(config), tmp_path)
    model = HIVTPQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    processor = type(reference.make_processor(config)).from_pretrained(tmp_path)
    scene = next(iter(TowerScenes(reference, processor, range(1), 1, TRAINING))).scenes[0]
    prompt = reference.prompt_of("What is written on the red sign?", processor.image_token)
    ratios = {}
    for ratio in (1, 1 / 9):
        inputs = processor(images=draw(scene), text=prompt, return_tensors="pt", retention_ratio=ratio)
        model.config.pruning_config = {"retention_ratio": ratio}
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 3
        ratios[ratio] = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert ratios[1 / 9] == pytest.approx(ratios[1] / 9, abs=1)
    sizes = {size: reference.layout_of(processor, *size).num_stock for size in ((4, 4), (30, 30), (192, 192), (1000, 1000))}
    assert min(sizes.values()) == 4
    assert 560 < max(sizes.values()) <= 600


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
