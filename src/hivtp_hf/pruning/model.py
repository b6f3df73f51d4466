"""What every family's base model shares: pruned image features, and a forward on them.

A family mixes `PrunedModelMixin` into its base model, and its `Family` says what is particular. Stock does the rest.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, is_torchdynamo_exporting

from .attention_interface import CollectedAttention, RowsWanted, attach
from .call_budget import refuse_budget_among
from .compat import cache_among, cache_of, named_arguments, take_stock_keys
from .evidence import EncoderFacts, Evidence
from .features import (
    check_placeholders,
    check_pruning_fits_encoder,
    gather_evidence,
    keep_all_features,
    prune_features,
)
from .layout import TokenLayout
from .look import Look
from .marked_columns import MarkedColumnsMixin
from .prompt_columns import COLUMN_ARGUMENTS, refuse_columns_among
from .registry import pruning_method
from .retention_bits import ratios_of_images
from .settings import VisualTokenPruningConfig
from .stages import drops_any, stages_of_language_model
from .surplus_placeholders import (
    check_sliding_window,
    positions_of,
    remember_surplus,
    surplus_of_features,
    with_cached_surplus,
)


@dataclass
class PrunedImageFeaturesOutput(BaseModelOutputWithPooling):
    """What `get_image_features` returns: stock's output, and what was kept.

    Args:
        pooler_output (`list[torch.Tensor]`):
            One (num_retained, hidden) tensor per image, which enters the language model.
        kept_indices (`list[torch.LongTensor]`):
            One ascending int64 tensor per image, newlines included: `pooler_output[i]` equals the stock model's
            `pooler_output[i][kept_indices[i]]`, except where it holds averages. With `exact_count=False` fewer may be kept;
            `pooler_output[i]` then begins with as many rows of zeros.
        num_stock (`list[int]`):
            How many tokens the unpruned model uses for each image; None unless `positions` are the original ones.
        log_weights (`list[torch.FloatTensor]`):
            One float32 (num_retained,) tensor per image, what the language model adds to the logits of the tokens' keys; None
            unless `token_weights` are on.
        is_average (`list[torch.BoolTensor]`):
            One tensor per image as long as `kept_indices`: which of these tokens hold an average of themselves and dropped
            ones; None unless the method makes averages.
        deepstack_features (`list[list[torch.Tensor]]`):
            Of families whose language model takes features at several layers, for each of these layers one
            (num_retained, hidden) tensor per image; else None.
    """

    kept_indices: list[Tensor] | None = None
    num_stock: list[int] | None = None
    log_weights: list[Tensor] | None = None
    stages_survived: list[Tensor] | None = None
    is_average: list[Tensor] | None = None
    deepstack_features: list[list[Tensor]] | None = None


_STOCK_FIELDS = tuple(field.name for field in fields(BaseModelOutputWithPooling))


def encoded_images(arguments: Mapping[str, Any]) -> Any:
    """The images of a call that come encoded, as `get_image_features` returns them, or None."""
    return (arguments.get("mm_encoder_outputs") or {}).get("image")


def has_pixels(arguments: Mapping[str, Any]) -> bool:
    """Whether images of a call come as pixels."""
    return arguments.get("pixel_values") is not None and len(arguments["pixel_values"]) > 0


class PrunedModelMixin(MarkedColumnsMixin):
    """A base model that prunes its visual tokens by `config.pruning_config`. Comes before the stock class."""

    # What is known of the family alone: a `Family`, as families/base.py describes it.
    family: ClassVar[Any]
    # The kinds of evidence that this model has.
    provided_evidence: frozenset[Evidence]

    def _start_pruning(self) -> None:
        """Called by a family's constructor once the vision encoder stands; ValueError where settings do not fit it."""
        # Weights are loaded and saved after a model is built, so that importing need not wait for transformers' rules.
        self._take_stock_keys()
        self.provided_evidence = self.family.provided_by(self)
        pruning = self.config.pruning_config
        check_pruning_fits_encoder(pruning, self.encoder_facts(), self.provided_evidence)
        stages_of_language_model(pruning, self.config.get_text_config().num_hidden_layers)
        # Image size, patches and pinpoints are the same for every image, and so are their mistakes.
        self.token_layout(1, 1, pruning.replace(retention_ratio=1.0))
        self._received_attention_tap = attach(self.family.encoder(self), self.family.num_layers(self.config))

    def _take_stock_keys(self) -> None:
        take_stock_keys(self.config.model_type, self.config.stock_model_type)

    def encoder_facts(self, arguments: Mapping[str, Any] | None = None) -> EncoderFacts:
        """What methods must know of the vision encoder to say which layers they read.

        Args:
            arguments: of a call of `get_image_features`, by name; the configuration's unless given.
        """
        return self.family.encoder_facts(self.config, arguments or {})

    def token_layout(self, height: int, width: int, pruning: Any = None) -> TokenLayout:
        """How the tokens of an image lie, and how many of them are kept.

        Args:
            height, width: of the image in pixels.
            pruning: settings in place of the configuration's own.

        Raises:
            ValueError: where the image or the settings do not fit the model.
        """
        pruning = self.config.pruning_config if pruning is None else VisualTokenPruningConfig.coerce(pruning)
        return self.family.layout(self, (height, width), pruning, {})

    @torch.no_grad()
    def look(
        self, inputs: Mapping[str, Any], prunings: Iterable[Any] | None = None, layers: Iterable[int] | None = None
    ) -> Look:
        """Runs the vision encoder once over some images, and takes along all that methods read. Nothing is pruned.

        Features and scores are those of the model's own pass, bit for bit; layers that nothing is read from do not run.

        Args:
            inputs: what the processor returned for the images; text plays no part.
            prunings: settings whose evidence is wanted; the model's own unless these or `layers` are given.
            layers: encoder layers, 0-based, whose attention is wanted in both kinds, as far as the encoder has them.

        Raises:
            ValueError: for inputs that are no images of this family, and settings or layers that do not fit the encoder.
        """
        arguments = {name: inputs[name] for name in self._image_arguments() if inputs.get(name) is not None}
        # The settings play no part, and a token budget among them may be too small for an image.
        layouts = self._layouts(arguments, pruning=VisualTokenPruningConfig("none"))
        encoder, has_class_token = self.encoder_facts(arguments), Evidence.CLASS_ATTENTION in self.provided_evidence
        received = set(() if layers is None else layers)
        wrong = sorted(layer for layer in received if not 0 <= layer < encoder.num_layers)
        if wrong:
            raise ValueError(
                f"`layers` has {wrong}; the vision tower has {encoder.num_layers} layers, 0 to {encoder.num_layers - 1}."
            )
        class_attention = set(received) if has_class_token else set()
        keys: set[int] = set()
        wanted = [self.config.pruning_config] if prunings is None and layers is None else prunings or ()
        rows, reads_pixels, tells_encoded = {}, False, Evidence.ENCODED in self.provided_evidence
        for settings in map(VisualTokenPruningConfig.coerce, wanted):
            kinds = check_pruning_fits_encoder(settings, encoder, self.provided_evidence)
            for kind, read in (
                (Evidence.RECEIVED_ATTENTION, received),
                (Evidence.CLASS_ATTENTION, class_attention),
                (Evidence.KEYS, keys),
            ):
                if kind in kinds:
                    read.update(settings.scored_layers(encoder))
            reads_pixels |= Evidence.PIXELS in kinds
            if Evidence.ATTENTION_ROWS in kinds:
                rows[settings] = _rows_wanted(settings.scored_layers(encoder), self._layouts(arguments, pruning=settings))
        collector = CollectedAttention(received, class_attention, rows, int(has_class_token), keys)
        call = functools.partial(super().get_image_features, **arguments, return_dict=True)
        call = self.family.ending_early(call, self.config, arguments, collector.layers)
        output = self._received_attention_tap.call(call, collector)
        return Look(
            self,
            arguments,
            list(output.pooler_output),
            *self._scores_of_cells(collector, layouts),
            encoder,
            attention_rows=self._rows_of_cells(collector, layouts),
            grey_levels=self.family.grey_levels(self, arguments, layouts) if reads_pixels else None,
            encoded=self.family.encoded_cells(self, output, arguments, layouts) if tells_encoded else None,
            keys=self._of_cells(collector.keys(), layouts),
        )

    def _image_arguments(self) -> tuple[str, ...]:
        return (*self.family.image_inputs, *self.family.feature_arguments)

    def _prune_image_features(
        self,
        stock: Callable[..., Any],
        arguments: Mapping[str, Any],
        retention_ratio: Any,
        *,
        token_layouts: list[TokenLayout] | None = None,
        features_only: bool = False,
        **keywords: Any,
    ) -> PrunedImageFeaturesOutput:
        """What a family's `get_image_features` returns: stock's result, with what the method keeps of every image.

        Args:
            stock: stock's `get_image_features`.
            arguments: of the call, by name.
            retention_ratio: of the call.
            token_layouts: of every image, where the caller has asked for them already.
            features_only: whether the caller reads nothing but features, so that encoder layers behind them need not run.
            **keywords: further ones, for stock.
        """
        refuse_budget_among(keywords)
        layouts = self._layouts(arguments, retention_ratio) if token_layouts is None else token_layouts
        pruning, encoder = self.config.pruning_config, self.encoder_facts(arguments)
        kinds = check_pruning_fits_encoder(pruning, encoder, self.provided_evidence)
        layers = pruning.scored_layers(encoder)
        call = functools.partial(stock, **arguments, return_dict=True, **keywords)
        if features_only:
            call = self.family.ending_early(call, self.config, arguments, layers)
        num_layers = self.config.get_text_config().num_hidden_layers
        if all(layout.keeps_everything and not drops_any(layout.pruning, num_layers) for layout in layouts):
            output = call()
            pruned = keep_all_features(output.pooler_output, layouts)
        else:
            collector = CollectedAttention(
                layers if Evidence.RECEIVED_ATTENTION in kinds else (),
                layers if Evidence.CLASS_ATTENTION in kinds else (),
                {pruning: _rows_wanted(layers, layouts)} if Evidence.ATTENTION_ROWS in kinds else None,
                int(Evidence.CLASS_ATTENTION in self.provided_evidence),
                layers if Evidence.KEYS in kinds else (),
            )
            output = self._received_attention_tap.call(call, collector)
            of_stock = {name: getattr(output, name) for name in self.family.streams}
            grey_levels = self.family.grey_levels(self, arguments, layouts) if Evidence.PIXELS in kinds else None
            encoded = self.family.encoded_cells(self, output, arguments, layouts) if Evidence.ENCODED in kinds else None
            pruned = self._prune(of_stock, layouts, collector, encoder, grey_levels, encoded)
        stock_fields = {name: getattr(output, name) for name in (*_STOCK_FIELDS, *self.family.streams)}
        return PrunedImageFeaturesOutput(**{**stock_fields, **pruned})

    def _scores_of_cells(
        self, collector: CollectedAttention, layouts: Sequence[TokenLayout]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Of every layer that reported what cells receive, and what the class token gives them, float32 (cells of images,)."""
        return self._of_cells(collector.received(), layouts), self._of_cells(collector.class_attention(), layouts)

    def _of_cells(self, of_layers: Mapping[int, Sequence[Tensor]], layouts: Sequence[TokenLayout]) -> dict[int, Tensor]:
        """What a collector has of the tokens of every layer, as that of cells: float32 (cells of images, ...)."""
        return {layer: self.family.cell_scores(self, found, layouts) for layer, found in of_layers.items()}

    def _rows_of_cells(self, collector: CollectedAttention, layouts: Sequence[TokenLayout]) -> dict[Any, dict[int, Tensor]]:
        """By settings and layer what the tokens attend to that a method named, float32 (cells of images,)."""
        return {settings: self._of_cells(of_settings, layouts) for settings, of_settings in collector.rows().items()}

    # The layout is Python over image sizes: a compiler would trace it anew for each size.
    @torch.compiler.disable
    def _layouts(
        self, arguments: Mapping[str, Any], retention_ratio: Any = None, pruning: VisualTokenPruningConfig | None = None
    ) -> list[TokenLayout]:
        """The layout of every image of a call, each under its own ratio; ValueError where inputs do not fit each other."""
        if is_torchdynamo_exporting():
            raise ValueError(
                "`torch.export` is not supported with images: the layout of their tokens is computed in Python, which an "
                "export does not record. Export with prompts without images, or run the model as it is or by `torch.compile`."
            )
        pixels = self.family.image_inputs[0]
        if not isinstance(arguments[pixels], Tensor):
            raise ValueError(
                f"`{pixels}` is a {type(arguments[pixels]).__name__}; it must be a tensor, as the processor returns it with "
                '`return_tensors="pt"`.'
            )
        sizes = self.family.image_sizes(self, arguments)
        prunings = [self.config.pruning_config if pruning is None else pruning] * len(sizes)
        ratios = ratios_of_images(retention_ratio, len(sizes))
        if ratios is not None:
            prunings = [pruning.for_call(ratio) for pruning, ratio in zip(prunings, ratios, strict=True)]
        layouts = [self.family.layout(self, size, pruning, arguments) for size, pruning in zip(sizes, prunings, strict=True)]
        self.family.check_pixels(arguments, layouts)
        return layouts

    @torch.compiler.disable
    def _prune(
        self,
        streams: Mapping[str, Any],
        layouts: Sequence[TokenLayout],
        collector: CollectedAttention,
        encoder: EncoderFacts,
        grey_levels: Tensor | None,
        encoded: Sequence[Tensor] | None,
    ) -> dict[str, Any]:
        rows = next(iter(self._rows_of_cells(collector, layouts).values()), None)
        scores = self._scores_of_cells(collector, layouts)
        keys = self._of_cells(collector.keys(), layouts)
        projector = None if encoded is None else functools.partial(self.family.project, self)
        evidence = gather_evidence(
            streams["pooler_output"], layouts, *scores, encoder, rows, grey_levels, encoded, keys, projector
        )
        return prune_features(evidence, streams, self.config.get_text_config().num_hidden_layers)

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, after a check that the prompt has one placeholder per kept token."""
        if self.config.pruning_config.marks_columns:
            return self._forward_marked(args, kwargs)
        refuse_columns_among(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in COLUMN_ARGUMENTS}
        exact = self.config.pruning_config.exact_count
        if exact and torch.compiler.is_compiling() and kwargs.get("retention_ratio") is None:
            kwargs.pop("retention_ratio", None)
            return super().forward(*args, **kwargs, return_dict=True)
        refuse_budget_among(kwargs)
        arguments = named_arguments(type(self).forward, self, args, kwargs)
        encoded = self.encode_ahead(arguments)
        surplus = None if exact else self._mask_surplus(arguments, encoded)
        output = super().forward(**arguments, return_dict=True)
        if surplus is not None:
            remember_surplus(cache_of(output), surplus)
        return output

    def is_placeholder(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Which positions hold an image token, given as ids or as their embedding: bool (batch, sequence), None for neither."""
        if arguments.get("input_ids") is not None:
            return arguments["input_ids"] == self.config.image_token_id
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            return None
        token = torch.tensor(self.config.image_token_id, device=embeddings.device)
        return (embeddings == self.get_input_embeddings()(token)).all(-1)

    def check_prompt(self, arguments: Mapping[str, Any]) -> list[TokenLayout] | None:
        """A ValueError, before anything runs, if a prompt has other than one placeholder per kept token.

        Returns:
            The layout of every image that comes as pixels, or None where there is none.
        """
        encoded, layouts = encoded_images(arguments), None
        if encoded is not None:
            retained = [len(features) for features in encoded.pooler_output]
        elif has_pixels(arguments):
            layouts = self._layouts(arguments, arguments.get("retention_ratio"))
            retained = [layout.num_retained for layout in layouts]
        else:
            return None
        is_placeholder = self.is_placeholder(arguments)
        if is_placeholder is not None:  # else stock says what is missing
            check_placeholders(is_placeholder, retained, layouts, self.config.pruning_config)
        return layouts

    def encode_ahead(
        self, arguments: dict[str, Any], layouts: list[TokenLayout] | None = None
    ) -> PrunedImageFeaturesOutput | None:
        """The images of a call, encoded before the language model runs and left among its arguments instead of pixels.

        Args:
            arguments: of the call, by name; changed in place. Their prompt is checked unless layouts are given.
            layouts: of every image, as `check_prompt` returned them.

        Returns:
            The encoded images, also where they came so; None where the call has none.
        """
        layouts = self.check_prompt(arguments) if layouts is None else layouts
        encoded = encoded_images(arguments)
        if encoded is None and has_pixels(arguments):
            names = (*self._image_arguments(), "retention_ratio")
            given = {name: arguments[name] for name in names if name in arguments}
            encoded = self.get_image_features(**given, return_dict=True, token_layouts=layouts, features_only=True)
            for name in self.family.image_inputs:
                arguments.pop(name, None)
            arguments["mm_encoder_outputs"] = {"image": encoded}
        arguments.pop("retention_ratio", None)  # stock knows no such argument, and goes on without
        return encoded

    def _mask_surplus(self, arguments: dict[str, Any], encoded: PrunedImageFeaturesOutput | None) -> Tensor | None:
        """Lets placeholders without a token have no effect: changes the arguments of a forward in place.

        Args:
            arguments: of the forward, by name.
            encoded: its images, or None where it has none.

        Returns:
            The surplus among cached and new positions, bool (batch, cached + new), or None if there is none.
        """
        is_placeholder = self.is_placeholder(arguments)
        if is_placeholder is None:
            return None
        surplus = with_cached_surplus(surplus_of_features(is_placeholder, encoded), cache_among(arguments))
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


def _rows_wanted(layers: Sequence[int], layouts: Sequence[TokenLayout]) -> RowsWanted:
    """What is wanted of attention rows by the method of some layouts. A sequence is a view, as the tower sees it."""
    prunings = [layout.pruning for layout in layouts for _ in range(layout.num_tiles)]
    method = pruning_method(prunings[0].method)
    return RowsWanted(tuple(layers), lambda received, first: method.rows(received, prunings[first : first + received.shape[0]]))
