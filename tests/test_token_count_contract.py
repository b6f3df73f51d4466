"""What serving engines rely on: three ways to count an image's tokens, one number, for any size.

Real geometry: 336-pixel tiles, 24 x 24 cells, five pinpoints. The tower is shallow, since only numbers matter here.
"""

import math
import random

import pytest
import torch
from PIL import Image

from tiny_models import twins

CHUNKS = 5
SIZES_PER_CHUNK = 104
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


@pytest.fixture(scope="module")
def pair():
    return twins(PRUNING[0], tile_size=336, patch_size=14, vision_layers=1, vision_width=32, text_layers=1, text_width=32)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_processor_placeholders_and_features_agree(pair, chunk):
    model, processor = pair.pruned, pair.processor
    sizes = random_sizes(chunk)
    for number, (height, width) in enumerate(sizes):
        settings = PRUNING[number % len(PRUNING)]
        model.config.pruning_config = processor.pruning_config = settings
        announced = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
        inputs = processor(images=Image.new("RGB", (width, height)), text="<image>", return_tensors="pt")
        written = int((inputs.input_ids == model.config.image_token_id).sum())
        with torch.no_grad():
            features = model.model.get_image_features(inputs.pixel_values, inputs.image_sizes).pooler_output
        assert isinstance(features, list)
        assert len(features) == 1
        assert announced == [written] == [features[0].shape[0]], (height, width, settings)
        assert features[0].shape[1] == model.config.text_config.hidden_size
