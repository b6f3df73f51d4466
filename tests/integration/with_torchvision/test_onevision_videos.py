"""LLaVA-OneVision's videos by transformers' own video processor: pruned, and at a ratio of 1 those of stock."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from examples.tiny_onevision_checkpoint import onevision_parts
from hivtp_hf.families.video_processing import FramesProcessor
from tiny_models import Twins, photo
from tiny_onevision import FAMILY, save_stock_onevision_checkpoint, video_oracle

TEXT = "USER: <video>\nWhat happens? ASSISTANT:"
# Fields that a checkpoint on the Hub has, with a value that is not the default.
VIDEO_PART = {"video_processor_type": "LlavaOnevisionVideoProcessor", "image_mean": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Models, and processors of both kinds that are loaded from one stock folder."""
    folder = tmp_path_factory.mktemp("stock")
    twins = save_stock_onevision_checkpoint(folder)
    side = twins.stock.config.vision_config.image_size
    settings = {**VIDEO_PART, "size": {"height": side, "width": side}}
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "video_processor": settings}))
    processors = [kind.from_pretrained(folder) for kind in (FAMILY.stock_processor, FAMILY.processor)]
    return Twins(FAMILY, twins.stock, processors[0], twins.pruned, processors[1])


def clip(frames=6, seed=0):
    return np.stack([np.asarray(photo(70, 90, seed=100 * seed + number)) for number in range(frames)])


def inputs_of(processor, **options):
    return processor(
        videos=[clip(), clip(seed=1)], text=[TEXT] * 2, padding=True, return_tensors="pt", do_sample_frames=False, **options
    )


def use(pair, ratio, scope="frame"):
    pair.processor.pruning_config = pair.pruned.config.pruning_config = {
        "method": "hivtp",
        "retention_ratio": ratio,
        "video_scope": scope,
    }


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_a_ratio_of_one_is_stock(pair):
    use(pair, 1)
    stock, ours = inputs_of(pair.stock_processor), inputs_of(pair.processor)
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert torch.equal(logits(pair.pruned, ours), logits(pair.stock, stock))


@pytest.mark.parametrize("scope", ["frame", "video"])
def test_pruned_videos_equal_the_oracle(pair, scope):
    use(pair, 0.3, scope)
    stock, ours = inputs_of(pair.stock_processor), inputs_of(pair.processor)
    assert torch.equal(stock["pixel_values_videos"], ours["pixel_values_videos"])
    placeholders = (ours["input_ids"] == pair.pruned.config.video_token_id).sum(1).tolist()
    assert placeholders == [pair.processor.video_token_layout(6).num_retained] * 2
    assert 0 < placeholders[0] < int((stock["input_ids"][0] == pair.stock.config.video_token_id).sum()) / 2
    expected = logits(pair.stock, video_oracle(pair, ours))
    torch.testing.assert_close(logits(pair.pruned, ours), expected, atol=2e-5, rtol=2e-5)
    told = video_oracle(pair, ours)
    answer = pair.stock.generate(**told, max_new_tokens=4, do_sample=False)
    output = pair.pruned.generate(**ours, max_new_tokens=4, do_sample=False)
    assert torch.equal(output[:, ours["input_ids"].shape[1] :], answer)


def test_frames_are_sampled_before_they_are_counted(pair):
    use(pair, 0.3)
    inputs = pair.processor(videos=[clip(8)], text=[TEXT], return_tensors="pt", do_sample_frames=True, num_frames=4)
    assert inputs["pixel_values_videos"].shape[1] == 4
    written = int((inputs["input_ids"] == pair.pruned.config.video_token_id).sum())
    assert written == pair.processor.video_token_layout(4).num_retained


def test_settings_of_videos_survive(pair, tmp_path):
    pair.processor.save_pretrained(tmp_path)
    again = [kind.from_pretrained(tmp_path).video_processor.to_dict() for kind in (FAMILY.processor, FAMILY.stock_processor)]
    assert again[0] == again[1] == pair.stock_processor.video_processor.to_dict()
    assert list(again[0]["image_mean"]) == VIDEO_PART["image_mean"]


def test_what_stands_in_without_torchvision_makes_nearly_the_same(pair):
    """Pillow resizes whole numbers, torchvision fractions that are rounded at the end."""
    own = FramesProcessor(onevision_parts(pair.stock.config)["image_processor"], pair.processor.video_processor.to_dict())
    pixels = own([list(clip())], return_tensors="pt")["pixel_values_videos"]
    expected = pair.processor.video_processor([clip()], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == expected.shape
    step = 1 / 255 / 0.5  # one of 256 levels, once it is normalised
    assert (pixels - expected).abs().max() <= 2.5 * step
