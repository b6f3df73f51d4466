"""LLaVA-NeXT with visual token pruning: what is particular to it, and thin subclasses of transformers' classes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.utils import can_return_tuple

from ..pruning.compat import with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from ..pruning.generation import PrunedGenerationMixin
from ..pruning.layout import TokenLayout
from ..pruning.model import PrunedImageFeaturesOutput, PrunedModelMixin
from ..pruning.settings import VisualTokenPruningConfig
from .base import Family, FamilyClasses
from .llava_towers import (
    LlavaTowersFamily,
    LlavaTowersProcessorMixin,
    check_feature_selection,
    check_tiles,
    feature_argument,
    has_class_token,
    sizes_of_images,
)


class LlavaNextFamily(LlavaTowersFamily):
    """LLaVA-NeXT: a base tile and crops, of which un-padding keeps a part, each row of crops with a newline."""

    name = "llava_next"
    title = "LLaVA-NeXT"
    image_inputs = ("pixel_values", "image_sizes")

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(
            HIVTPLlavaNextConfig, HIVTPLlavaNextModel, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor
        )

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(LlavaNextConfig, LlavaNextModel, LlavaNextForConditionalGeneration, LlavaNextProcessor)

    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        return sizes_of_images(arguments.get("image_sizes"))

    def layout(self, model: Any, size: Any, pruning: VisualTokenPruningConfig, arguments: Mapping[str, Any]) -> TokenLayout:
        strategy = feature_argument(model.config, arguments, "vision_feature_select_strategy")
        check_feature_selection(strategy, has_class_token(model))
        height, width = size
        return TokenLayout.from_image_size(
            height,
            width,
            pruning,
            tile_size=model.config.vision_config.image_size,
            patch_size=model.config.vision_config.patch_size,
            pinpoints=model.config.image_grid_pinpoints,
        )

    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        check_tiles(arguments["pixel_values"], [layout.num_tiles for layout in layouts])

    def processor_layout(
        self,
        processor: Any,
        height: int,
        width: int,
        pruning: VisualTokenPruningConfig,
        tile_size: int | None = None,
    ) -> TokenLayout:
        """As every family's; `tile_size` in pixels is that of a call which has its own."""
        return TokenLayout.from_image_size(
            height,
            width,
            pruning,
            tile_size=processor.tile_size() if tile_size is None else tile_size,
            patch_size=processor.patch_size,
            pinpoints=processor.image_processor.image_grid_pinpoints,
        )

    def layouts_of_inputs(
        self, processor: Any, inputs: Mapping[str, Any], prunings: Sequence[VisualTokenPruningConfig]
    ) -> list[TokenLayout]:
        tile_size = inputs["pixel_values"][0][0].shape[-1]
        return [
            self.processor_layout(processor, int(height), int(width), pruning, tile_size)
            for (height, width), pruning in zip(inputs["image_sizes"], prunings, strict=True)
        ]

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        return {"image_grid_pinpoints": [[rows * tile_size, columns * tile_size] for rows, columns in shapes]}

    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }


class HIVTPLlavaNextConfig(PrunedConfigMixin, LlavaNextConfig):
    r"""
    Configuration of [`HIVTPLlavaNextForConditionalGeneration`]: LLaVA-NeXT's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            What to keep. None and `{}` mean the defaults. Reads as a [`VisualTokenPruningConfig`], however it was given,
            and is validated wherever it is set. Given to `from_pretrained`, it replaces the stored settings as a whole.
        base_model (`dict` or `None`, *optional*):
            For a checkpoint without weights, the one that has them: `{"name": "owner/name", "revision": <commit's hash>}`, or
            a folder's absolute path and None. `from_base_model` sets it.
        **kwargs:
            As for [`~transformers.LlavaNextConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    Its own `model_type` makes transformers stop where remote code is not trusted, instead of silently loading the model
    unpruned. A stock checkpoint ("llava_next") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava_next"
    stock_model_type: ClassVar[str] = LlavaNextConfig.model_type
    family: ClassVar[Family] = LlavaNextFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPLlavaNextProcessor(LlavaTowersProcessorMixin, LlavaNextProcessor):
    r"""
    LLaVA-NeXT's processor, except that an image gets as many placeholders as the model keeps of it.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            The settings of the model that the inputs go to. None and `{}` mean the defaults. Reads as a
            [`VisualTokenPruningConfig`], however it was given, and is validated wherever it is set. Given to
            `from_pretrained`, it replaces the stored settings as a whole.
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
        num_additional_image_tokens:
            As for [`~transformers.LlavaNextProcessor`].

    A call takes, beside stock's arguments, `retention_ratio` or `token_budget`: one value for the call, or one per image. It
    prunes this call so, whatever the settings say, and adds the model input `retention_ratio`. Without, the inputs have
    exactly stock's keys.

    Raises:
        ValueError: for settings out of range, and at a call for tiles smaller than a patch.
    """

    family: ClassVar[Any] = HIVTPLlavaNextConfig.family

    @functools.wraps(LlavaNextProcessor.__call__)
    def __call__(self, images=None, text=None, *args, **kwargs):
        return super().__call__(images, text, *args, **kwargs)

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        # Stock's own count carries what belongs to the checkpoint (extra tokens of the tower); only the difference is ours. The
        # layout comes first, as it checks what stock divides by.
        layout = self.family.processor_layout(self, orig_height, orig_width, self._next_pruning(), tile_size=height)
        stock = super()._get_number_of_features(orig_height, orig_width, height, width)
        return stock - layout.num_stock + layout.num_retained


class HIVTPLlavaNextModel(PrunedModelMixin, LlavaNextModel):
    r"""
    The LLaVA-NeXT model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, a feature selection that is
            not one feature per cell, a method that needs a class token where there is none.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    family: ClassVar[Any] = HIVTPLlavaNextConfig.family

    def __init__(self, config: HIVTPLlavaNextConfig):
        super().__init__(config)
        self._start_pruning()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        retention_ratio: Tensor | float | None = None,
        **kwargs: Any,
    ) -> tuple | PrunedImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every image, after the projector.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, tiles, channels, height, width)`):
                As the processor returns them; images with fewer tiles are padded.
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`):
                Height and width of the original images in pixels.
            vision_feature_layer (`int` or `list[int]`, *optional*), vision_feature_select_strategy (`str`, *optional*):
                As for the stock model; the configuration's by default.
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
            "image_sizes": image_sizes,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        return self._prune_image_features(super().get_image_features, arguments, retention_ratio, **kwargs)

    @with_stock_signature(LlavaNextModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPLlavaNextForConditionalGeneration(PrunedGenerationMixin, LlavaNextForConditionalGeneration):
    r"""
    LLaVA-NeXT with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock LLaVA-NeXT checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPLlavaNextModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig

    def __init__(self, config: HIVTPLlavaNextConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPLlavaNextModel(config))

    @functools.wraps(HIVTPLlavaNextModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @with_stock_signature(LlavaNextForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
