"""LLaVA-NeXT over towers that leave a rest of each tile, as Granite Vision's SigLIP of 384 pixels with patches of 14 does."""

import random

import pytest
import torch

from hivtp_hf import Evidence, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.pruning.evidence import methods_of
from hivtp_hf.pruning.registry import METHODS
from oracle import oracle_inputs
from tiny_checkpoint import tiny_config
from tiny_models import FAMILIES, SIGLIP, image_inputs, photo, pruned_config, twins

NEXT = FAMILIES["llava_next"]
# Granite Vision's pinpoints: up to ten tiles.
PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 11) for columns in range(1, 11) if rows * columns <= 10]


def granite(pruning=None, **geometry):
    """A rest of 2 of 58 pixels, and features of several layers at once, the last one included."""
    return twins(
        pruning,
        vision_feature_layer=[-9, -5, -1],
        family="llava_next",
        tile_size=58,
        patch_size=7,
        pinpoints=[[58, 116], [116, 58], [116, 116], [174, 58], [58, 174]],
        **SIGLIP,
        **geometry,
    )


def test_counts_over_random_sizes_equal_stocks():
    """Of true geometry, 27 x 27 cells a tile: the layout and what stock packs."""
    config = tiny_config(tile_size=384, patch_size=14, pinpoints=PINPOINTS, **SIGLIP)
    with torch.device("meta"):
        stock = NEXT.stock_base(config)
        ours = NEXT.base(pruned_config(config, {"retention_ratio": 0.5}))
    draw = random.Random(0)
    for _ in range(500):
        height, width = draw.randint(1, 4000), draw.randint(1, 4000)
        layout = TokenLayout.from_image_size(
            height, width, VisualTokenPruningConfig("none"), tile_size=384, patch_size=14, pinpoints=PINPOINTS
        )
        tiles = torch.empty(layout.num_views, 729, 1, device="meta")
        (packed,), _ = stock.pack_image_features(
            [tiles], [[height, width]], "full", image_newline=torch.empty(1, device="meta")
        )
        assert len(packed) == layout.num_stock == ours.token_layout(height, width).num_stock, (height, width)


@pytest.mark.parametrize("method", methods_of({Evidence.RECEIVED_ATTENTION, Evidence.FEATURES}))
def test_answers_equal_the_oracle(method):
    budget = {} if METHODS[method].keeps_everything else {"retention_ratio": 0.4}
    layers = {"importance_layers": [3, 4]} if method == "hivtp" else {"object_layer": 5} if method == "hiprune" else {}
    pair = granite({"method": method, **budget, **layers})
    images = [photo(100, 60), photo(60, 170, seed=1)]
    text = ["USER: <image>\nWhat? ASSISTANT:"] * 2
    inputs = pair.processor(images=images, text=text, padding=True, return_tensors="pt")
    stocks = pair.stock_processor(images=images, text=text, padding=True, return_tensors="pt")
    packed = pair.stock.get_image_features(**image_inputs(stocks)).pooler_output
    layouts = [pair.processor.token_layout(image.height, image.width) for image in images]
    assert [len(features) for features in packed] == [layout.num_stock for layout in layouts]
    assert int((stocks["input_ids"] == 3).sum()) == sum(layout.num_stock for layout in layouts)
    given = oracle_inputs(pair, inputs)
    with torch.no_grad():
        expected, found = pair.stock(**given).logits, pair.pruned(**inputs).logits
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[is_token], expected[is_token], atol=2e-5, rtol=2e-5)


def test_cells_lie_beside_the_rest():
    layout = TokenLayout.from_image_size(
        768, 768, VisualTokenPruningConfig("none"), tile_size=384, patch_size=14, pinpoints=PINPOINTS
    )
    boxes = layout.pixel_boxes(layout.cell_positions)
    # The base tile shows the image at half its size.
    assert boxes[728].tolist() == [728, 728, 756, 756]
    assert boxes[729:].view(54, 54, 4)[26:28, 26:28, 0].tolist() == [[364, 384], [364, 384]]
