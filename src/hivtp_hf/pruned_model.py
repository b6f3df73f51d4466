"""What every family's base model shares: pruned image features, and a forward on them.

A family mixes `PrunedModelMixin` into its base model and says how an image's tokens lie (`_token_layout`). Stock does the rest.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .pruned_features import (
    check_feature_selection,
    check_placeholders,
    check_pruning_fits_tower,
    has_cls_token,
    keep_all_features,
    prune_features,
)
from .received_attention import ReceivedAttention, attach
from .surplus_placeholders import (
    check_sliding_window,
    positions_of,
    remember_surplus,
    surplus_of_features,
    with_cached_surplus,
)
from .token_layout import TokenLayout

# A mixin's calls to super() reach the stock class that comes behind it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Stock
else:
    _Stock = object


@dataclass
class PrunedImageFeaturesOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns: stock's output, and what was kept.

    Args:
        pooler_output (`list[torch.Tensor]`):
            One (num_retained, hidden) tensor per image, which enters the language model.
        kept_indices (`list[torch.LongTensor]`):
            One ascending int64 tensor per image, newlines included: `pooler_output[i]` equals the stock model's
            `pooler_output[i][kept_indices[i]]`. With `exact_count=False` fewer may be kept; `pooler_output[i]` then begins
            with as many rows of zeros.
    """

    kept_indices: list[torch.LongTensor] | None = None


@functools.cache
def _parameters(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def named_arguments(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, whatever the release's order of parameters."""
    arguments = dict(_parameters(function).bind(model, *args, **kwargs).arguments)
    arguments.pop("self")
    return {**arguments, **arguments.pop("kwargs", {})}


def takes_encoded_images(function: Callable[..., Any]) -> bool:
    """Newer releases take encoded images as an argument of forward, and hand them from step to step in generate()."""
    return "mm_encoder_outputs" in _parameters(function).parameters


def _encoded_images(arguments: dict[str, Any]) -> Any:
    return (arguments.get("mm_encoder_outputs") or {}).get("image")


def _has_pixels(arguments: dict[str, Any]) -> bool:
    return arguments.get("pixel_values") is not None and len(arguments["pixel_values"]) > 0


def initialize_stock_parts(model: Any) -> None:
    """Initialises missing weights of a model's parts as stock does; called before the model initialises itself."""
    # Of classes that travel as remote code, transformers assumes that they would overwrite loaded weights, and skips every
    # module without weights of its own: CLIP's attention, for one, whose missing weights then stay as they lie in memory.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not part.is_remote_code():
            part.initialize_weights()


class PrunedModelMixin(_Stock):
    """A base model that prunes its visual tokens by `config.pruning_config`. Comes before the stock class."""

    # The layout of an image of a height and a width under the model's configuration: every family says its own.
    _token_layout: Callable[[int, int], TokenLayout]

    def _start_pruning(self) -> None:
        """Called by a family's constructor once the vision tower stands; ValueError where settings do not fit it."""
        num_layers = self.config.vision_config.num_hidden_layers
        check_pruning_fits_tower(self.config.pruning_config, num_layers)
        # Image size, patches and pinpoints are the same for every image, and so are their mistakes.
        self._token_layout(1, 1)
        self._has_cls_token = has_cls_token(self.vision_tower)
        check_feature_selection(self.config.vision_feature_select_strategy, self._has_cls_token)
        self._received_attention_tap = attach(self.vision_tower, num_layers)

    def initialize_weights(self) -> None:
        """As stock, for missing weights of its parts as well."""
        initialize_stock_parts(self)
        super().initialize_weights()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
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

        Returns:
            [`PrunedImageFeaturesOutput`]: stock's output with pruned `pooler_output`, and `kept_indices`.

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
        return PrunedImageFeaturesOutput(**{**stock_fields, "pooler_output": features, "kept_indices": kept_indices})

    # The layout is Python over image sizes: a compiler would trace it anew for each size.
    @torch.compiler.disable
    def _layouts(self, pixel_values: Tensor, image_sizes: Any) -> list[TokenLayout]:
        if image_sizes is None:
            raise ValueError("`pixel_values` came without `image_sizes`; pass both as the processor returned them.")
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                f"`pixel_values` is a {type(pixel_values).__name__}; it must be a tensor, as the processor returns it with "
                '`return_tensors="pt"`.'
            )
        layouts = [self._token_layout(height, width) for height, width in _size_pairs(image_sizes)]
        tiles = [layout.num_tiles for layout in layouts]
        if pixel_values.ndim == 5 and (pixel_values.shape[0] != len(tiles) or pixel_values.shape[1] < max(tiles, default=0)):
            raise ValueError(
                f"`pixel_values` holds {pixel_values.shape[0]} images of {pixel_values.shape[1]} tiles; `image_sizes` "
                f"names {len(tiles)} images that need up to {max(tiles, default=0)} tiles. Pass both as the processor "
                "returned them."
            )
        if pixel_values.ndim == 4 and pixel_values.shape[0] != sum(tiles):
            raise ValueError(
                f"`pixel_values` holds {pixel_values.shape[0]} tiles; the {len(tiles)} images that `image_sizes` names need "
                f"{sum(tiles)}. Pass both as the processor returned them."
            )
        return layouts

    @torch.compiler.disable
    def _prune(
        self, features: Sequence[Tensor], layouts: Sequence[TokenLayout], collector: ReceivedAttention
    ) -> tuple[list[Tensor], list[Tensor]]:
        return prune_features(features, layouts, collector.mean(), self.config.pruning_config)

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, after a check that the prompt has one placeholder per kept token."""
        exact = self.config.pruning_config.exact_count
        if exact and torch.compiler.is_compiling():
            return super().forward(*args, **kwargs, return_dict=True)
        arguments = named_arguments(type(self).forward, self, args, kwargs)
        self._check_placeholders(arguments)
        surplus = None if exact else self._mask_surplus(arguments)
        output = super().forward(**arguments, return_dict=True)
        if surplus is not None:
            remember_surplus(output.past_key_values, surplus)
        return output

    def _is_placeholder(self, arguments: dict[str, Any]) -> Tensor | None:
        """Which positions hold an image token, given as ids or as their embedding: bool (batch, sequence), None for neither."""
        if arguments.get("input_ids") is not None:
            return arguments["input_ids"] == self.config.image_token_id
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            return None
        token = torch.tensor(self.config.image_token_id, device=embeddings.device)
        return (embeddings == self.get_input_embeddings()(token)).all(-1)

    def _check_placeholders(self, arguments: dict[str, Any]) -> None:
        """Fails before anything runs if the prompt has other than one placeholder per kept token."""
        encoded = _encoded_images(arguments)
        if encoded is not None:
            retained = [len(features) for features in encoded.pooler_output]
            images = [f"image {i}" for i in range(len(retained))]
        elif _has_pixels(arguments):
            layouts = self._layouts(arguments["pixel_values"], arguments.get("image_sizes"))
            retained = [layout.num_retained for layout in layouts]
            images = [f"image {i} ({'{} x {}'.format(*layout.image_size)})" for i, layout in enumerate(layouts)]
        else:
            return
        is_placeholder = self._is_placeholder(arguments)
        if is_placeholder is not None:  # else stock says what is missing
            check_placeholders(is_placeholder, retained, images, self.config.pruning_config)

    def _encode_ahead(self, arguments: dict[str, Any]) -> PrunedImageFeaturesOutput | None:
        """The images of a call, encoded before the language model runs and left among its arguments instead of pixels."""
        encoded = _encoded_images(arguments)
        if encoded is None and _has_pixels(arguments):
            names = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
            encoded = self.get_image_features(
                **{name: arguments[name] for name in names if name in arguments}, return_dict=True
            )
            for name in ("pixel_values", "image_sizes"):
                arguments.pop(name, None)
            arguments["mm_encoder_outputs"] = {"image": encoded}
        return encoded

    def _mask_surplus(self, arguments: dict[str, Any]) -> Tensor | None:
        """Lets placeholders without a token have no effect: changes the arguments of a forward in place.

        Returns:
            The surplus among cached and new positions, bool (batch, cached + new), or None if there is none.
        """
        encoded = self._encode_ahead(arguments)
        is_placeholder = self._is_placeholder(arguments)
        if is_placeholder is None:
            return None
        surplus = with_cached_surplus(surplus_of_features(is_placeholder, encoded), arguments.get("past_key_values"))
        if not takes_encoded_images(type(self).forward):
            arguments.pop("mm_encoder_outputs", None)
            if encoded is not None:
                self._enter_by_embeddings(arguments, encoded, is_placeholder)
        if not surplus.any():
            return None
        check_sliding_window(self.config.get_text_config(), surplus.shape[1])
        mask = arguments.get("attention_mask")
        mask = torch.ones_like(surplus, dtype=torch.int64) if mask is None else mask
        # A mask of four dimensions comes from generate(), which has masked the surplus by then.
        if isinstance(mask, Tensor) and mask.ndim == 2:
            masked = mask.masked_fill(surplus, 0)
            if arguments.get("position_ids") is None or not torch.equal(masked, mask):
                arguments["position_ids"] = positions_of(masked, is_placeholder.shape[1])
            arguments["attention_mask"] = masked
        return surplus

    def _enter_by_embeddings(self, arguments: dict[str, Any], encoded: Any, is_placeholder: Tensor) -> None:
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.get_input_embeddings()(arguments.pop("input_ids"))
        features = torch.cat(list(encoded.pooler_output)).to(embeddings.device, embeddings.dtype)
        arguments["inputs_embeds"] = embeddings.masked_scatter(is_placeholder[..., None].to(embeddings.device), features)


def _size_pairs(image_sizes: Any) -> list[tuple[int, int]]:
    sizes = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    try:
        return [(height, width) for height, width in sizes]
    except (TypeError, ValueError):
        raise ValueError(f"`image_sizes` is {sizes!r}; it must be (height, width) in pixels for every image.") from None
