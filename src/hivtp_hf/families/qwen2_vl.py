"""Qwen2-VL with visual token pruning: what is particular to it, and thin subclasses of transformers' classes."""

import functools
from typing import Any, ClassVar

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLProcessor

from ..pruning.compat import with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from .base import Family, FamilyClasses
from .qwen_vl import QwenVLFamily, QwenVLGenerationMixin, QwenVLModelMixin
from .qwen_vl_processing import QwenVLProcessorMixin


class Qwen2VLFamily(QwenVLFamily):
    """Qwen2-VL: every block of the tower attends over the whole image."""

    name = "qwen2_vl"
    title = "Qwen2-VL"

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(
            HIVTPQwen2VLConfig,
            HIVTPQwen2VLModel,
            HIVTPQwen2VLForConditionalGeneration,
            HIVTPQwen2VLProcessor,
        )

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(Qwen2VLConfig, Qwen2VLModel, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)


class HIVTPQwen2VLConfig(PrunedConfigMixin, Qwen2VLConfig):
    r"""
    Configuration of [`HIVTPQwen2VLForConditionalGeneration`]: Qwen2-VL's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`]. `exact_count` must be True, and `positions` and `token_weights` the defaults.
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.Qwen2VLConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("qwen2_vl") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_qwen2_vl"
    stock_model_type: ClassVar[str] = Qwen2VLConfig.model_type
    family: ClassVar[Family] = Qwen2VLFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPQwen2VLProcessor(QwenVLProcessorMixin, Qwen2VLProcessor):
    r"""
    Qwen2-VL's processor, except that an image gets as many placeholders as the model keeps of it.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextProcessor`].
        image_processor, tokenizer, video_processor, chat_template:
            As for [`~transformers.Qwen2VLProcessor`]. Without torchvision there is no video processor; what was stored of it
            is kept.

    A call takes `retention_ratio` or `token_budget` as that of [`HIVTPLlavaNextProcessor`].

    Raises:
        ValueError: for settings out of range.
    """

    family: ClassVar[Any] = HIVTPQwen2VLConfig.family
    video_processor_type = "Qwen2VLVideoProcessor"


class HIVTPQwen2VLModel(QwenVLModelMixin, Qwen2VLModel):
    r"""
    The Qwen2-VL model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPQwen2VLConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, and a
            method that needs a class token.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen2VLConfig
    config_class = HIVTPQwen2VLConfig
    family: ClassVar[Any] = HIVTPQwen2VLConfig.family

    def __init__(self, config: HIVTPQwen2VLConfig):
        super().__init__(config)
        self._start_pruning()

    @with_stock_signature(Qwen2VLModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPQwen2VLForConditionalGeneration(QwenVLGenerationMixin, Qwen2VLForConditionalGeneration):
    r"""
    Qwen2-VL with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock Qwen2-VL checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPQwen2VLConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPQwen2VLModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen2VLConfig
    config_class = HIVTPQwen2VLConfig

    def __init__(self, config: HIVTPQwen2VLConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(Qwen2VLForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPQwen2VLModel(config))

    @functools.wraps(HIVTPQwen2VLModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @with_stock_signature(Qwen2VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
