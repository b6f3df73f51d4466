"""Qwen3-VL with visual token pruning: what is particular to it, and thin subclasses of transformers' classes."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLProcessor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.utils import can_return_tuple

from ..pruning.compat import with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from ..pruning.look import Look
from .base import Family, FamilyClasses
from .qwen_vl import QwenVLFamily, QwenVLGenerationMixin, QwenVLModelMixin
from .qwen_vl_processing import QwenVLProcessorMixin

# What stock returned beside features, while `look` runs. `look` itself asks for features alone.
_deepstack_of_look: ContextVar[list[Any] | None] = ContextVar("hivtp_deepstack_of_look", default=None)


class Qwen3VLFamily(QwenVLFamily):
    """Qwen3-VL: every block of the tower attends over the whole image, and the language model takes features of several."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    streams = ("pooler_output", "deepstack_features")
    pixel_scale = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(
            HIVTPQwen3VLConfig,
            HIVTPQwen3VLModel,
            HIVTPQwen3VLForConditionalGeneration,
            HIVTPQwen3VLProcessor,
        )

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(Qwen3VLConfig, Qwen3VLModel, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)


class HIVTPQwen3VLConfig(PrunedConfigMixin, Qwen3VLConfig):
    r"""
    Configuration of [`HIVTPQwen3VLForConditionalGeneration`]: Qwen3-VL's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`]. `exact_count` must be True, and `positions` and `token_weights` the defaults.
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.Qwen3VLConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("qwen3_vl") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_qwen3_vl"
    stock_model_type: ClassVar[str] = Qwen3VLConfig.model_type
    family: ClassVar[Family] = Qwen3VLFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPQwen3VLProcessor(QwenVLProcessorMixin, Qwen3VLProcessor):
    r"""
    Qwen3-VL's processor, except that an image gets as many placeholders as the model keeps of it.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextProcessor`].
        image_processor, tokenizer, video_processor, chat_template:
            As for [`~transformers.Qwen3VLProcessor`]. Without torchvision there is no video processor; what was stored of it
            is kept.

    A call takes `retention_ratio` or `token_budget` as that of [`HIVTPLlavaNextProcessor`].

    Raises:
        ValueError: for settings out of range.
    """

    family: ClassVar[Any] = HIVTPQwen3VLConfig.family
    video_processor_type = "Qwen3VLVideoProcessor"


class WatchedQwen3VLModel(Qwen3VLModel):
    """Stock's model, whose DeepStack features `look` takes along."""

    @can_return_tuple
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As stock."""
        output = super().get_image_features(*args, **{**kwargs, "return_dict": True})
        found = _deepstack_of_look.get()
        if found is not None:
            found.append(output.deepstack_features)
        return output


class HIVTPQwen3VLModel(QwenVLModelMixin, WatchedQwen3VLModel):
    r"""
    The Qwen3-VL model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPQwen3VLConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, and a
            method that needs a class token.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen3VLConfig
    config_class = HIVTPQwen3VLConfig
    family: ClassVar[Any] = HIVTPQwen3VLConfig.family

    def __init__(self, config: HIVTPQwen3VLConfig):
        super().__init__(config)
        self._start_pruning()

    def look(
        self, inputs: Mapping[str, Any], prunings: Iterable[Any] | None = None, layers: Iterable[int] | None = None
    ) -> Look:
        """As every family's, with DeepStack features beside the others."""
        found: list[Any] = []
        token = _deepstack_of_look.set(found)
        try:
            look = super().look(inputs, prunings, layers)
        finally:
            _deepstack_of_look.reset(token)
        return dataclasses.replace(look, further_streams={"deepstack_features": found[0]})

    # Stock's takes the way of images, which prunes.
    @can_return_tuple
    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        """As stock: videos are not pruned."""
        return Qwen3VLModel.get_image_features(self, pixel_values_videos, video_grid_thw, **{**kwargs, "return_dict": True})

    @with_stock_signature(Qwen3VLModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPQwen3VLForConditionalGeneration(QwenVLGenerationMixin, Qwen3VLForConditionalGeneration):
    r"""
    Qwen3-VL with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock Qwen3-VL checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPQwen3VLConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPQwen3VLModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen3VLConfig
    config_class = HIVTPQwen3VLConfig

    def __init__(self, config: HIVTPQwen3VLConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(Qwen3VLForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPQwen3VLModel(config))

    @functools.wraps(HIVTPQwen3VLModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @with_stock_signature(Qwen3VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
