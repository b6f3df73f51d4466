"""LLaVA-1.5 with visual token pruning: what is particular to it, and thin subclasses of transformers' classes."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor
from transformers.processing_utils import MultiModalData
from transformers.utils import can_return_tuple

from ..pruning.checked_values import positive_integer
from ..pruning.compat import side_of, with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from ..pruning.generation import PrunedGenerationMixin
from ..pruning.layout import TokenLayout
from ..pruning.model import PrunedImageFeaturesOutput, PrunedModelMixin
from ..pruning.settings import VisualTokenPruningConfig
from .base import Family, FamilyClasses
from .llava_towers import LlavaTowersFamily, LlavaTowersProcessorMixin, feature_argument, has_class_token


class LlavaFamily(LlavaTowersFamily):
    """LLaVA-1.5: every image is one square tile, with the class token before it where features are selected in "full"."""

    name = "llava"
    title = "LLaVA-1.5"
    image_inputs = ("pixel_values", "image_sizes")

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(HIVTPLlavaConfig, HIVTPLlavaModel, HIVTPLlavaForConditionalGeneration, HIVTPLlavaProcessor)

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(LlavaConfig, LlavaModel, LlavaForConditionalGeneration, LlavaProcessor)

    def check_config(self, config: Any) -> None:
        if config.vision_config.model_type == "pixtral":
            raise ValueError(
                "the vision tower is a Pixtral model, whose images vary in size; pruning needs one square tile per image. "
                "Use a checkpoint with a CLIP or SigLIP tower."
            )

    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        if arguments.get("image_sizes") is not None:
            raise ValueError("`image_sizes` was given, which LLaVA-1.5 does not take: it sees every image as one square tile.")
        pixel_values = arguments["pixel_values"]
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has {pixel_values.ndim} dimensions; it must have 4, (images, channels, height, width): one "
                "square tile per image. Pass it as the processor of this model's family returned it."
            )
        if not len(pixel_values):
            raise ValueError("`pixel_values` holds no image; leave it out for a prompt without images.")
        return [(model.config.vision_config.image_size,) * 2] * len(pixel_values)

    def layout(self, model: Any, size: Any, pruning: VisualTokenPruningConfig, arguments: Mapping[str, Any]) -> TokenLayout:
        strategy = feature_argument(model.config, arguments, "vision_feature_select_strategy")
        if strategy not in ("default", "full"):
            raise ValueError(f"`vision_feature_select_strategy` is {strategy!r}; it must be 'default' or 'full'.")
        vision = model.config.vision_config
        first = first_tokens(int(has_class_token(model)), strategy)
        return TokenLayout.single_tile(vision.image_size // vision.patch_size, pruning, **first)

    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        """Nothing more: there are as many layouts as there are tiles."""

    def processor_layout(self, processor: Any, height: int, width: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        tile_size = processor.tile_size()
        grid = tile_size // positive_integer("patch_size", processor.patch_size)
        return TokenLayout.single_tile(
            grid,
            pruning,
            **processor.first_tokens(),
            image_size=(height, width),
            view=processor.view(height, width, tile_size, grid * processor.patch_size),
        )

    def layouts_of_inputs(
        self, processor: Any, inputs: Mapping[str, Any], prunings: Sequence[VisualTokenPruningConfig]
    ) -> list[TokenLayout]:
        grid = inputs["pixel_values"][0].shape[-1] // processor.patch_size
        return [TokenLayout.single_tile(grid, pruning, **processor.first_tokens()) for pruning in prunings]

    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        square = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
        if config.vision_config.model_type == "clip_vision_model":
            resized = {"size": {"shortest_edge": square["height"]}, "crop_size": square}
            return {"image_processor_type": "CLIPImageProcessor", **resized}
        return {"image_processor_type": "SiglipImageProcessor", "size": square}


def first_tokens(num_class_tokens: int, strategy: str) -> dict[str, Any]:
    """How stock's packed sequence begins, as keywords of `TokenLayout.single_tile`.

    Args:
        num_class_tokens: how many tokens the tower puts before the cells.
        strategy: `vision_feature_select_strategy`; "default" drops the first token, whether or not it is a class token.

    Raises:
        ValueError: for more than one class token.
    """
    extra_tokens = num_class_tokens - (strategy == "default")
    if extra_tokens not in (-1, 0, 1):
        raise ValueError(
            f"`num_additional_image_tokens` is {num_class_tokens!r}; pruning knows towers with one class token or none, so it "
            "must be 1 or 0."
        )
    return {"has_class_token": extra_tokens == 1, "skips_first_cell": extra_tokens == -1}


class HIVTPLlavaConfig(PrunedConfigMixin, LlavaConfig):
    r"""
    Configuration of [`HIVTPLlavaForConditionalGeneration`]: LLaVA's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.LlavaConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("llava") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava"
    stock_model_type: ClassVar[str] = LlavaConfig.model_type
    family: ClassVar[Family] = LlavaFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPLlavaProcessor(LlavaTowersProcessorMixin, LlavaProcessor):
    r"""
    LLaVA's processor, except that an image gets as many placeholders as the model keeps of it.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextProcessor`].
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
        num_additional_image_tokens:
            As for [`~transformers.LlavaProcessor`].

    A call takes `retention_ratio` or `token_budget` as that of [`HIVTPLlavaNextProcessor`].

    Raises:
        ValueError: for settings out of range, and at a call for images that do not become square.
    """

    family: ClassVar[Any] = HIVTPLlavaConfig.family

    @functools.wraps(LlavaProcessor.__call__)
    def __call__(self, images=None, text=None, *args, **kwargs):
        return super().__call__(images, text, *args, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of one image; stock asks for each in turn."""
        positive_integer("patch_size", self.patch_size)  # stock divides by it
        num_stock = len(super().replace_image_token(image_inputs, image_idx, **kwargs)) // len(self.image_token)
        return self.image_token * self._layout_of_count(num_stock, self._next_pruning()).num_retained

    def _layout_of_count(self, num_stock: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        """The layout of an image that stock gives `num_stock` placeholders."""
        first = self.first_tokens()
        num_cells = num_stock - first["has_class_token"] + first["skips_first_cell"]
        grid = math.isqrt(max(num_cells, 0))
        if grid * grid != num_cells:
            raise ValueError(
                f"an image makes {num_stock} tokens, which are no square of cells; pruning needs square images. Let the image "
                "processor crop or resize them to a square (`crop_size`, `size`)."
            )
        return TokenLayout.single_tile(grid, pruning, **first)

    def first_tokens(self) -> dict[str, Any]:
        """How the packed sequence begins, as keywords of `TokenLayout.single_tile`."""
        return first_tokens(self.num_additional_image_tokens, self.vision_feature_select_strategy)

    def view(self, height: int, width: int, tile_size: int, cells_side: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels of the image, of what the cells show; `cells_side` in pixels of the tile."""
        processor = self.image_processor
        left, top, shown_width, shown_height = 0.0, 0.0, float(width), float(height)
        if getattr(processor, "do_pad", False):  # to a square, before anything else
            shown_width = shown_height = float(max(width, height))
            left, top = (width - shown_width) / 2, (height - shown_height) / 2
        shortest = side_of(processor.size, "shortest_edge")
        if shortest:
            resized_width = shortest * shown_width / min(shown_width, shown_height)
            resized_height = shortest * shown_height / min(shown_width, shown_height)
        else:
            resized_width = resized_height = float(tile_size)
        # Of what is resized the tile is the middle, and the cells are what of the tile divides into patches.
        across, down = shown_width / resized_width, shown_height / resized_height
        left += (resized_width - tile_size) / 2 * across
        top += (resized_height - tile_size) / 2 * down
        return left, top, left + cells_side * across, top + cells_side * down

    def _stock_num_multimodal_tokens(self, image_sizes: Any) -> Any:
        # Stock's own counts all images alike, and needs an image processor that crops.
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.family.processor_layout(self, height, width, self._next_pruning()) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_retained for layout in layouts], num_image_patches=[1] * len(layouts)
        )


class HIVTPLlavaModel(PrunedModelMixin, LlavaModel):
    r"""
    The LLaVA model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, images of varying size
            (Pixtral), a method that needs a class token where there is none.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaConfig
    config_class = HIVTPLlavaConfig
    family: ClassVar[Any] = HIVTPLlavaConfig.family

    def __init__(self, config: HIVTPLlavaConfig):
        self.family.check_config(config)
        super().__init__(config)
        self._start_pruning()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: None = None,
        retention_ratio: Tensor | float | None = None,
        **kwargs: Any,
    ) -> tuple | PrunedImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every image, after the projector.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
                As the processor returns them.
            vision_feature_layer (`int` or `list[int]`, *optional*), vision_feature_select_strategy (`str`, *optional*):
                As for the stock model; the configuration's by default.
            image_sizes (`None`):
                Takes no other value; stock hands it to towers that this class does not take.
            retention_ratio (`torch.LongTensor` of shape `(num_images,)` or `float`, *optional*):
                Prunes this call at these ratios, whatever the configuration says: as the processor returns it (the bits
                of float64 values), or a number for all images.

        Returns:
            [`PrunedImageFeaturesOutput`]: stock's output with pruned `pooler_output`, and `kept_indices`.

        Raises:
            ValueError: for inputs that do not fit each other or the pruning settings.
        """
        arguments = {
            "pixel_values": pixel_values,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        if image_sizes is not None:
            arguments["image_sizes"] = image_sizes  # refused, with the reason
        return self._prune_image_features(super().get_image_features, arguments, retention_ratio, **kwargs)

    @with_stock_signature(LlavaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPLlavaForConditionalGeneration(PrunedGenerationMixin, LlavaForConditionalGeneration):
    r"""
    LLaVA with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock LLaVA checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPLlavaConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPLlavaModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaConfig
    config_class = HIVTPLlavaConfig

    def __init__(self, config: HIVTPLlavaConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPLlavaModel(config))

    @functools.wraps(HIVTPLlavaModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @with_stock_signature(LlavaForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
