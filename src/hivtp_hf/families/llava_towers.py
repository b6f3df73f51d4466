"""What LLaVA families share: an encoder that sees square tiles one by one, and features that are a hidden state of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..pruning.compat import side_of
from ..pruning.encoder_layers import without_unread_layers
from ..pruning.evidence import Evidence
from ..pruning.layout import TokenLayout
from ..pruning.processing import PrunedProcessorMixin
from ..pruning.settings import check_no_setting_among
from .base import Family, as_grey_levels

# Mean and standard deviation of red, green and blue that image processors go by, by the vision tower's type.
PIXEL_SCALES = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


class LlavaTowersFamily(Family):
    """A family over a `vision_tower` with `vision_feature_layer` and `vision_feature_select_strategy`."""

    provides = frozenset(
        {
            Evidence.RECEIVED_ATTENTION,
            Evidence.CLASS_ATTENTION,
            Evidence.ATTENTION_ROWS,
            Evidence.KEYS,
            Evidence.PIXELS,
            Evidence.FEATURES,
            Evidence.ENCODED,
        }
    )
    feature_arguments: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")

    def encoder(self, model: Any) -> nn.Module:
        return model.vision_tower

    def num_layers(self, config: Any) -> int:
        return config.vision_config.num_hidden_layers

    def feature_layer(self, config: Any, arguments: Mapping[str, Any]) -> int:
        given = feature_argument(config, arguments, "vision_feature_layer")
        # An index among the hidden states, of which the first enters the first layer; of a list the last one is meant.
        index = given if isinstance(given, int) else given[-1]
        return index - 1 if index >= 0 else self.num_layers(config) + index

    def provided_by(self, model: Any) -> frozenset[Evidence]:
        # CLIP puts a class token before the patches, SigLIP does not.
        names = (name.rpartition(".")[2] for name, _ in self.encoder(model).named_parameters())
        has_class_token = any(name in ("class_embedding", "cls_token") for name in names)
        provided = self.provides | {Evidence.CLASS_ATTENTION} if has_class_token else self.provides - {Evidence.CLASS_ATTENTION}
        return provided if model.config.vision_config.model_type in PIXEL_SCALES else provided - {Evidence.PIXELS}

    def ending_early(
        self, stock: Callable[..., Any], config: Any, arguments: Mapping[str, Any], layers: Sequence[int]
    ) -> Callable[..., Any]:
        feature_layer = feature_argument(config, arguments, "vision_feature_layer")
        return without_unread_layers(stock, config.vision_config, feature_layer, layers)

    def cell_scores(self, model: Any, scores: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
        of_tiles = torch.cat(list(scores)) if len(scores) > 1 else scores[0]
        parts = [part for layout in layouts for part in layout.parts]
        cells, tiles = parts[0].of_tower[0].rows * parts[0].of_tower[0].columns, sum(layout.num_tiles for layout in layouts)
        class_tokens = of_tiles.shape[1] - cells
        if of_tiles.shape[0] != tiles or class_tokens not in (0, 1):
            raise ValueError(
                f"the vision tower scored {of_tiles.shape[0]} tiles of {of_tiles.shape[1]} tokens; the images need {tiles} "
                f"tiles of {cells} cells, with or without a class token. Check `image_sizes` and the tower's image size."
            )
        of_cells = of_tiles[:, class_tokens:]
        if not any(part.resampled_from for part in parts):
            return of_cells.flatten(0, 1)
        of_parts = of_cells.split([sum(views.num_views for views in part.of_tower) for part in parts])
        return torch.cat([part.from_tower(values.flatten(0, 1)) for part, values in zip(parts, of_parts, strict=True)])

    def grey_levels(self, model: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> Tensor:
        vision, pixels = model.config.vision_config, arguments["pixel_values"]
        if pixels.ndim == 5:  # images with fewer tiles are padded
            pixels = torch.cat([tiles[: layout.num_tiles] for tiles, layout in zip(pixels, layouts, strict=True)])
        patch, (rows, columns) = vision.patch_size, layouts[0].view_shapes[0]
        levels = as_grey_levels(pixels, *PIXEL_SCALES[vision.model_type])
        # What of a tile fills no patch belongs to no cell.
        cells = levels[:, : rows * patch, : columns * patch].unflatten(2, (columns, patch)).unflatten(1, (rows, patch))
        return cells.transpose(2, 3).flatten(3).flatten(0, 2)

    def encoded_cells(
        self, model: Any, output: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]
    ) -> Sequence[Tensor]:
        # Those hidden states of which stock makes the feature, counted from the first one, as a pass may have ended early.
        given, states = feature_argument(model.config, arguments, "vision_feature_layer"), self.num_layers(model.config) + 1
        read = [output.hidden_states[index % states] for index in ([given] if isinstance(given, int) else given)]
        cells = math.prod(layouts[0].view_shapes[0])
        of_tiles = [state[:, state.shape[1] - cells :] for state in read]
        return list(of_tiles[0] if len(of_tiles) == 1 else torch.cat(of_tiles, dim=-1))

    def project(self, model: Any, encoded: Tensor) -> Tensor:
        return model.multi_modal_projector(encoded)

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        return {}


def has_class_token(model: Any) -> bool:
    """Whether the encoder of one of our models has a class token."""
    return Evidence.CLASS_ATTENTION in model.provided_evidence


def check_feature_selection(strategy: str, has_class_token: bool) -> None:
    """Refuses a `vision_feature_select_strategy` whose features are not one per cell of a tile.

    Raises:
        ValueError: for "full" where there is a class token, and for "default" (drop the first token) where there is none.
    """
    needed = "default" if has_class_token else "full"
    if strategy != needed:
        token = "has a class token, which is no cell of the image" if has_class_token else "has no class token to drop"
        raise ValueError(
            f"`vision_feature_select_strategy` is {strategy!r}, but the vision tower {token}. Pruning needs one feature per "
            f"cell: use {needed!r}, in the model's configuration and in the processor's."
        )


def check_tiles(pixel_values: Tensor, tiles: Sequence[int]) -> None:
    """A ValueError where pixels are not those of images with so many tiles each.

    Args:
        pixel_values: (images, tiles, channels, height, width), padded, or (tiles of all images, channels, height, width).
        tiles: of every image that `image_sizes` names.
    """
    if pixel_values.ndim == 5 and (pixel_values.shape[0] != len(tiles) or pixel_values.shape[1] < max(tiles, default=0)):
        raise ValueError(
            f"`pixel_values` holds {pixel_values.shape[0]} images of {pixel_values.shape[1]} tiles; `image_sizes` "
            f"names {len(tiles)} images that need up to {max(tiles, default=0)} tiles. Pass both as the processor "
            "returned them."
        )
    if pixel_values.ndim == 4 and pixel_values.shape[0] != sum(tiles):
        raise ValueError(
            f"`pixel_values` holds {pixel_values.shape[0]} tiles; the {len(tiles)} images that `image_sizes` names need "
            f"{sum(tiles)}. Pass both as the processor returned them."
        )


def sizes_of_images(given: Any) -> list[tuple[int, int]]:
    """The rows of an argument `image_sizes`, (height, width) in pixels; ValueError for anything else."""
    if given is None:
        raise ValueError("`pixel_values` came without `image_sizes`; pass both as the processor returned them.")
    sizes = given.tolist() if hasattr(given, "tolist") else given
    try:
        return [(height, width) for height, width in sizes]
    except (TypeError, ValueError):
        raise ValueError(f"`image_sizes` is {sizes!r}; it must be (height, width) in pixels for every image.") from None


def feature_argument(config: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of a call that says how features are made; where it is missing or None, the configuration's."""
    given = arguments.get(name)
    return getattr(config, name) if given is None else given


class LlavaTowersProcessorMixin(PrunedProcessorMixin):
    """What the processors of these families share. Comes before the stock class."""

    # Spelled out, as transformers takes from this signature which stored settings it may hand over.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        pruning_config=None,
        **kwargs,
    ):
        check_no_setting_among(kwargs)
        self.pruning_config = pruning_config
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def tile_size(self) -> int:
        """Side in pixels of the tiles that the image processor makes."""
        crop, size = getattr(self.image_processor, "crop_size", None), self.image_processor.size
        if crop and getattr(self.image_processor, "do_center_crop", True):  # not every image processor crops
            return side_of(crop, "height")
        return side_of(size, "shortest_edge") or side_of(size, "height")
