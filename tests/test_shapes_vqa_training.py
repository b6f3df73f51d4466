"""Training of the reference model: its starting point, its stages, and that it goes on where it stopped."""

import numpy as np
import pytest
import torch
from PIL import Image

from examples.shapes_vqa.scenes import make_practice_scene
from examples.shapes_vqa.splits import PRACTICE, VALIDATION
from examples.shapes_vqa.vocabulary import QUESTION_TYPES
from research.shapes_vqa import stages
from research.shapes_vqa.language_training import SeenImage, accuracy_by_type, answer_loss, seen_images
from research.shapes_vqa.mixed_precision import MasterWeights
from research.shapes_vqa.model import PATCH, make_config, make_model, make_processor, words
from research.shapes_vqa.places import scale_places
from research.shapes_vqa.stages import Stage, run_stage
from research.shapes_vqa.starting_point import _NEIGHBOURS, patches_of, set_starting_point
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


def test_the_model_keeps_to_what_serving_takes(model):
    config = model.config
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads in (32, 64)
    assert config.text_config.head_dim == 64
    assert config.vision_config.num_hidden_layers >= 10
    assert config.vision_config.image_size // config.vision_config.patch_size >= GRID
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 8e6  # bytes in float16


@torch.no_grad()
def test_first_heads_look_at_their_neighbours(model):
    tower = model.model.vision_tower
    layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
    table = next(weight for name, weight in tower.named_parameters() if name.endswith("position_embedding.weight"))[1:]
    for index, (down, right) in enumerate(_NEIGHBOURS):
        attention, rows = layers[index // 4].self_attn, slice(index % 4 * 32, index % 4 * 32 + 32)
        query = table @ attention.q_proj.weight[rows].T
        key = table @ attention.k_proj.weight[rows].T
        looked_at = (query @ key.T).argmax(1)
        for row, column in ((3, 4), (6, 6), (8, 2)):
            assert int(looked_at[row * GRID + column]) == (row + down) * GRID + column + right


@torch.no_grad()
def test_words_are_orthonormal_and_tied(model):
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(len(embeddings)), atol=1e-5, rtol=0)
    assert model.lm_head.weight is embeddings


def test_patch_filters_whiten_patches(model, practice):
    patches = patches_of(practice.pixel_values, PATCH, 4000, np.random.default_rng(1))
    filters = next(weight for name, weight in model.named_parameters() if name.endswith("patch_embedding.weight"))
    seen = (patches - patches.mean(0)) @ filters.flatten(1)[:-32].T
    correlation = torch.corrcoef(seen.T) - torch.eye(seen.shape[1])
    assert float(correlation.abs().mean()) < 0.1
    assert not filters[-32:].any()


# By how many steps of training the loss shrinks to which share of the first.
@pytest.mark.parametrize(("steps", "share"), [(4, 0.95), pytest.param(12, 0.8, marks=pytest.mark.nightly)])
def test_a_few_steps_learn_the_same_batch(model, practice, steps, share):
    heads = TowerHeads(128, 192, GRID)
    weights = MasterWeights([model.model.vision_tower, model.model.multi_modal_projector, heads], 1e-3)
    losses = []
    for _ in range(steps):
        loss, right = dense_loss(model, heads, practice)
        loss.backward()
        weights.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]
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


def test_background_is_left_out_and_shapes_are_not(model, processor):
    image: SeenImage = next(seen_images(model, processor, VALIDATION, range(1), most=dict.fromkeys(QUESTION_TYPES, 1)))
    shorter = image.without_most_background(0.1, np.random.default_rng(0))
    assert int(shorter.is_shape.sum()) == int(image.is_shape.sum()) > 0
    assert len(shorter.features) == len(shorter.is_shape) < 0.6 * len(image.features)
    assert torch.equal(shorter.features[shorter.is_shape], image.features[image.is_shape])


def test_master_weights_are_adamw_where_everything_is_float32():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    weights = MasterWeights([ours], 0.1, weight_decay=0.0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(5):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for linear in (ours, theirs):
            linear(inputs).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        weights.step(0.5)
    torch.testing.assert_close(ours.weight, theirs.weight)


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

    # Once at its end, a stage only brings its weights.
    finished, seen = linear(), []
    run_stage(_stage(finished, 35, seen=seen), tmp_path / "stopped", TrainingLog(tmp_path / "stopped.csv"))
    assert seen == []
    assert torch.equal(finished.weight, whole.weight)


def test_a_stored_state_is_whole_or_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "toy.pt"
    stages.store({"step": 1}, file)

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("no room")

    monkeypatch.setattr(stages.torch, "save", fail)
    with pytest.raises(OSError, match="no room"):
        stages.store({"step": 2}, file)
    assert torch.load(file)["step"] == 1


def test_the_figure_of_a_training(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="no rows"):
        plot_training(log, tmp_path / "empty.png")
    log.add("tower", 50, 1.0, {"loss": 3.0, "kind": 0.2, "colour": 0.5, "digit": 0.1, "tile": 0.3, "place": 0.4})
    log.add("tower", 100, 1.0, {"loss": 2.0, "kind": 0.4, "colour": 0.7, "digit": 0.2, "tile": 0.6, "place": 0.2})
    log.add("features", 10, 0.5, {"questions": 300})
    log.add("language", 200, 2.0, {"loss": 1.0, "colour": 0.9, "all": 0.8})
    plot_training(log, tmp_path / "training.png")
    with Image.open(tmp_path / "training.png") as figure:
        figure.load()
        assert figure.width > figure.height  # a column for each of two stages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "training.png"]


@torch.no_grad()
def test_places_are_told_louder_and_nothing_else(model, practice):
    def features():
        encoded = model.model.get_image_features(practice.pixel_values, practice.image_sizes, return_dict=True).pooler_output
        is_cell = [targets.positions for targets in practice.targets]
        return torch.cat([image[positions] for image, positions in zip(encoded, is_cell, strict=True)])

    embeddings = model.get_input_embeddings().weight
    of_word = dict(zip(words(), embeddings, strict=True))
    axes = torch.stack([of_word["right"] - of_word["left"], of_word["below"] - of_word["above"]])
    before = features()
    scale_places(model, 3.0)
    after = features()
    torch.testing.assert_close(after @ axes.T, 3 * before @ axes.T, rtol=1e-3, atol=1e-4)
    places = before @ axes.T @ axes / 2
    torch.testing.assert_close(after, before + 2 * places, rtol=1e-3, atol=1e-4)
