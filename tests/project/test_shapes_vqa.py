"""The Shapes-VQA task: scenes, questions and their balance, the held-out ones as files, and labels of cells."""

import numpy as np
import pytest
import torch

from examples.shapes_vqa import export, splits
from examples.shapes_vqa.held_out import held_out_questions, held_out_rows
from examples.shapes_vqa.questions import questions_about
from examples.shapes_vqa.scenes import Scene, Shape, draw, make_scene
from examples.shapes_vqa.vocabulary import COLOURS, KINDS, QUESTION_TYPES
from hivtp_hf.evaluation.data import load_data
from research.shapes_vqa.blind_floor import blind_floor, training_questions
from research.shapes_vqa.dense_targets import dense_targets, layout_of
from research.shapes_vqa.model import make_config, make_processor

pytestmark = pytest.mark.once

SCENES = [make_scene((splits.VALIDATION, index)) for index in range(200)]


def shape(kind="circle", colour="red", digit=None, x=40.0, y=40.0, radius=15.0):
    return Shape(kind, colour, digit, x, y, radius)


def answers(*shapes):
    return {question.text: question.answer for question in questions_about(Scene(200, 200, shapes, (0,)))}


def test_a_seed_is_a_scene_and_splits_never_meet():
    assert make_scene((1, 7)) == make_scene((1, 7))
    assert np.array_equal(draw(make_scene((1, 7))), draw(make_scene((1, 7))))
    assert len({splits.TRAINING, splits.VALIDATION, splits.TEST, splits.PRACTICE, splits.CALIBRATION, splits.CONFIRMATION}) == 6
    assert len({make_scene((split, index)).shapes for split in range(3) for index in range(20)}) == 60


def test_shapes_lie_apart_and_inside():
    for scene in SCENES:
        for index, one in enumerate(scene.shapes):
            assert one.radius < one.x < scene.width - one.radius
            assert one.radius < one.y < scene.height - one.radius
            for other in scene.shapes[:index]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_every_pinpoint_shape_and_un_padding_occur():
    layouts = [layout_of(scene) for scene in SCENES]
    assert {(layout.parts[1].down, layout.parts[1].across) for layout in layouts} == {(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)}
    unpadded = [not bool(layout.valid.all()) for layout in layouts]
    assert 0.3 < sum(unpadded) / len(unpadded) < 1
    assert {len(scene.shapes) for scene in SCENES} == {1, 2, 3, 4, 5}


def test_a_shape_has_its_colour_in_the_image():
    for scene in SCENES[:50]:
        pixels = np.asarray(draw(scene), dtype=float)
        for one in scene.shapes:
            if one.digit is None:
                seen = pixels[int(one.y), int(one.x)]
                nearest = min(COLOURS, key=lambda name: np.abs(seen - np.array(COLOURS[name])).sum())
                assert nearest == one.colour


def test_answers_by_hand():
    red_circle, blue_star = shape(digit="4"), shape("star", "blue", x=120.0, y=50.0)
    asked = answers(red_circle, blue_star, shape("cross", "blue", x=60.0, y=150.0))
    assert asked["What colour is the circle?"] == "red"
    assert asked["Which shape is red?"] == "circle"
    assert "Which shape is blue?" not in asked
    assert asked["Is there a blue star?"] == "yes"
    assert asked["Is there a red star?"] == "no"
    assert asked["How many shapes are there?"] == "three"
    assert asked["How many blue shapes are there?"] == "two"
    assert asked["Is the circle left or right of the star?"] == "left"
    assert asked["Is the cross above or below the circle?"] == "below"
    assert "Is the circle above or below the star?" not in asked  # they are about as high
    assert asked["Which digit is on the circle?"] == "4"
    assert "Which digit is on the star?" not in asked
    # A kind that occurs twice is not named.
    asked = answers(shape(), shape(x=120.0), blue_star)
    assert not any("the circle" in text for text in asked)
    assert asked["How many circle shapes are there?"] == "two"


def test_an_image_blind_answer_is_near_chance():
    asked = (held_out.question for held_out in held_out_questions(2000))
    rows = {row.question_type: row for row in blind_floor(training_questions(1500), asked)}
    assert set(rows) == {"all", *QUESTION_TYPES}
    assert rows["all"].n == 2000
    for row in rows.values():
        assert 0 < row.correct / row.n < row.chance + 0.07


def test_labels_of_cells():
    for scene in SCENES[:60]:
        layout, targets = layout_of(scene), dense_targets(scene)
        assert len(targets.positions) == int(layout.valid.sum())
        boxes = layout.pixel_boxes(targets.positions)
        for index, one in enumerate(scene.shapes):
            of_shape = targets.shape == index
            assert bool(of_shape.any())
            assert set(targets.kind[of_shape].tolist()) == {KINDS.index(one.kind)}
            assert set(targets.colour[of_shape].tolist()) == {list(COLOURS).index(one.colour)}
            centre = (boxes[of_shape, :2] + boxes[of_shape, 2:]) / 2
            assert float((centre - torch.tensor([one.x, one.y])).norm(dim=1).max()) < 1.7 * one.radius
        assert set(targets.kind[targets.shape < 0].tolist()) == {len(KINDS)}
        # Each shape's centre lies in one cell of the base tile and in one of the crops.
        assert int(targets.is_centre.sum()) == 2 * len(scene.shapes)


def test_every_word_is_one_token():
    tokenizer = make_processor(make_config()).tokenizer
    for scene in SCENES[:100]:
        for question in questions_about(scene):
            ids = tokenizer(f"{question.text} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[-1:]) == question.answer


def test_exported_questions_are_the_held_out_ones(tmp_path, run_main):
    assert run_main(export.main, tmp_path / "data", "--questions", 20).returncode == 0
    exported = load_data(tmp_path / "data", None)
    rows = list(held_out_rows(20))
    assert [row[2:] for row in exported.rows] == [row[2:] for row in rows]
    for theirs, ours in zip(exported.rows, rows, strict=True):
        assert np.array_equal(theirs.open_image(), ours.open_image())
    assert "exists already" in run_main(export.main, tmp_path / "data").stderr
    run_main(export.main, tmp_path / "other", "--questions", 20, "--split", "calibration")
    assert (tmp_path / "other" / "images" / "calibration-0.png").is_file()
