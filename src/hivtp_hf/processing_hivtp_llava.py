"""Processor of LLaVA-1.5 with visual token pruning: writes as many placeholders as the model keeps tokens."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import LlavaConfig, LlavaProcessor
from transformers.processing_utils import MultiModalData

from .compat import side_of
from .layout_arguments import positive_integer
from .pruned_processing import PrunedProcessorMixin
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout


class HIVTPLlavaProcessor(PrunedProcessorMixin, LlavaProcessor):
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

    _auto_class = "AutoProcessor"
    stock_config_class: ClassVar[type] = LlavaConfig

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
        extra_tokens = self._extra_tokens()
        grid = math.isqrt(max(num_stock - extra_tokens, 0))
        if grid * grid != num_stock - extra_tokens:
            raise ValueError(
                f"an image makes {num_stock} tokens, which are no square of cells; pruning needs square images. Let the image "
                "processor crop or resize them to a square (`crop_size`, `size`)."
            )
        return TokenLayout.single_tile(grid, pruning, extra_tokens=extra_tokens)

    def _extra_tokens(self) -> int:
        return self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default")

    def _layouts_of_inputs(self, inputs: Any, prunings: Sequence[VisualTokenPruningConfig]) -> list[TokenLayout]:
        grid = inputs["pixel_values"][0].shape[-1] // self.patch_size
        return [TokenLayout.single_tile(grid, pruning, extra_tokens=self._extra_tokens()) for pruning in prunings]

    def _token_layout(
        self, height: int, width: int, pruning: VisualTokenPruningConfig, tile_size: int | None = None
    ) -> TokenLayout:
        tile_size = self._tile_size() if tile_size is None else tile_size
        grid = tile_size // positive_integer("patch_size", self.patch_size)
        return TokenLayout.single_tile(
            grid,
            pruning,
            extra_tokens=self._extra_tokens(),
            image_size=(height, width),
            view=self._view(height, width, tile_size, grid * self.patch_size),
        )

    def _view(self, height: int, width: int, tile_size: int, cells_side: int) -> tuple[float, float, float, float]:
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
        layouts = [self._token_layout(height, width, self._next_pruning()) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_retained for layout in layouts], num_image_patches=[1] * len(layouts)
        )


__all__ = ["HIVTPLlavaProcessor"]
