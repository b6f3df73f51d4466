"""What LLaVA families share: an encoder that sees square tiles one by one, and features that are a hidden state of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
            Evidence.PIXELS,
            Evidence.FEATURES,
            Evidence.ENCODED,
        }
    )
    feature_arguments = ("vision_feature_layer", "vision_feature_select_strategy")

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
        lacking = set()
        if not any(name in ("class_embedding", "cls_token") for name in names):
            lacking.add(Evidence.CLASS_ATTENTION)
        if model.config.vision_config.model_type not in PIXEL_SCALES:
            lacking.add(Evidence.PIXELS)
        return self.provides - lacking

    def ending_early(
        self, stock: Callable[..., Any], config: Any, arguments: Mapping[str, Any], layers: Sequence[int]
    ) -> Callable[..., Any]:
        feature_layer = feature_argument(config, arguments, "vision_feature_layer")
        return without_unread_layers(stock, config.vision_config, feature_layer, layers)

    def cell_scores(self, model: Any, scores: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
        of_tiles = torch.cat(list(scores)) if len(scores) > 1 else scores[0]
        cells, tiles = math.prod(layouts[0].view_shapes[0]), sum(layout.num_views for layout in layouts)
        class_tokens = of_tiles.shape[1] - cells
        if of_tiles.shape[0] != tiles or class_tokens not in (0, 1):
            raise ValueError(
                f"the vision tower scored {of_tiles.shape[0]} tiles of {of_tiles.shape[1]} tokens; the images need {tiles} "
                f"tiles of {cells} cells, with or without a class token. Check `image_sizes` and the tower's image size."
            )
        return of_tiles[:, class_tokens:].flatten()

    def grey_levels(self, model: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> Tensor:
        vision, pixels = model.config.vision_config, arguments["pixel_values"]
        if pixels.ndim == 5:  # images with fewer tiles are padded
            pixels = torch.cat([tiles[: layout.num_views] for tiles, layout in zip(pixels, layouts, strict=True)])
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

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        return {}


def has_class_token(model: Any) -> bool:
    """Whether the encoder of one of our models has a class token."""
    return Evidence.CLASS_ATTENTION in model.provided_evidence


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
