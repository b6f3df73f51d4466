"""What `generate` is given of smaller images, which need a pass of the vision tower of their own.

Every tile is resized to fewer cells a side, and the tower runs on that as on any image of another size, with its position
embeddings interpolated. Tiles stay what they were of the whole image; crops are stitched, un-padded in the same proportions and
given a newline a row, as stock does. So an image costs about as many tokens as under a pruning method, and all of it is seen,
blurred. Models that take images at their own sizes see smaller images.

A smaller image may then be pruned by a method, which looks at it as at any image.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaModel

from ..pruning.encoder_layers import without_unread_layers
from ..pruning.layout import TokenLayout
from ..pruning.model import PrunedImageFeaturesOutput
from ..pruning.settings import VisualTokenPruningConfig
from .tower_pass import KeptTokens, check_finite, pruned_tokens, see

_UNPRUNED = VisualTokenPruningConfig(method="none")


def shrunken_layout(stock: TokenLayout, grid: int, patch_size: int) -> TokenLayout:
    """How the tokens of an image lie whose tiles have another number of cells a side.

    Args:
        stock: the unpruned layout of the image.
        grid: cells per side of a shrunken tile.
        patch_size: side of a cell in pixels.
    """
    if stock.num_views == 1:
        return TokenLayout.single_tile(
            grid, _UNPRUNED, has_class_token=stock.has_class_token, skips_first_cell=stock.skips_first_cell
        )
    height, width = stock.image_size or (0, 0)
    tile_size = grid * patch_size
    # The crops of the image as it was, whichever ones its size would choose among smaller tiles.
    crops = stock.parts[1]
    pinpoint = crops.down * tile_size, crops.across * tile_size
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
        pixels = torch.cat([tiles[: layout.num_views] for tiles, layout in zip(pixels, stock, strict=True)])
    features = _features_of_tiles(base, _resized(pixels, grid * patch_size))
    images = features.split([layout.num_views for layout in stock])
    kept = []
    for tiles, layout in zip(images, stock, strict=True):
        shrunken = shrunken_layout(layout, grid, patch_size)
        packed = tiles[0] if shrunken.num_views == 1 else _packed(tiles, shrunken, base.image_newline)
        patches = shrunken.num_stock - shrunken.num_newlines - shrunken.num_class_tokens
        encoded = PrunedImageFeaturesOutput(pooler_output=[packed])
        kept.append(KeptTokens(encoded, patches, shrunken.num_newlines, shrunken.num_stock, {}))
    return kept


@torch.no_grad()
def smaller_images_tokens(
    model: Any, processor: Any, images: Sequence[Any], stock: Sequence[TokenLayout], ratio: Fraction
) -> list[KeptTokens]:
    """What enters the language model of every image where each is made smaller, for models that take images at their own sizes.

    An image gets the largest size of its proportions that makes at most a ratio of its tokens, and at least one.

    Args:
        model: a pruned model with a language modelling head, whose settings prune nothing.
        processor: of the model.
        images: of Pillow.
        stock: their unpruned layouts.
        ratio: above 0 and below 1.

    Raises:
        ValueError: where features are not finite.
    """
    kept = []
    for image, layout in zip(images, stock, strict=True):
        inputs = _smaller(processor, image, max(1, math.floor(ratio * layout.num_stock))).to(model.device)
        encoded = model.model.get_image_features(**inputs, return_dict=True)
        check_finite("the vision tower's visual features", encoded.pooler_output)
        further = {name: inputs[name] for name in model.model.family.image_inputs[1:]}
        tokens = len(encoded.pooler_output[0])
        kept.append(KeptTokens(encoded, tokens, 0, tokens, further))
    return kept


def _smaller(processor: Any, image: Any, most: int) -> Any:
    """The inputs of an image at the largest size of its proportions that makes at most so many tokens."""
    image_processor = processor.image_processor
    cell = (image_processor.patch_size * image_processor.merge_size) ** 2
    size = {"shortest_edge": cell, "longest_edge": most * cell}
    return image_processor([image], size=size, return_tensors="pt")


@torch.no_grad()
def shrunken_and_pruned_tokens(
    model: Any,
    inputs: Mapping[str, Any],
    stock: Sequence[TokenLayout],
    grid: int,
    ratio: Fraction,
    pruning: VisualTokenPruningConfig,
) -> list[KeptTokens]:
    """What a method keeps of every image whose tiles were shrunken before, so that a ratio of its tokens is left in all.

    Args:
        model: a pruned model with a language modelling head, whose settings prune nothing.
        inputs: of the processor for the images.
        stock: their unpruned layouts.
        grid: cells per side of a shrunken tile.
        ratio: of the tokens of the images as they were.
        pruning: the method's settings, of which the ratio plays no part.

    Raises:
        ValueError: where features or scores are not finite.
    """
    base = model.model
    side = grid * base.config.vision_config.patch_size
    kept = []
    for number, layout in enumerate(stock):
        tiles = inputs["pixel_values"][number]
        # Images with fewer tiles are padded; LLaVA-1.5 has one tile, without an axis for it.
        several = tiles.ndim == 4
        resized = _resized(tiles[: layout.num_tiles] if several else tiles[None], side)
        own = {name: inputs[name][number : number + 1] for name in base.family.image_inputs[1:] if name in inputs}
        own["pixel_values"] = resized[None] if several else resized
        with _tiles_of(base, side, layout):
            kept += _pruned(model, own, layout, ratio, pruning)
    return kept


@torch.no_grad()
def smaller_images_pruned_tokens(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    stock: Sequence[TokenLayout],
    ratio: Fraction,
    pruning: VisualTokenPruningConfig,
) -> list[KeptTokens]:
    """The same for models that take images at their own sizes: each has at most the square root of a ratio of its tokens.

    Args:
        model, processor, images, stock: as for `smaller_images_tokens`.
        ratio, pruning: as for `shrunken_and_pruned_tokens`.

    Raises:
        ValueError: where features or scores are not finite.
    """
    kept = []
    for image, layout in zip(images, stock, strict=True):
        most = max(1, math.isqrt(math.floor(ratio * layout.num_stock**2)))
        inputs = _smaller(processor, image, most).to(model.device)
        kept += _pruned(model, inputs, layout, ratio, pruning)
    return kept


def _pruned(
    model: Any, inputs: Mapping[str, Any], stock: TokenLayout, ratio: Fraction, pruning: VisualTokenPruningConfig
) -> list[KeptTokens]:
    """What a method keeps of one smaller image: a share of its own tokens that is a ratio of those that the image had."""
    family, base = model.model.family, model.model
    (size,) = family.image_sizes(base, inputs)
    smaller = family.layout(base, size, _UNPRUNED, inputs)
    share = min(Fraction(1), Fraction(ratio) * _patches(stock) / _patches(smaller))
    settings = pruning.replace(retention_ratio=float(share))
    seen = see(model, inputs, [settings])
    return pruned_tokens(seen, [family.layout(base, size, settings, inputs)])


def _patches(layout: TokenLayout) -> int:
    """How many tokens of an unpruned image show a part of it."""
    return layout.num_stock - layout.num_newlines - layout.num_class_tokens


@contextlib.contextmanager
def _tiles_of(base: Any, side: int, stock: TokenLayout) -> Iterator[None]:
    """Within it a model has tiles of so many pixels a side, and an image the crops of its unpruned layout."""
    config, vision = base.config, base.config.vision_config
    before = vision.image_size, getattr(config, "image_grid_pinpoints", None)

    def interpolated(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    handle = base.vision_tower.register_forward_pre_hook(interpolated, with_kwargs=True)
    vision.image_size = side
    if before[1] is not None:
        # Whichever ones the image's size would choose among smaller tiles.
        crops = stock.parts[-1].of_tower[0]
        config.image_grid_pinpoints = [[crops.down * side, crops.across * side]]
    try:
        yield
    finally:
        handle.remove()
        vision.image_size = before[0]
        if before[1] is not None:
            config.image_grid_pinpoints = before[1]


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Tiles (tiles, channels, height, width) at so many pixels a side, without the moiré of dropped pixels."""
    size = (side, side)
    return torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)


def _features_of_tiles(base: Any, pixels: Tensor) -> Tensor:
    """The projected features of every tile, (tiles, tokens, hidden)."""
    # LLaVA-1.5's own way, which takes every tile for an image and packs nothing. LLaVA-NeXT's differs in packing alone.
    stock = functools.partial(LlavaModel.get_image_features, base, pixels, return_dict=True, interpolate_pos_encoding=True)
    output = without_unread_layers(stock, base.config.vision_config, base.config.vision_feature_layer, ())()
    features = torch.stack(list(output.pooler_output))
    check_finite("the vision tower's visual features", features)
    return features


def _packed(tiles: Tensor, layout: TokenLayout, newline: Tensor) -> Tensor:
    """The features of an image's tiles (tiles, cells, hidden) in the order in which stock packs them."""
    packed = newline.to(tiles).expand(layout.num_stock, -1).clone()
    positions = layout.cell_positions
    packed[positions.to(packed.device)] = tiles.flatten(0, 1)[layout.cell_numbers(positions).to(tiles.device)]
    return packed
