"""The Shapes-VQA task: scenes, questions and their balance, labels of cells, and questions packed behind one image."""

import numpy as np
import pytest
import torch

from examples.shapes_vqa import splits
from examples.shapes_vqa.export import export
from examples.shapes_vqa.held_out import held_out_questions, held_out_rows
from examples.shapes_vqa.questions import Question, questions_about
from examples.shapes_vqa.scenes import Scene, Shape, draw, make_practice_scene, make_scene
from examples.shapes_vqa.vocabulary import COLOURS, COUNTS, KINDS, QUESTION_TYPES
from hivtp_hf.evaluation.data import load_data
from research.shapes_vqa.blind_floor import blind_floor, training_questions
from research.shapes_vqa.dense_targets import dense_targets, layout_of
from research.shapes_vqa.language_training import answer_logits, seen_images
from research.shapes_vqa.model import make_config, make_model, make_processor, words
from research.shapes_vqa.packed_questions import prompt_of

pytestmark = pytest.mark.once

SCENES = [make_scene((splits.VALIDATION, index)) for index in range(400)]


def shape(kind="circle", colour="red", digit=None, x=40.0, y=40.0, radius=15.0):
    return Shape(kind, colour, digit, x, y, radius)


def answers(*shapes):
    return {question.text: question.answer for question in questions_about(Scene(200, 200, shapes, (0,)))}


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_config())


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(), seed=0).eval()


def test_a_seed_is_a_scene_and_a_scene_is_an_image():
    assert make_scene((1, 7)) == make_scene((1, 7)) != make_scene((2, 7))
    assert np.array_equal(draw(make_scene((1, 7))), draw(make_scene((1, 7))))
    assert draw(make_scene((1, 7))).size == (make_scene((1, 7)).width, make_scene((1, 7)).height)


def test_splits_never_meet():
    assert len({splits.TRAINING, splits.VALIDATION, splits.TEST, splits.PRACTICE, splits.CALIBRATION}) == 5
    of_splits = [{make_scene((split, index)) for index in range(50)} for split in range(3)]
    images = [{scene.shapes for scene in scenes} for scenes in of_splits]
    assert all(len(of_split) == 50 for of_split in images)
    assert len(set.union(*images)) == 150


def test_shapes_lie_apart_and_inside():
    for scene in [*SCENES, *(make_practice_scene((splits.PRACTICE, index)) for index in range(20))]:
        for index, one in enumerate(scene.shapes):
            assert one.radius < one.x < scene.width - one.radius
            assert one.radius < one.y < scene.height - one.radius
            for other in scene.shapes[:index]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_every_pinpoint_shape_and_un_padding_occur():
    layouts = [layout_of(scene) for scene in SCENES]
    assert {(layout.tile_rows, layout.tile_columns) for layout in layouts} == {(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)}
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


def test_a_kind_that_occurs_twice_is_not_named():
    asked = answers(shape(), shape(x=120.0), shape("star", "blue", x=60.0, y=150.0))
    assert not any("the circle" in text for text in asked)
    assert asked["How many circle shapes are there?"] == "two"


def test_an_image_blind_answer_is_near_chance():
    asked = (held_out.question for held_out in held_out_questions(4000))
    rows = {row.question_type: row for row in blind_floor(training_questions(1500), asked)}
    assert set(rows) == {"all", *QUESTION_TYPES}
    assert rows["all"].n == 4000
    for row in rows.values():
        assert 0 < row.correct / row.n < row.chance + 0.07


def test_a_floor_by_hand():
    def asked(text, answer):
        return Question("presence", text, answer, "presence", ("yes", "no"))

    known = [asked("a?", "yes"), asked("a?", "no"), asked("a?", "yes"), asked("b?", "no")]
    rows = blind_floor(known, [asked("a?", "yes"), asked("a?", "no"), asked("b?", "no"), asked("never met?", "yes")])
    assert rows == [("all", 4, 2, 0.5), ("presence", 4, 2, 0.5)]


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


def test_every_word_is_one_token(processor):
    tokenizer = processor.tokenizer
    for scene in SCENES[:100]:
        for question in questions_about(scene):
            ids = tokenizer(f"{question.text} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[-1:]) == question.answer
    assert len(words()) == len(set(words())) == len(tokenizer)
    assert {"yes", "no", *COUNTS} <= set(words())


def test_the_chat_template_writes_the_prompt_of_training(processor):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which shape is red?"}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == prompt_of("Which shape is red?")


def test_packed_questions_are_single_prompts(model, processor):
    """The logits where an answer begins, for a question behind its image alone and among others, in a padded batch."""
    images = list(seen_images(model, processor, splits.VALIDATION, range(3), most=dict.fromkeys(QUESTION_TYPES, 2)))
    assert sum(len(image.questions) for image in images) > 6
    with torch.no_grad():
        logits, labels = answer_logits(model, images)
        first, row = logits[::2], 0
        for index, image in enumerate(images):
            picture = draw(make_scene((splits.VALIDATION, index)))
            for question in image.questions:
                inputs = processor(images=picture, text=prompt_of(question.text), return_tensors="pt")
                alone = model(**inputs).logits[0, -1]
                torch.testing.assert_close(first[row], alone, atol=1e-4, rtol=1e-4)
                assert processor.tokenizer.decode(labels[2 * row : 2 * row + 1]) == question.answer
                row += 1
    assert row == len(first)


def test_exported_questions_are_the_held_out_ones(tmp_path):
    export(tmp_path / "data", 20, "test")
    exported = load_data(tmp_path / "data", None)
    rows = list(held_out_rows(20))
    assert [row[2:] for row in exported.rows] == [row[2:] for row in rows]
    for theirs, ours in zip(exported.rows, rows, strict=True):
        assert np.array_equal(theirs.open_image(), ours.open_image())
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "data", 20, "test")
    export(tmp_path / "other", 20, "calibration")
    assert (tmp_path / "other" / "images" / "calibration-0.png").is_file()
