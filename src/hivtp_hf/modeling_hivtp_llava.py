"""LLaVA-1.5 with visual token pruning: thin subclasses of transformers' model classes."""

import functools
from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.utils import can_return_tuple

from .compat import with_stock_signature
from .configuration_hivtp_llava import HIVTPLlavaConfig
from .pruned_generation import PrunedGenerationMixin
from .pruned_model import PrunedImageFeaturesOutput, PrunedModelMixin, refuse_budget_among
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout


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
    _auto_class = "AutoModel"

    def __init__(self, config: HIVTPLlavaConfig):
        if config.vision_config.model_type == "pixtral":
            raise ValueError(
                "the vision tower is a Pixtral model, whose images vary in size; pruning needs one square tile per image. "
                "Use a checkpoint with a CLIP or SigLIP tower."
            )
        super().__init__(config)
        self._start_pruning()

    def _image_sizes(self, pixel_values: Tensor, image_sizes: Any) -> list[tuple[int, int]]:
        if image_sizes is not None:
            raise ValueError("`image_sizes` was given, which LLaVA-1.5 does not take: it sees every image as one square tile.")
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has {pixel_values.ndim} dimensions; it must have 4, (images, channels, height, width): one "
                "square tile per image. Pass it as the processor of this model's family returned it."
            )
        if not len(pixel_values):
            raise ValueError("`pixel_values` holds no image; leave it out for a prompt without images.")
        return [(self.config.vision_config.image_size,) * 2] * len(pixel_values)

    def _token_layout(self, height: int, width: int, pruning: VisualTokenPruningConfig, strategy: str) -> TokenLayout:
        if strategy not in ("default", "full"):
            raise ValueError(f"`vision_feature_select_strategy` is {strategy!r}; it must be 'default' or 'full'.")
        vision = self.config.vision_config
        # "default" drops the first token, whether or not it is a class token.
        extra_tokens = int(self._has_cls_token) - (strategy == "default")
        return TokenLayout.single_tile(vision.image_size // vision.patch_size, pruning, extra_tokens=extra_tokens)

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
        refuse_budget_among(kwargs)
        layouts = self._layouts(pixel_values, image_sizes, vision_feature_select_strategy, retention_ratio)
        stock = functools.partial(
            super().get_image_features,
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            return_dict=True,
            **kwargs,
        )
        return self._prune_image_features(stock, layouts, vision_feature_layer)

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
    _auto_class = "AutoModelForImageTextToText"

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


__all__ = ["HIVTPLlavaForConditionalGeneration", "HIVTPLlavaModel"]
