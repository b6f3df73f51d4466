"""LLaVA-NeXT with visual token pruning: thin subclasses of transformers' model classes."""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_hivtp_llava_next import HIVTPLlavaNextConfig
from .generation_limits import check_generation
from .methods import pruning_method  # noqa: F401  (named so that this file travels; transformers 5.6 copies no more)
from .pruned_features import (
    check_feature_selection,
    check_placeholders,
    check_pruning_fits_tower,
    has_cls_token,
    keep_all_features,
    prune_features,
)
from .pruning_config import VisualTokenPruningConfig  # noqa: F401
from .ranking import descending_rank  # noqa: F401
from .received_attention import ReceivedAttention, attach
from .selectors_hivtp import select_hivtp  # noqa: F401
from .supported_transformers import check_transformers_version  # noqa: F401
from .token_layout import TokenLayout

# transformers renames checkpoint keys by model type and knows only its own. Ours takes stock's rules, preceded by one that
# carries the Hub's vision keys into the base model as well.
register_checkpoint_conversion_mapping(
    HIVTPLlavaNextConfig.model_type,
    [
        WeightRenaming(r"^vision_tower\.vision_model\.", "model.vision_tower."),
        *(get_checkpoint_conversion_mapping("llava_next") or []),
    ],
    overwrite=True,
)


@dataclass
class HIVTPImageFeaturesOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns: stock's output, and what was kept.

    Args:
        pooler_output (`list[torch.Tensor]`):
            One (num_retained, hidden) tensor per image, which enters the language model.
        kept_indices (`list[torch.LongTensor]`):
            One ascending int64 tensor (num_retained,) per image, newlines included: `pooler_output[i]` equals the stock
            model's `pooler_output[i][kept_indices[i]]`.
    """

    kept_indices: list[torch.LongTensor] | None = None


class HIVTPLlavaNextModel(LlavaNextModel):
    r"""
    The LLaVA-NeXT model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, tiles that do not divide into
            patches, a feature selection that is not one feature per cell, `exact_count=False`.

    Source: HIVTP, arXiv 2509.23663.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    _auto_class = "AutoModel"

    def __init__(self, config: HIVTPLlavaNextConfig):
        check_pruning_fits_tower(config.pruning_config, config.vision_config.num_hidden_layers)
        # Built for its checks: image size, patches and pinpoints are the same for every image.
        _layout(1, 1, config)
        super().__init__(config)
        self._has_cls_token = has_cls_token(self.vision_tower)
        check_feature_selection(config.vision_feature_select_strategy, self._has_cls_token)
        self._received_attention_tap = attach(self.vision_tower, config.vision_config.num_hidden_layers)

    def initialize_weights(self) -> None:
        _initialize_stock_parts(self)
        super().initialize_weights()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple | HIVTPImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every image, after the projector.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, tiles, channels, height, width)`):
                As the processor returns them; images with fewer tiles are padded.
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`):
                Height and width of the original images in pixels.
            vision_feature_layer (`int` or `list[int]`, *optional*), vision_feature_select_strategy (`str`, *optional*):
                As for the stock model; the configuration's by default.

        Returns:
            [`HIVTPImageFeaturesOutput`]: stock's output with pruned `pooler_output`, and `kept_indices`.

        Raises:
            ValueError: for inputs that do not fit each other or the pruning settings.
        """
        pruning = self.config.pruning_config
        check_pruning_fits_tower(pruning, self._received_attention_tap.num_layers)
        check_feature_selection(
            vision_feature_select_strategy or self.config.vision_feature_select_strategy, self._has_cls_token
        )
        layouts = self._layouts(pixel_values, image_sizes)
        stock = functools.partial(
            super().get_image_features,
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            return_dict=True,
            **kwargs,
        )
        if all(layout.keeps_everything for layout in layouts):
            output = stock()
            features, kept_indices = output.pooler_output, keep_all_features(output.pooler_output, layouts)
        else:
            collector = ReceivedAttention(pruning.scored_layers)
            output = self._received_attention_tap.call(stock, collector)
            features, kept_indices = self._prune(output.pooler_output, layouts, collector)
        stock_fields = {field.name: getattr(output, field.name) for field in fields(BaseModelOutputWithPooling)}
        return HIVTPImageFeaturesOutput(**{**stock_fields, "pooler_output": features, "kept_indices": kept_indices})

    # The layout is Python over image sizes: a compiler would trace it anew for each size.
    @torch.compiler.disable
    def _layouts(self, pixel_values: Tensor, image_sizes: Any) -> list[TokenLayout]:
        if image_sizes is None:
            raise ValueError("`pixel_values` came without `image_sizes`; pass both as the processor returned them.")
        layouts = [_layout(height, width, self.config) for height, width in _size_pairs(image_sizes)]
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 5:
            most_tiles = max((layout.num_tiles for layout in layouts), default=0)
            if pixel_values.shape[0] != len(layouts) or pixel_values.shape[1] < most_tiles:
                raise ValueError(
                    f"`pixel_values` holds {pixel_values.shape[0]} images of {pixel_values.shape[1]} tiles; `image_sizes` "
                    f"names {len(layouts)} images that need up to {most_tiles} tiles. Pass both as the processor returned them."
                )
        return layouts

    @torch.compiler.disable
    def _prune(
        self, features: Sequence[Tensor], layouts: Sequence[TokenLayout], collector: ReceivedAttention
    ) -> tuple[list[Tensor], list[Tensor]]:
        return prune_features(features, layouts, collector.mean(), self.config.pruning_config)

    # Takes stock's signature, which differs between releases and tells generate() what it may pass.
    @functools.wraps(LlavaNextModel.forward)
    def forward(self, input_ids=None, pixel_values=None, image_sizes=None, *args, **kwargs):
        if not torch.compiler.is_compiling():
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            self._check_placeholders(input_ids, pixel_values, image_sizes, encoded, kwargs.get("inputs_embeds"))
        return super().forward(input_ids, pixel_values, image_sizes, *args, **kwargs)

    def _check_placeholders(self, input_ids, pixel_values, image_sizes, encoded, inputs_embeds) -> None:
        """Fails before anything runs if the prompt has other than one placeholder per kept token."""
        if encoded is not None:
            retained = [len(features) for features in encoded.pooler_output]
            images = [f"image {i}" for i in range(len(retained))]
        elif pixel_values is not None and pixel_values.shape[0] > 0:
            layouts = self._layouts(pixel_values, image_sizes)
            retained = [layout.num_retained for layout in layouts]
            images = [f"image {i} ({'{} x {}'.format(*layout.image_size)})" for i, layout in enumerate(layouts)]
        else:
            return
        is_placeholder = self._is_placeholder(input_ids, inputs_embeds)
        if is_placeholder is not None:  # else stock says what is missing
            check_placeholders(is_placeholder, retained, images, self.config.pruning_config)

    def _is_placeholder(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is not None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        return None


class HIVTPLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    r"""
    LLaVA-NeXT with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock LLaVA-NeXT checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPLlavaNextModel`].

    Source: HIVTP, arXiv 2509.23663.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: HIVTPLlavaNextConfig):
        # Past the parent's own constructor, which would build the stock model inside.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = HIVTPLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def initialize_weights(self) -> None:
        _initialize_stock_parts(self)
        super().initialize_weights()

    # Takes stock's signature and documentation; only what stock would get wrong is refused.
    @functools.wraps(LlavaNextForConditionalGeneration.generate)
    def generate(self, *args, **kwargs):
        generate = super().generate
        arguments = {"kwargs": {}, **inspect.signature(generate).bind_partial(*args, **kwargs).arguments}
        prompt, inputs = arguments.get("inputs"), arguments["kwargs"]
        input_ids = inputs.get("input_ids") if prompt is None else prompt
        check_generation(self, arguments, self.model._is_placeholder(input_ids, inputs.get("inputs_embeds")))
        return generate(*args, **kwargs)


def _initialize_stock_parts(model: Any) -> None:
    # Of classes that travel as remote code, transformers assumes that they would overwrite loaded weights, and skips every
    # module without weights of its own: CLIP's attention, for one, whose missing weights then stay as they lie in memory.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not part.is_remote_code():
            part.initialize_weights()


def _size_pairs(image_sizes: Any) -> list[tuple[int, int]]:
    sizes = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    try:
        return [(height, width) for height, width in sizes]
    except (TypeError, ValueError):
        raise ValueError(f"`image_sizes` is {sizes!r}; it must be (height, width) in pixels for every image.") from None


def _layout(height: int, width: int, config: HIVTPLlavaNextConfig) -> TokenLayout:
    return TokenLayout.from_image_size(
        height,
        width,
        config.pruning_config,
        tile_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        pinpoints=config.image_grid_pinpoints,
    )


__all__ = ["HIVTPLlavaNextForConditionalGeneration", "HIVTPLlavaNextModel"]
