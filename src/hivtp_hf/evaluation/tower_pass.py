"""What enters the language model of some images, under every variant: from one pass of the vision tower over the images.

Shrunken images alone need passes of their own. Every tile is resized to fewer cells a side, and the tower runs on that as on
any image of another size, with its position embeddings interpolated. Tiles stay what they were of the whole image; crops are
stitched, un-padded in the same proportions and given a newline a row, as stock does. So an image costs about as many tokens as
under a pruning method, and all of it is seen, blurred.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlavaModel

from ..pruning.encoder_layers import without_unread_layers
from ..pruning.features import choose_and_merge, cut_and_merge, weigh_features
from ..pruning.layout import TokenLayout
from ..pruning.look import Look
from ..pruning.prompt_columns import PromptColumns, columns_of_images
from ..pruning.registry import pruning_method
from ..pruning.settings import VisualTokenPruningConfig

_UNPRUNED = VisualTokenPruningConfig(method="none")


def see(model: Any, inputs: Mapping[str, Any], prunings: Iterable[VisualTokenPruningConfig]) -> Look:
    """Runs the vision tower once over some images, and takes along what all methods look at.

    Args:
        model: a pruned model with a language modelling head. Its own settings play no part.
        inputs: of the processor for the images.
        prunings: the settings of all methods.

    Raises:
        ValueError: for settings that do not fit the tower, and where features or scores are not finite.
    """
    look = model.look(inputs, prunings=list(prunings))
    check_finite("the vision tower's visual features", look.features)
    for scores in (look.received, look.class_attention):
        check_finite("the vision tower's attention scores", scores.values())
    return look


class KeptTokens(NamedTuple):
    """What enters the language model of one image.

    Attributes:
        features: (tokens, hidden), in order.
        patches: how many of them show a part of the image.
        newlines: how many are newlines. What is neither is a class token.
        places: where they stand and what they weigh, as one row; None where the settings say nothing of that.
    """

    features: Tensor
    patches: int
    newlines: int
    places: PromptColumns | None = None


@torch.no_grad()
def pruned_tokens(seen: Look, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """What the method of the layouts keeps of every image.

    Args:
        seen: the images.
        layouts: of every image, under one method's settings.

    Raises:
        ValueError: where the method keeps other tokens than its settings say: what is broken must not pass for a bad method.
    """
    kept_of_images = []
    evidence = seen.evidence(layouts[0].pruning, layouts)
    all_kept, merged = choose_and_merge(evidence)
    all_features = cut_and_merge(seen.features, all_kept, merged, layouts)
    log_weights: Sequence[Tensor | None] = weigh_features(evidence, all_kept) or [None] * len(layouts)
    for features, kept, weights, layout in zip(all_features, all_kept, log_weights, layouts, strict=True):
        patches = check_kept_indices(kept, layout)
        # With `exact_count=False` fewer may be kept than there are placeholders, and zeros stand in front. Those take no part.
        own_features, places = features[len(features) - len(kept) :], None
        if layout.pruning.marks_columns:
            is_placeholder = torch.ones(1, len(kept), dtype=torch.bool, device=kept.device)
            num_stock = None if layout.pruning.positions == "packed" else [layout.num_stock]
            places = columns_of_images(is_placeholder, [kept], num_stock, None if weights is None else [weights])
        newlines = len(kept) - patches - layout.num_class_tokens
        kept_of_images.append(KeptTokens(own_features, patches, newlines, places))
    return kept_of_images


def base_tile_tokens(seen: Look, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """The base tile of every image of LLaVA-NeXT, which stock packs first: no crop, no newline."""
    cells = [layout.valid_per_view[0] for layout in layouts]
    return [KeptTokens(features[:number], number, 0) for features, number in zip(seen.features, cells, strict=True)]


def check_kept_indices(kept: Tensor, layout: TokenLayout) -> int:
    """How many patch tokens are kept; a ValueError where the kept positions are not what the layout's settings say.

    Args:
        kept: int64 (n,), positions in the packed sequence.
        layout: of the image.
    """
    cells, wanted = len(layout.cells(kept)), sum(layout.group_totals)
    newlines = len(kept) - cells - layout.num_class_tokens
    fits = cells == wanted if layout.pruning.exact_count else cells <= wanted
    if pruning_method(layout.pruning.method).counts_newlines:  # which of them stay is for the method to say
        fits = len(kept) == layout.num_retained if layout.pruning.exact_count else len(kept) <= layout.num_retained
    elif newlines != layout.num_newlines:
        fits = False
    if not fits or not bool((kept.diff() > 0).all()):
        raise ValueError(
            f"the method {layout.pruning.method!r} keeps {cells} patch tokens and {newlines} newlines, or not in their order; "
            f"{wanted} and {layout.num_newlines} were to be kept, ascending. Its selector is broken."
        )
    return cells


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


def check_finite(what: str, values: Iterable[Tensor]) -> None:
    """A ValueError unless all values are numbers; `what` names them."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"{what} are not finite. Load the model in another dtype, such as float32 or bfloat16.")
