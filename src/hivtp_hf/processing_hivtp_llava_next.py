"""Processor of LLaVA-NeXT with visual token pruning: writes as many placeholders as the model keeps tokens."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import LlavaNextConfig, LlavaNextProcessor

from .pruned_processing import PrunedProcessorMixin
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout


class HIVTPLlavaNextProcessor(PrunedProcessorMixin, LlavaNextProcessor):
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
        ValueError: for settings out of range, and at a call for tiles that do not divide into patches.
    """

    _auto_class = "AutoProcessor"
    stock_config_class: ClassVar[type] = LlavaNextConfig

    @functools.wraps(LlavaNextProcessor.__call__)
    def __call__(self, images=None, text=None, *args, **kwargs):
        return super().__call__(images, text, *args, **kwargs)

    def _layouts_of_inputs(self, inputs: Any, prunings: Sequence[VisualTokenPruningConfig]) -> list[TokenLayout]:
        tile_size = inputs["pixel_values"][0][0].shape[-1]
        return [
            self._token_layout(int(height), int(width), pruning, tile_size)
            for (height, width), pruning in zip(inputs["image_sizes"], prunings, strict=True)
        ]

    def _token_layout(
        self, height: int, width: int, pruning: VisualTokenPruningConfig, tile_size: int | None = None
    ) -> TokenLayout:
        return TokenLayout.from_image_size(
            height,
            width,
            pruning,
            tile_size=self._tile_size() if tile_size is None else tile_size,
            patch_size=self.patch_size,
            pinpoints=self.image_processor.image_grid_pinpoints,
        )

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        # Stock's own count carries what belongs to the checkpoint (extra tokens of the tower); only the difference is ours. The
        # layout comes first, as it checks what stock divides by.
        layout = self._token_layout(orig_height, orig_width, self._next_pruning(), height)
        stock = super()._get_number_of_features(orig_height, orig_width, height, width)
        return stock - layout.num_stock + layout.num_retained


__all__ = ["HIVTPLlavaNextProcessor"]
