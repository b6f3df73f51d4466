"""LLaVA-NeXT with visual token pruning: thin subclasses of transformers' model classes."""

import functools
from typing import Any

from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.utils import can_return_tuple

from .compat import with_stock_signature
from .configuration_hivtp_llava_next import HIVTPLlavaNextConfig
from .pruned_features import check_feature_selection
from .pruned_generation import PrunedGenerationMixin
from .pruned_model import PrunedImageFeaturesOutput, PrunedModelMixin, refuse_budget_among, size_pairs
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout


class HIVTPLlavaNextModel(PrunedModelMixin, LlavaNextModel):
    r"""
    The LLaVA-NeXT model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, tiles that do not divide into
            patches, a feature selection that is not one feature per cell, a method that needs a class token where there
            is none.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    _auto_class = "AutoModel"

    def __init__(self, config: HIVTPLlavaNextConfig):
        super().__init__(config)
        self._start_pruning()

    def _image_sizes(self, pixel_values: Tensor, image_sizes: Any) -> list[tuple[int, int]]:
        return size_pairs(image_sizes)

    def _token_layout(self, height: int, width: int, pruning: VisualTokenPruningConfig, strategy: str) -> TokenLayout:
        check_feature_selection(strategy, self._has_cls_token)
        return TokenLayout.from_image_size(
            height,
            width,
            pruning,
            tile_size=self.config.vision_config.image_size,
            patch_size=self.config.vision_config.patch_size,
            pinpoints=self.config.image_grid_pinpoints,
        )

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
        refuse_budget_among(kwargs)
        layouts = self._layouts(pixel_values, image_sizes, vision_feature_select_strategy, retention_ratio)
        stock = functools.partial(
            super().get_image_features,
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            return_dict=True,
            **kwargs,
        )
        return self._prune_image_features(stock, layouts, vision_feature_layer)

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
    _auto_class = "AutoModelForImageTextToText"

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


__all__ = ["HIVTPLlavaNextForConditionalGeneration", "HIVTPLlavaNextModel"]
