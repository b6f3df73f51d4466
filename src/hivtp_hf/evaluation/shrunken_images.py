"""What enters the language model of images that were shrunk before the vision tower saw them.

Every tile is resized to fewer cells a side, and the tower runs on that as on any image of another size, with its position
embeddings interpolated. Tiles stay what they were of the whole image; crops are stitched, un-padded in the same proportions and
given a newline a row, as stock does. So an image costs about as many tokens as under a pruning method, and all of it is seen,
blurred.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaModel

from ..encoder_layers import ending_early, wanting_features_only
from ..pruning_config import VisualTokenPruningConfig
from ..token_layout import TokenLayout
from .kept_tokens import KeptTokens

_UNPRUNED = VisualTokenPruningConfig(method="none")


def shrunken_layout(stock: TokenLayout, grid: int, patch_size: int) -> TokenLayout:
    """How the tokens of an image lie whose tiles have another number of cells a side.

    Args:
        stock: the unpruned layout of the image.
        grid: cells per side of a shrunken tile.
        patch_size: side of a cell in pixels.
    """
    if stock.num_tiles == 1:
        return TokenLayout.single_tile(grid, _UNPRUNED, extra_tokens=stock.num_stock - stock.grid**2)
    height, width = stock.image_size or (0, 0)
    tile_size = grid * patch_size
    # The crops of the image as it was, whichever ones its size would choose among smaller tiles.
    pinpoint = stock.tile_rows * tile_size, stock.tile_columns * tile_size
    return TokenLayout.from_image_size(
        height, width, _UNPRUNED, tile_size=tile_size, patch_size=patch_size, pinpoints=[pinpoint]
    )


@torch.no_grad()
def shrunken_tokens(model: Any, inputs: Mapping[str, Any], stock: Sequence[TokenLayout], grid: int) -> list[KeptTokens]:
    """What enters the language model of every image, from a pass of the tower over shrunken tiles.

    Args:
        model: a pruned model with a language modelling head.
        inputs: of the processor for the images.
        stock: their unpruned layouts.
        grid: cells per side of a shrunken tile.

    Raises:
        ValueError: where features are not finite.
    """
    base = model.model
    patch_size = base.config.vision_config.patch_size
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:  # images with fewer tiles are padded
        pixels = torch.cat([tiles[: layout.num_tiles] for tiles, layout in zip(pixels, stock, strict=True)])
    features = _features_of_tiles(base, _resized(pixels, grid * patch_size))
    images = features.split([layout.num_tiles for layout in stock])
    kept = []
    for tiles, layout in zip(images, stock, strict=True):
        shrunken = shrunken_layout(layout, grid, patch_size)
        packed = tiles[0] if shrunken.num_tiles == 1 else _packed(tiles, shrunken, base.image_newline)
        patches = shrunken.num_stock - shrunken.num_newlines - shrunken.num_class_tokens
        kept.append(KeptTokens(packed, patches, shrunken.num_newlines))
    return kept


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Tiles (tiles, channels, height, width) at so many pixels a side, without the moiré of dropped pixels."""
    size = (side, side)
    return torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)


def _features_of_tiles(base: Any, pixels: Tensor) -> Tensor:
    """The projected features of every tile, (tiles, tokens, hidden)."""
    # LLaVA-1.5's own way, which takes every tile for an image and packs nothing. LLaVA-NeXT's differs in packing alone.
    stock = functools.partial(LlavaModel.get_image_features, base, pixels, return_dict=True, interpolate_pos_encoding=True)
    with wanting_features_only():
        output = ending_early(stock, base.config.vision_config, base.config.vision_feature_layer, ())()
    features = torch.stack(list(output.pooler_output))
    if not bool(features.isfinite().all()):
        raise ValueError(
            "the vision tower returned visual features that are not finite. Load it in another dtype, such as float32."
        )
    return features


def _packed(tiles: Tensor, layout: TokenLayout, newline: Tensor) -> Tensor:
    """The features of an image's tiles (tiles, cells, hidden) in the order in which stock packs them."""
    packed = newline.to(tiles).expand(layout.num_stock, -1).clone()
    positions = layout.cell_positions
    tile, row, column = layout.cells(positions).unbind(1)
    packed[positions.to(packed.device)] = tiles[tile, row * layout.grid + column]
    return packed
