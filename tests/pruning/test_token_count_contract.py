"""What serving engines rely on: three ways to count an image's tokens, one number, for any size.

Real geometry: 336-pixel tiles, 24 x 24 cells, five pinpoints. The tower is shallow, since only numbers matter here.
"""

import math
import random

import pytest
import torch
from PIL import Image

from nightly import mostly_nightly
from oracle import oracle_inputs
from tiny_models import LOW_RATIO, TOWERS, image_inputs, photo, twins

CHUNKS = 10
SIZES_PER_CHUNK = 54
PRUNING = [
    {"importance_start_layer": 0, "importance_num_layers": 1, **settings}
    for settings in (
        {},
        {"retention_ratio": 2 / 9},
        {"retention_ratio": 0.35, "keep_newlines": False},
        {"retention_ratio": 1.0},
    )
]


def random_sizes(seed):
    """Sides from 5 to 6000 pixels, evenly over orders of magnitude: all aspect ratios, and few enormous areas."""
    generator = random.Random(seed)

    def side():
        return round(math.exp(generator.uniform(math.log(5), math.log(6000))))

    return [(side(), side()) for _ in range(SIZES_PER_CHUNK - 4)] + [(5, 6000), (6000, 5), (5, 5), (3001, 2999)]


SHALLOW = {"vision_layers": 1, "vision_width": 32, "text_layers": 1, "text_width": 32}


def announced_written_and_features(pair, height, width):
    """The three numbers for one image; the first is a list, as serving engines ask for several images at once."""
    announced = pair.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    assert len(announced["num_image_patches"]) == 1
    inputs = pair.processor(images=Image.new("RGB", (width, height)), text="<image>", return_tensors="pt")
    written = int((inputs.input_ids == pair.pruned.config.image_token_id).sum())
    with torch.no_grad():
        features = pair.pruned.model.get_image_features(**image_inputs(inputs)).pooler_output
    assert isinstance(features, list)
    assert len(features) == 1
    assert features[0].shape[1] == pair.pruned.config.text_config.hidden_size
    return announced["num_image_tokens"], written, features[0].shape[0]


@pytest.fixture(scope="module")
def pair():
    return twins(PRUNING[0], tile_size=336, patch_size=14, **SHALLOW)


@pytest.mark.releases
@pytest.mark.parametrize("chunk", mostly_nightly(range(CHUNKS), lambda chunk: chunk == 0))
def test_processor_placeholders_and_features_agree(pair, chunk):
    for number, (height, width) in enumerate(random_sizes(chunk)):
        settings = PRUNING[number % len(PRUNING)]
        pair.pruned.config.pruning_config = pair.processor.pruning_config = settings
        announced, written, features = announced_written_and_features(pair, height, width)
        assert announced == [written] == [features], (height, width, settings)


# In LLaVA-1.5 all images count alike; what differs is the tower, by which these are the tokens beside one per cell.
EXTRA_TOKENS = {"LLaVA-1.5, CLIP": 0, "LLaVA-1.5, CLIP, full": 1, "LLaVA-1.5, SigLIP": 0, "LLaVA-1.5, SigLIP, default": -1}
# What of a tile fills no patch is left out.
GRIDS = {"336 / 14": ({"tile_size": 336, "patch_size": 14}, 24), "60 / 7": ({"tile_size": 60, "patch_size": 7}, 8)}
# Stock's CLIP processor blows the shorter side up to a tile's before it cuts, so that no image here is very long.
SINGLE_TILE_SIZES = [(60, 100), (336, 336), (5, 50), (1, 1), (1201, 800), (337, 335), (90, 9), (301, 2000)]


@pytest.mark.releases
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tower", EXTRA_TOKENS)
def test_processor_placeholders_and_features_agree_for_single_tiles(tower, grid):
    geometry, cells_per_side = GRIDS[grid]
    pair = twins(PRUNING[0], **TOWERS[tower], **geometry, **SHALLOW)
    for number, (height, width) in enumerate(SINGLE_TILE_SIZES):
        settings = PRUNING[number % len(PRUNING)]
        pair.pruned.config.pruning_config = pair.processor.pruning_config = settings
        announced, written, features = announced_written_and_features(pair, height, width)
        assert announced == [written] == [features], (height, width, settings)
        if settings.get("retention_ratio") == 1:
            assert written == cells_per_side**2 + EXTRA_TOKENS[tower]
            inputs = pair.stock_processor(images=Image.new("RGB", (width, height)), text="<image>", return_tensors="pt")
            assert inputs["input_ids"].shape[1] == written
            assert len(pair.stock.model.get_image_features(inputs["pixel_values"]).pooler_output[0]) == written
            if "CLIP" in tower:  # stock announces nothing where its image processor does not crop
                assert pair.stock_processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"] == announced
    sizes = [size for chunk in range(CHUNKS) for size in random_sizes(chunk)]
    announced = pair.processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert announced["num_image_tokens"] == [written] * len(sizes)
    assert announced["num_image_patches"] == [1] * len(sizes)


@pytest.mark.parametrize("tower", ["LLaVA-1.5, CLIP", "LLaVA-1.5, SigLIP"])
def test_what_of_a_tile_fills_no_patch_takes_no_part(tower):
    """60 / 7: 8 cells of 7 pixels, and 4 pixels left."""
    pair = twins(LOW_RATIO, **TOWERS[tower], **GRIDS["60 / 7"][0])
    inputs = pair.processor(images=photo(90, 130), text="<image> What is shown?", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (60, 60)
    cut = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    cut["pixel_values"][..., 56:, :] = cut["pixel_values"][..., 56:] = 0
    expected = pair.stock(**oracle_inputs(pair, inputs)).logits
    for given in (inputs, cut):
        torch.testing.assert_close(pair.pruned(**given).logits, expected, atol=1e-4, rtol=0)
    cut["pixel_values"][..., 55:, :] = 0
    assert (pair.pruned(**cut).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize(("height", "width", "images"), [(60, 100, 1), (100, 60, 2)])
def test_images_that_do_not_become_square_are_refused(height, width, images):
    """As stock's LLaVA-1.5 processor makes them where it is told not to crop."""
    pair = twins(LOW_RATIO, family="llava")
    pair.processor.image_processor.do_center_crop = False
    with pytest.raises(ValueError, match=r"no square of cells; pruning needs square images.*`crop_size`"):
        pair.processor(images=[photo(height, width)] * images, text="<image>" * images, return_tensors="pt")


def test_sizes_may_come_with_the_call():
    """Of an image processor's `size` and `crop_size` those of the call count, announced and written alike."""
    pair = twins(LOW_RATIO, family="llava")
    before = pair.processor._get_num_multimodal_tokens([(60, 100)])["num_image_tokens"]
    sizes = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
    announced = pair.processor._get_num_multimodal_tokens([(60, 100), (84, 84)], **sizes)["num_image_tokens"]
    asked = {"text": "<image><image>", "return_tensors": "pt", **sizes}
    inputs = pair.processor(images=[photo(60, 100), photo(84, 84)], **asked)
    written = int((inputs["input_ids"] == pair.pruned.config.image_token_id).sum())
    assert sum(announced) == written == 2 * 36
    assert pair.processor._get_num_multimodal_tokens([(60, 100)])["num_image_tokens"] == before == [16]
    # A call's own budget is that of its images, one by one.
    inputs = pair.processor(images=[photo(60, 100), photo(84, 84)], **asked, retention_ratio=[0.5, 1.0])
    assert int((inputs["input_ids"] == pair.pruned.config.image_token_id).sum()) == 72 + 144
