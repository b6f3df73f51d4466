"""Processor of LLaVA-NeXT with visual token pruning: writes as many placeholders as the model keeps tokens."""

import copy
import functools
from typing import Any

from transformers import LlavaNextConfig, LlavaNextProcessor

from .methods import pruning_method  # noqa: F401  (named so that this file travels; transformers 5.6 copies no more)
from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank  # noqa: F401
from .selectors_hivtp import count_hivtp  # noqa: F401
from .supported_transformers import check_transformers_version  # noqa: F401
from .token_layout import TokenLayout


class HIVTPLlavaNextProcessor(LlavaNextProcessor):
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

    Raises:
        ValueError: for settings out of range, and at a call for tiles that do not divide into patches.
    """

    _auto_class = "AutoProcessor"

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pruning_config":
            value = VisualTokenPruningConfig.coerce(value)
        super().__setattr__(name, value)

    # Takes stock's signature, which differs between releases.
    @functools.wraps(LlavaNextProcessor.__call__)
    def __call__(self, images=None, text=None, *args, **kwargs):
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("`images` is empty; pass at least one image, or None for a prompt without images.")
        try:
            return super().__call__(images, text, *args, **kwargs)
        except StopIteration:  # all that transformers 5.6 says
            raise ValueError(
                f"the prompts have more {self.image_token} placeholders than there are images; write one for each image."
            ) from None
        except ZeroDivisionError:
            raise ValueError("an image has a height or a width of 0 pixels; images need at least one pixel.") from None

    def token_layout(self, height: int, width: int) -> TokenLayout:
        """The layout of an image of `height` x `width` pixels under this processor's settings."""
        return self._token_layout(height, width, self._tile_size())

    def _tile_size(self) -> int:
        crop, size = self.image_processor.crop_size, self.image_processor.size
        return crop["height"] if crop and crop["height"] else size["shortest_edge"] or size["height"]

    def _token_layout(self, height: int, width: int, tile_size: int) -> TokenLayout:
        return TokenLayout.from_image_size(
            height,
            width,
            self.pruning_config,
            tile_size=tile_size,
            patch_size=self.patch_size,
            pinpoints=self.image_processor.image_grid_pinpoints,
        )

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        # Stock's own count carries what belongs to the checkpoint (extra tokens of the tower); only the difference is ours. The
        # layout comes first, as it checks what stock divides by.
        layout = self._token_layout(orig_height, orig_width, height)
        stock = super()._get_number_of_features(orig_height, orig_width, height, width)
        return stock - layout.num_stock + layout.num_retained

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        # Only serving engines ask. They count tokens before the image is seen, and never mask a placeholder out.
        if not self.pruning_config.exact_count:
            raise ValueError(
                "`exact_count` is False; serving engines need it True, because they place features by the number of tokens "
                "that an image's size determines. Set `exact_count=True` in the pruning_config of model and processor."
            )
        # transformers 5.6 writes these keyword arguments into defaults of its class, where they stay. Only `size` is read.
        size = {**kwargs, **(kwargs.get("images_kwargs") or {})}.get("size")
        asked = self
        if size:
            asked = copy.copy(self)
            asked.image_processor = copy.copy(self.image_processor)
            asked.image_processor.size = size
        return super(HIVTPLlavaNextProcessor, asked)._get_num_multimodal_tokens(image_sizes)

    def to_dict(self) -> dict[str, Any]:
        """As for any processor, with `pruning_config` as a plain dict."""
        output = super().to_dict()
        output["pruning_config"] = self.pruning_config.to_dict()
        return output

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # transformers hands the keywords of from_pretrained to the parts as well; a tokenizer would store ours.
        kwargs.pop("pruning_config", None)
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        # Which tokenizer class transformers believes depends on its release and on the model type: newer ones distrust the
        # class that llava_next checkpoints record. Under our type they would obey, and give other ids after "<image>".
        kwargs["config"] = LlavaNextConfig()
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )


__all__ = ["HIVTPLlavaNextProcessor"]
