"""Qwen2.5-VL with visual token pruning: what is particular to it, and thin subclasses of transformers' classes."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLProcessor

from ..pruning.compat import with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from ..pruning.layout import TokenLayout
from .base import Family, FamilyClasses
from .qwen_vl import QwenVLFamily, QwenVLGenerationMixin, QwenVLModelMixin
from .qwen_vl_processing import QwenVLProcessorMixin


class Qwen2_5_VLFamily(QwenVLFamily):
    """Qwen2.5-VL: most blocks of the tower attend within windows, four over the whole image."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(
            HIVTPQwen2_5_VLConfig,
            HIVTPQwen2_5_VLModel,
            HIVTPQwen2_5_VLForConditionalGeneration,
            HIVTPQwen2_5_VLProcessor,
        )

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)

    def comparable_layers(self, config: Any) -> Collection[int]:
        return sorted(config.vision_config.fullatt_block_indexes)

    def default_layers(self, config: Any) -> Mapping[str, Any]:
        """The middle ones of the blocks that attend over the whole image; of 7, 15, 23 and 31 these are 15 and 23.

        HiPrune publishes 15 and the last one. HIVTP's layers 6 to 8 of 24 have no counterpart here.
        """
        full = self.comparable_layers(config)
        middle = tuple(full)[1:-1] or tuple(full)[:1]
        return {"importance_layers": middle, "object_layer": middle[0], "deep_layer": tuple(full)[-1]}

    def in_raster_order(self, model: Any, of_cells: Tensor, layout: TokenLayout) -> Tensor:
        # The tower orders cells by its windows, row by row, and within each of them row by row.
        vision = model.config.vision_config
        side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        rows, columns = layout.view_shapes[0]
        of_row, of_column = (torch.arange(number, device=of_cells.device) // side for number in (rows, columns))
        window = of_row[:, None] * (-(-columns // side)) + of_column
        return torch.empty_like(of_cells).index_copy_(0, window.flatten().argsort(stable=True), of_cells)


class HIVTPQwen2_5_VLConfig(PrunedConfigMixin, Qwen2_5_VLConfig):
    r"""
    Configuration of [`HIVTPQwen2_5_VLForConditionalGeneration`]: Qwen2.5-VL's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`]. `exact_count` must be True, and `positions` and `token_weights` the defaults.
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.Qwen2_5_VLConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("qwen2_5_vl") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_qwen2_5_vl"
    stock_model_type: ClassVar[str] = Qwen2_5_VLConfig.model_type
    family: ClassVar[Family] = Qwen2_5_VLFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPQwen2_5_VLProcessor(QwenVLProcessorMixin, Qwen2_5_VLProcessor):
    r"""
    Qwen2.5-VL's processor, except that an image gets as many placeholders as the model keeps of it.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextProcessor`].
        image_processor, tokenizer, video_processor, chat_template:
            As for [`~transformers.Qwen2_5_VLProcessor`]. Without torchvision there is no video processor; what was stored of it
            is kept.

    A call takes `retention_ratio` or `token_budget` as that of [`HIVTPLlavaNextProcessor`].

    Raises:
        ValueError: for settings out of range.
    """

    family: ClassVar[Any] = HIVTPQwen2_5_VLConfig.family
    video_processor_type = "Qwen2VLVideoProcessor"


class HIVTPQwen2_5_VLModel(QwenVLModelMixin, Qwen2_5_VLModel):
    r"""
    The Qwen2.5-VL model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPQwen2_5_VLConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth or that attend within windows, and a
            method that needs a class token.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen2_5_VLConfig
    config_class = HIVTPQwen2_5_VLConfig
    family: ClassVar[Any] = HIVTPQwen2_5_VLConfig.family

    def __init__(self, config: HIVTPQwen2_5_VLConfig):
        super().__init__(config)
        self._start_pruning()

    @with_stock_signature(Qwen2_5_VLModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPQwen2_5_VLForConditionalGeneration(QwenVLGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    r"""
    Qwen2.5-VL with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock Qwen2.5-VL checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPQwen2_5_VLConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPQwen2_5_VLModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPQwen2_5_VLConfig
    config_class = HIVTPQwen2_5_VLConfig

    def __init__(self, config: HIVTPQwen2_5_VLConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPQwen2_5_VLModel(config))

    @functools.wraps(HIVTPQwen2_5_VLModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @with_stock_signature(Qwen2_5_VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
