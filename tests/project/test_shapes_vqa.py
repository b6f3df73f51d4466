"""The Shapes-VQA task: scenes, questions and their balance, the held-out ones as files, and labels of cells."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from examples.shapes_vqa import export, splits
from examples.shapes_vqa.glyphs import FACES, glyph
from examples.shapes_vqa.held_out import held_out_questions, held_out_reading, held_out_rows
from examples.shapes_vqa.questions import questions_about
from examples.shapes_vqa.scenes import (
    Scene,
    Shape,
    draw,
    make_practice_scene,
    make_scene,
    make_sign_practice_scene,
    make_sign_scene,
)
from examples.shapes_vqa.signs import LARGEST, SMALLEST, Sign
from examples.shapes_vqa.vocabulary import CHARACTERS, CODES, COLOURS, DIGITS, LETTERS, QUESTION_TYPES, READING
from hivtp_hf.evaluation.data import load_data
from research.shapes_vqa.blind_floor import blind_floor, training_questions, training_reading
from research.shapes_vqa.dense_targets import SHOWN_KINDS, dense_targets
from research.shapes_vqa.references import REFERENCES

pytestmark = pytest.mark.once

MODELS = pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
SCENES = [make_scene((splits.VALIDATION, index)) for index in range(200)]
SIGN_SCENES = [make_sign_scene((splits.VALIDATION, index)) for index in range(200)]


def shape(kind="circle", colour="red", digit=None, x=40.0, y=40.0, radius=15.0):
    return Shape(kind, colour, digit, x, y, radius)


def answers(*shapes):
    return {question.text: question.answer for question in questions_about(Scene(200, 200, shapes, (0,)))}


def test_a_seed_is_a_scene_and_splits_never_meet():
    assert make_scene((1, 7)) == make_scene((1, 7))
    assert np.array_equal(draw(make_scene((1, 7))), draw(make_scene((1, 7))))
    assert len({splits.TRAINING, splits.VALIDATION, splits.TEST, splits.PRACTICE, splits.CALIBRATION, splits.CONFIRMATION}) == 6
    assert len({make_scene((split, index)).shapes for split in range(3) for index in range(20)}) == 60


def test_scenes_and_questions_without_signs_stay_what_they_were():
    """Every committed result is about them. These sums are from before there were signs."""
    told = hashlib.sha256()
    for split in range(6):
        for index in range(20):
            scene = make_scene((split, index))
            told.update(repr((scene.height, scene.width, scene.shapes, scene.seed)).encode())
            told.update(repr([tuple(question) for question in questions_about(scene)]).encode())
    scene = make_practice_scene((3, 1))
    told.update(repr((scene.height, scene.width, scene.shapes, scene.seed)).encode())
    told.update(repr([(asked.number, tuple(asked.question)) for asked in held_out_questions(300)]).encode())
    assert told.hexdigest() == "5a393f57d01cc410823ef8995cba90aef3d9d5acf76e2d19029a358f66781697"


def test_images_of_held_out_questions_stay_what_they_were():
    """Pixels of all questions that `hivtp evaluate` asks."""
    assert load_data(None, 2000).sha256 == "4fc7af5cb67268f4ebe15ac017939ce2ed0dffebaff657b3081753658793c50d"


def test_shapes_lie_apart_and_inside():
    for scene in SCENES:
        for index, one in enumerate(scene.shapes):
            assert one.radius < one.x < scene.width - one.radius
            assert one.radius < one.y < scene.height - one.radius
            for other in scene.shapes[:index]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_every_pinpoint_shape_and_un_padding_occur():
    layouts = [REFERENCES["shapes-llava-next"].layout_of(None, scene.height, scene.width) for scene in SCENES]
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


@MODELS
def test_labels_of_cells(reference):
    processor = reference.make_processor(reference.make_config())
    for scene in SCENES[:60]:
        layout = reference.layout_of(processor, scene.height, scene.width)
        targets = dense_targets(scene, layout)
        assert len(targets.positions) == int(layout.valid.sum())
        boxes = layout.pixel_boxes(targets.positions)
        for index, one in enumerate(scene.shapes):
            of_shape = targets.shape == index
            assert bool(of_shape.any())
            assert set(targets.kind[of_shape].tolist()) == {SHOWN_KINDS.index(one.kind)}
            assert set(targets.colour[of_shape].tolist()) == {list(COLOURS).index(one.colour)}
            centre = (boxes[of_shape, :2] + boxes[of_shape, 2:]) / 2
            assert float((centre - torch.tensor([one.x, one.y])).norm(dim=1).max()) < 1.7 * one.radius
        assert set(targets.kind[targets.shape < 0].tolist()) == {len(SHOWN_KINDS)}
        # Each shape's centre lies in one cell of the image, which is shown twice where there is a base tile.
        assert int(targets.is_centre.sum()) == len(scene.shapes) * (2 if reference.has_base_tile else 1)


@MODELS
def test_labels_of_signs(reference):
    processor, labelled = reference.make_processor(reference.make_config()), []
    for scene in SIGN_SCENES[:40]:
        layout = reference.layout_of(processor, scene.height, scene.width)
        targets = dense_targets(scene, layout)
        boxes = layout.pixel_boxes(targets.positions)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        for index, sign in enumerate(scene.signs):
            of_sign = targets.sign == index
            assert bool(of_sign.any())
            assert set(targets.kind[of_sign].tolist()) == {SHOWN_KINDS.index("sign")}
            assert set(targets.colour[of_sign].tolist()) == {list(COLOURS).index(sign.colour)}
            width, _ = sign.size
            near = ((centres - torch.tensor([sign.x, sign.y])).abs() < torch.tensor([width, width]) / 2 + 16).all(1)
            for place, character in enumerate(sign.code):
                shows = targets.characters[:, place] == CHARACTERS.index(character)
                labelled.append(bool((shows & near).any()))
        nothing = (targets.characters == len(CHARACTERS)).all(1)
        assert bool(nothing[~targets.is_shown].float().mean() > 0.98)
        # What is asked about an image of another size lies in the same places.
        size = round(1.3 * scene.height), round(1.3 * scene.width)
        larger = dense_targets(scene, reference.layout_of(processor, *size), size[1] / scene.width)
        assert set(larger.sign.tolist()) == set(targets.sign.tolist())
    # In larger cells a small character that lies on a border may have too little of either.
    assert sum(labelled) >= (1 if reference.has_base_tile else 0.9) * len(labelled) > 200


@MODELS
def test_every_word_and_every_character_is_one_token(reference):
    tokenizer = reference.make_processor(reference.make_config()).tokenizer
    for scene in (*SCENES[:100], *SIGN_SCENES[:100]):
        for question in questions_about(scene):
            ids = tokenizer(f"{question.text} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            words = len(question.answer) if question.type == READING else 1
            assert tokenizer.decode(ids[-words:]) == question.answer
            assert len(ids) == len(question.text.split()) + 1 + words  # a question mark is a token
    for code in CODES[::7]:
        assert tokenizer.decode(tokenizer(code.upper())["input_ids"]) == code


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


def test_signs_lie_apart_and_inside_in_many_sizes_faces_and_angles():
    for scene in SIGN_SCENES:
        for index, sign in enumerate(scene.signs):
            across, down = sign.reach
            assert across < sign.x < scene.width - across
            assert down < sign.y < scene.height - down
            for other in scene.signs[:index]:
                assert abs(sign.x - other.x) > across + other.reach[0] or abs(sign.y - other.y) > down + other.reach[1]
            for one in scene.shapes:
                assert not sign.covers(np.array([one.x]), np.array([one.y])).any()
        assert len({sign.colour for sign in scene.signs}) == len(scene.signs)
    signs = [sign for scene in SIGN_SCENES for sign in scene.signs]
    assert {len(scene.signs) for scene in SIGN_SCENES} == {1, 2, 3, 4}
    assert {sign.face for sign in signs} == set(range(len(FACES)))
    assert {sign.height for sign in signs} == set(range(SMALLEST, LARGEST + 1))
    turned = sum(sign.angle != 0 for sign in signs) / len(signs)
    assert 0.4 < turned < 0.6
    assert len(make_sign_practice_scene((splits.PRACTICE, 0)).signs) > 4


def test_a_sign_has_its_colour_and_its_code_in_the_image():
    plain = Sign("k7x", "red", 60, 40, 20, 0, 0.0)
    seed = SIGN_SCENES[0].seed
    with_sign, without = (draw(Scene(80, 120, (), seed, signs)) for signs in ((plain,), ()))
    changed = np.abs(np.asarray(with_sign, dtype=int) - np.asarray(without, dtype=int)).sum(2) > 60
    rows, columns = np.mgrid[:80, :120] + 0.5
    assert (changed == plain.covers(columns, rows)).mean() > 0.98
    light = np.asarray(with_sign.convert("RGB"), dtype=float).min(2)
    for number, character in enumerate("k7x"):
        left = 60 + (number - 1) * 18 - 8
        seen = light[30:50, left : left + 16]
        fits = {}
        for candidate in CHARACTERS:
            mask = glyph(candidate, 0, 20)
            mask = mask.resize((min(14, mask.width), 20))
            square = Image.new("L", (16, 20))
            square.paste(mask, (8 - mask.width // 2, 0))
            fits[candidate] = np.corrcoef(seen.ravel(), np.asarray(square, dtype=float).ravel())[0, 1]
        assert max(fits, key=fits.get) == character
    # Turned against the clock, the first character comes to lie lower than the last one.
    turned = Sign("k7x", "red", 60, 40, 20, 0, 12.0)
    on = turned.character_at(columns, rows)
    assert rows[on == 0].mean() > rows[on == 2].mean() + 3
    white = np.asarray(draw(Scene(80, 120, (), seed, (turned,)))).min(2) > 200
    assert (turned.character_at(columns, rows)[white & turned.covers(columns, rows)] >= 0).mean() > 0.9


def test_what_is_asked_about_signs():
    def sign(code, colour, x, y):
        return Sign(code, colour, x, y, 12, 0, 0.0)

    scene = Scene(200, 200, (shape(),), (0,), (sign("k7x", "red", 40, 150), sign("2hh", "blue", 120, 140)))
    assert {question.text: question.answer for question in questions_about(scene)} == {
        "What is written on the red sign?": "k7x",
        "What is written on the blue sign?": "2hh",
        "What is written on the left sign?": "k7x",
        "What is written on the right sign?": "2hh",  # they are about as high
    }
    assert {question.type for question in questions_about(scene)} == {READING}


def test_codes_are_balanced_and_cannot_be_guessed():
    asked = [held_out.question for held_out in held_out_reading(2000)]
    assert asked[:10] == [held_out.question for held_out in held_out_reading(10)]
    for place in range(3):
        counts = np.unique([question.answer[place] for question in asked], return_counts=True)
        assert set(counts[0]) == set(CHARACTERS)
        # Six digits of ten letters' share, as a code has one of each at least.
        assert counts[1].max() < 2.2 * counts[1].min()
    assert all(set(code) & set(DIGITS) and set(code) & set(LETTERS) for code in CODES)
    rows = blind_floor(training_reading(500), asked)
    assert [row.question_type for row in rows] == ["all", READING]
    assert rows[0].n == 2000
    assert rows[0].correct / rows[0].n < 0.01


def test_signs_of_splits_never_meet():
    assert len({make_sign_scene((split, index)).signs for split in range(6) for index in range(20)}) == 120


def test_exported_reading_comes_behind_the_other_questions(tmp_path, run_main):
    run = run_main(export.main, tmp_path / "data", "--questions", 6, "--reading", 5)
    assert run.returncode == 0, run.stderr
    rows = load_data(tmp_path / "data", None).rows
    assert [row.question for row in rows[:6]] == [row.question for row in held_out_rows(6)]
    assert [(row.question, row.answer) for row in rows[6:]] == [asked.question[1:3] for asked in held_out_reading(5)]
    assert {row.question_type for row in rows[6:]} == {READING}
