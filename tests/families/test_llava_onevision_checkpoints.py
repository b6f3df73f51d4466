"""LLaVA-OneVision's checkpoints: every layout of weights, files with and without a video part, remote code, commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from typer.testing import CliRunner

from checkpoints import KEY_LAYOUTS, run_without_package
from evaluations import ROWS, SIZES, data_folder, evaluated, plain_answer, table_of
from examples.tiny_onevision_checkpoint import CHAT_TEMPLATE, build_onevision_checkpoint
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.checkpoints.inspection import inspect_checkpoint
from hivtp_hf.cli import app
from hivtp_hf.figures import draw_kept_frames
from hivtp_hf.figures.kept_cells import CAPTION_HEIGHT, FRAME_SIDE, MARGIN
from tiny_models import photo
from tiny_onevision import FAMILY, SMALL, save_stock_onevision_checkpoint

PRUNING = {"method": "hivtp", "retention_ratio": 0.4}
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
VIDEO_PART = {"video_processor_type": "LlavaOnevisionVideoProcessor", "image_mean": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return build_onevision_checkpoint(tmp_path_factory.mktemp("saved"), pruning_config=PRUNING, **SMALL)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock checkpoint in files as the Hub has them, with stored settings of a video processor, and its models."""
    folder = tmp_path_factory.mktemp("stock")
    pair = save_stock_onevision_checkpoint(folder)
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "video_processor": VIDEO_PART}))
    return folder, pair


def answer(model, processor):
    inputs = processor(images=photo(170, 165), text=PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.parametrize("part", ["model", "base"])
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_every_layout_of_weights_loads_completely(stock, tmp_path, layout, part):
    folder, pair = stock
    weights = pair.stock.state_dict()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def renamed(key):
        pairs = KEY_LAYOUTS[layout].items()
        return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)

    save_file({renamed(key): value.clone() for key, value in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = getattr(FAMILY, part).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    prefix = "model." if part == "base" else ""
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[prefix + key]), key
    # And the way back, under the names that stock would write.
    if part == "model":
        model.save_pretrained(tmp_path / "again")
        FAMILY.stock_model.from_pretrained(tmp_path).save_pretrained(tmp_path / "stock again")
        names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("again", "stock again")]
        assert names[0] == names[1]


def test_a_stock_folder_loads_and_keeps_its_video_part(stock, tmp_path):
    folder, pair = stock
    processor = FAMILY.processor.from_pretrained(folder, pruning_config=PRUNING)
    model = FAMILY.model.from_pretrained(folder, pruning_config=PRUNING)
    pair.processor.pruning_config = pair.pruned.config.pruning_config = PRUNING
    assert answer(model, processor) == answer(pair.pruned, pair.processor)
    processor.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "processor_config.json").read_text())
    assert found["video_processor"] == VIDEO_PART
    again = FAMILY.processor.from_pretrained(tmp_path)
    assert again.pruning_config == processor.pruning_config
    assert again.video_processor.stored == VIDEO_PART
    assert (again.num_image_tokens, again.vision_aspect_ratio) == (64, "anyres_max_4")
    assert "pixel_values_videos" in again.model_input_names


def test_settings_of_videos_in_a_file_of_their_own(saved, tmp_path):
    """As older releases store them."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PART))
    assert FAMILY.processor.from_pretrained(tmp_path).video_processor.stored == VIDEO_PART


def test_through_auto_classes_and_a_pipeline(saved):
    processor, loaded = AutoProcessor.from_pretrained(saved), AutoModelForImageTextToText.from_pretrained(saved)
    assert (type(processor), type(loaded)) == (FAMILY.processor, FAMILY.model)
    assert type(AutoModel.from_pretrained(saved)) is FAMILY.base
    chat = [{"role": "user", "content": [{"type": "image", "image": photo(170, 165)}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[[photo(170, 165)]], text=[text], return_tensors="pt")
    expected = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    run = pipeline("image-text-to-text", model=loaded, processor=processor)
    (found,) = run(text=[chat], max_new_tokens=5, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert processor.chat_template == CHAT_TEMPLATE


def run_remote_code(folder, image):
    """In a process of its own, in which neither the package nor torchvision can be imported."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    frames = [Image.open(image)] * 3
    inputs = processor(videos=[frames], text=prompt.replace("image", "video"), return_tensors="pt")
    return [answer, model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()]


def test_remote_code_without_the_package(saved, tmp_path):
    image = tmp_path / "photo.png"
    photo(170, 165).save(image)
    model, processor = FAMILY.model.from_pretrained(saved), FAMILY.processor.from_pretrained(saved)
    of_image, of_video = run_without_package(run_remote_code, tmp_path / "work", folder=saved, image=image)
    assert of_image == answer(model, processor)
    inputs = processor(videos=[[photo(170, 165)] * 3], text=PROMPT.replace("image", "video"), return_tensors="pt")
    assert of_video == model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


def test_converted_with_and_without_weights(stock, tmp_path):
    folder, pair = stock
    pair.processor.pruning_config = pair.pruned.config.pruning_config = PRUNING
    expected = answer(pair.pruned, pair.processor)
    for name, config_only in (("whole", False), ("config only", True)):
        convert_checkpoint(str(folder), tmp_path / name, PRUNING, config_only=config_only, show_progress=False)
        assert (tmp_path / name / "model.safetensors").exists() is not config_only
        assert FAMILY.stock_model.__name__.removeprefix("Llava") in (tmp_path / name / "README.md").read_text()
        model, processor = FAMILY.model.from_pretrained(tmp_path / name), FAMILY.processor.from_pretrained(tmp_path / name)
        assert answer(model, processor) == expected


def test_inspected(stock):
    folder, pair = stock
    report = inspect_checkpoint(folder, [(170, 165), (60, 110)], {"retention_ratio": 0.4})
    wanted = [pair.processor.token_layout(*size, retention_ratio=0.4) for size in ((170, 165), (60, 110))]
    assert [(row.stock_tokens, row.retained_tokens) for row in report.sizes] == [
        (layout.num_stock, layout.num_retained) for layout in wanted
    ]


def test_drawn(saved, stock, tmp_path):
    """`hivtp visualize` and the pictures of frames: resampled cells and frames lie where the layout says."""
    image = tmp_path / "large.png"
    photo(340, 330).save(image)
    arguments = ("visualize", str(saved), str(image), "-o", str(tmp_path / "figures"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "figures" / "large_hivtp.png") as figure:
        assert np.ptp(np.asarray(figure.convert("L"))) > 200
    layout = stock[1].processor.video_token_layout(2, image_size=(320, 320))
    frames = [photo(320, 320, seed) for seed in (0, 1)]
    cell = torch.tensor([int(layout.cell_positions[16 + 5])])  # the second row and column of the second frame
    picture = draw_kept_frames(frames, layout, cell)
    left = MARGIN + (FRAME_SIDE + MARGIN)
    drawn = np.asarray(picture)[CAPTION_HEIGHT : CAPTION_HEIGHT + FRAME_SIDE, left : left + FRAME_SIDE]
    coloured = (drawn != drawn[..., :1]).any(-1)
    rows, columns = coloured.nonzero()
    # A cell is a quarter of 56 of 58 pixels.
    side = 320 * 56 / 58 / 4
    assert [rows.min(), columns.min()] == pytest.approx([side, side], abs=2)
    assert [rows.max(), columns.max()] == pytest.approx([2 * side, 2 * side], abs=2)
    with pytest.raises(ValueError, match="there must be a view for each frame"):
        draw_kept_frames(frames[:1], layout, cell)


def test_evaluated(stock, tmp_path):
    """Every method's answers from one pass of the tower are those of `generate`."""
    folder, _ = stock
    run = evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", methods="hivtp,gprune,none", ratios="1,0.4")
    processor, model = FAMILY.processor.from_pretrained(folder), FAMILY.model.from_pretrained(folder)
    photos = {name: photo(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}
    predictions = table_of(run.folder / "predictions.csv")
    for line in predictions:
        image, question, _, _ = ROWS[int(line["row"]) - 1]
        budget = {} if line["method"] == "none" else {"retention_ratio": float(line["ratio"])}
        pruning = {"method": line["method"], **budget}
        answer, tokens = plain_answer(model, processor, photos[image], question, pruning)
        assert (line["prediction"], int(line["patch_tokens"]) + int(line["newline_tokens"])) == (answer, tokens)
    assert len({line["prediction"] for line in predictions}) > 2
