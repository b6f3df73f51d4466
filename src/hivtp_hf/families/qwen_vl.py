"""What Qwen-VL families share: one rectangle an image, a tower that packs all images into one sequence, and M-RoPE.

Kept tokens stand at their original places (time, row, column), and the text behind an image where the unpruned model has it.
Stock computes positions from the full grids of images, so ours asks stock for the positions of the unpruned prompt, and takes
those of the tokens that are there.

How far positions run ahead of the tokens is state of stock's model (`rope_deltas`), which the next prompt overwrites. Here the
cache remembers it: one conversation, one cache.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import can_return_tuple

from ..pruning.call_budget import refuse_budget_among
from ..pruning.checked_values import MOST_CELLS, positive_integer
from ..pruning.compat import cache_among, cache_of, named_arguments, parameters_of, take_stock_keys_of_classes
from ..pruning.evidence import Evidence, evidence_to_read
from ..pruning.features import choose_by_layout
from ..pruning.generation import PrunedGenerationMixin
from ..pruning.layout import StitchedViews, TokenLayout
from ..pruning.model import PrunedImageFeaturesOutput, PrunedModelMixin
from ..pruning.prompt_columns import COLUMN_ARGUMENTS, refuse_columns_among
from ..pruning.settings import VisualTokenPruningConfig
from ..pruning.surplus_placeholders import cached_length
from .base import Family, as_grey_levels

_DELTAS_ATTRIBUTE = "hivtp_rope_deltas"
# What `mm_token_type_ids` calls the tokens of an image.
_IMAGE_TYPE = 1
# What serving engines call their attention in a language model's configuration, by which they can be told.
_ENGINES = ("vllm", "sglang")


class QwenVLFamily(Family):
    """A family over a `visual` tower whose patches are merged 2 x 2."""

    provides = frozenset(
        {Evidence.RECEIVED_ATTENTION, Evidence.ATTENTION_ROWS, Evidence.KEYS, Evidence.PIXELS, Evidence.FEATURES}
    )
    image_inputs = ("pixel_values", "image_grid_thw")
    keeps_at_least_one = True

    def encoder(self, model: Any) -> nn.Module:
        return model.visual

    def num_layers(self, config: Any) -> int:
        return config.vision_config.depth

    def feature_layer(self, config: Any, arguments: Mapping[str, Any]) -> int:
        return config.vision_config.depth - 1

    def default_layers(self, config: Any) -> Mapping[str, Any]:
        """Where the layers published for 24 blocks lie in a tower of this depth, all of whose blocks see the whole image.

        Of 27 blocks these are 7 to 9 for HIVTP and 9 for HiPrune.
        """
        depth = config.vision_config.depth
        first = round(6 * depth / 24)
        return {"importance_layers": tuple(range(first, min(first + 3, depth))), "object_layer": round(8 * depth / 24)}

    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        grids = arguments.get("image_grid_thw")
        if grids is None:
            raise ValueError("`pixel_values` came without `image_grid_thw`; pass both as the processor returned them.")
        if not isinstance(grids, Tensor) or grids.ndim != 2 or grids.shape[1] != 3:
            raise ValueError(
                f"`image_grid_thw` is {grids!r}; it must be a tensor (images, 3), the patches of every image in time, height "
                "and width, as the processor returns it."
            )
        return [tuple(grid) for grid in grids.tolist()]

    def layout(self, model: Any, size: Any, pruning: VisualTokenPruningConfig, arguments: Mapping[str, Any]) -> TokenLayout:
        """As every family's; a size in pixels means the nearest whole patches, as only a processor knows its limits."""
        vision = model.config.vision_config
        merge = vision.spatial_merge_size
        if len(size) == 2:
            side = vision.patch_size * merge
            size = (1, *(max(1, round(pixels / side)) * merge for pixels in size))
        return qwen_vl_layout(size, pruning, merge)

    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        patches, expected = len(arguments["pixel_values"]), int(arguments["image_grid_thw"].prod(1).sum())
        if patches != expected:
            raise ValueError(
                f"`pixel_values` holds {patches} patches; the {len(layouts)} images that `image_grid_thw` names have "
                f"{expected}. Pass both as the processor returned them."
            )

    def cell_scores(self, model: Any, scores: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
        merged = model.config.vision_config.spatial_merge_size**2
        found, expected = [len(of_image[0]) for of_image in scores], [layout.num_cells * merged for layout in layouts]
        if found != expected:
            raise ValueError(
                f"the vision tower scored segments of {found} patches; the images have {expected}. Read layers that attend "
                "over whole images."
            )
        return torch.cat(
            [
                self.in_raster_order(model, of_image[0].unflatten(0, (-1, merged)).mean(1), layout)
                for of_image, layout in zip(scores, layouts, strict=True)
            ]
        )

    # Mean and standard deviation of red, green and blue that the published image processors go by.
    pixel_scale: ClassVar[tuple[Sequence[float], Sequence[float]]] = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def grey_levels(self, model: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> Tensor:
        # Patches come cell by cell, in raster order: red, green and blue, each several times over for an image.
        vision, pixels = model.config.vision_config, arguments["pixel_values"]
        pixels = pixels.unflatten(1, (3, vision.temporal_patch_size, -1))[:, :, 0]
        return as_grey_levels(pixels, *self.pixel_scale).view(-1, vision.spatial_merge_size**2 * pixels.shape[-1])

    def in_raster_order(self, model: Any, of_cells: Tensor, layout: TokenLayout) -> Tensor:
        """Values of the merged cells of one image, (cells, ...), from the tower's order, which by default is that already."""
        return of_cells

    def processor_layout(self, processor: Any, height: int, width: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        height, width = positive_integer("height", height), positive_integer("width", width)
        grid = processor.grid_of_image(height, width)
        return qwen_vl_layout(grid, pruning, processor.image_processor.merge_size, (height, width))

    def layouts_of_inputs(
        self, processor: Any, inputs: Mapping[str, Any], prunings: Sequence[VisualTokenPruningConfig]
    ) -> list[TokenLayout]:
        grids = inputs["image_grid_thw"]
        merge_size = processor.image_processor.merge_size
        return [
            qwen_vl_layout(tuple(grid), pruning, merge_size)
            for grid, pruning in zip(torch.as_tensor(grids).tolist(), prunings, strict=True)
        ]

    def check_pruning(self, pruning: VisualTokenPruningConfig) -> None:
        if not pruning.exact_count:
            raise ValueError(
                "`exact_count` is False; Qwen-VL computes positions from runs of placeholders, which some without a token "
                "would break. It must be True."
            )
        if pruning.positions != "packed":
            raise ValueError(
                f"`positions` is {pruning.positions!r}; in Qwen-VL kept tokens stand at their original places already. It must "
                "be 'packed', the default."
            )

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        return {}

    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": 4 * side**2, "longest_edge": 400 * side**2},
        }


@functools.lru_cache(maxsize=1024)
def qwen_vl_layout(
    grid: tuple[int, int, int],
    pruning: VisualTokenPruningConfig,
    merge_size: int,
    image_size: tuple[int, int] | None = None,
) -> TokenLayout:
    """The layout of an image, remembered for repeated arguments. At least one token is kept of it, at any ratio.

    Args:
        grid: its patches in time, height and width.
        pruning: which tokens to keep.
        merge_size: how many patches a side become one token.
        image_size: (height, width) of the original image in pixels.

    Raises:
        ValueError: for patches of several times, as a video has, for sides that do not merge, and for more than 2**17 cells.
    """
    times, *sides = grid
    if times != 1 or any(side < 1 or side % merge_size for side in sides):
        raise ValueError(
            f"an image has {times} x {sides[0]} x {sides[1]} patches in time, height and width; it must have one in time, and "
            f"multiples of {merge_size} in height and width. Make images by the processor, and give videos as `videos`."
        )
    rows, columns = (side // merge_size for side in sides)
    if rows * columns > MOST_CELLS:
        raise ValueError(
            f"an image has {rows} x {columns} visual tokens; {MOST_CELLS} are allowed. Lower the image processor's budget of "
            "pixels (`size`)."
        )
    # Without any token, stock's positions would lose step with the images.
    return TokenLayout(image_size, pruning, [StitchedViews(rows, columns)], at_least_one=True)


class QwenVLModelMixin(PrunedModelMixin):
    """A base model of these families. Comes before the stock class."""

    def _start_pruning(self) -> None:
        super()._start_pruning()
        self._check_engine()

    def _check_engine(self) -> None:
        """A ValueError where the model is built in a serving engine, for what that would answer wrongly."""
        engine, further = self.config.get_text_config()._attn_implementation, self.family.streams[1:]
        if engine not in _ENGINES:
            return
        way_out = "Serve the checkpoint with `hivtp serve`, or run the stock checkpoint by the engine's own class."
        if further:
            raise ValueError(
                f"{self.family.title} runs in {engine} by transformers' classes, where `{further[0]}` of images are dropped, "
                f"pruned or not; answers would be wrong. {way_out}"
            )
        pruning = self.config.pruning_config
        if pruning.retention_ratio != 1 and evidence_to_read(pruning, self.provided_evidence) != frozenset():
            raise ValueError(
                f"{self.family.title} runs in {engine} by transformers' classes, where positions are asked for before images "
                f"are encoded; where the tokens stand that {pruning.method!r} keeps follows from the image. Set "
                f"`retention_ratio` to 1 there, or `method` to one that looks at no image: 'uniform', 'random'. {way_out}"
            )

    def _take_stock_keys(self) -> None:
        ours, stocks = self.family.classes, self.family.stock_classes
        take_stock_keys_of_classes(
            {ours.base_model.__name__: stocks.base_model.__name__, ours.model.__name__: stocks.model.__name__}
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        retention_ratio: Tensor | float | None = None,
        **kwargs: Any,
    ) -> tuple | PrunedImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every image, after the merger.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_patches, channels * temporal_patch_size * patch_size**2)`):
                The patches of all images, as the processor returns them.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`):
                The patches of every image in time, height and width.
            retention_ratio (`torch.LongTensor` of shape `(num_images,)` or `float`, *optional*):
                Prunes this call at these ratios, whatever the configuration says: as the processor returns it (the bits
                of float64 values), or a number for all images.

        Returns:
            [`PrunedImageFeaturesOutput`]: stock's output with pruned `pooler_output`, and `kept_indices`.

        Raises:
            ValueError: for inputs that do not fit each other or the pruning settings.
        """
        arguments = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        return self._prune_image_features(super().get_image_features, arguments, retention_ratio, **kwargs)

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, after a check that the prompt has one placeholder per kept token, with kept tokens where they stand."""
        arguments, deltas = self._with_positions(args, kwargs)
        if self.config.pruning_config.marks_columns:
            output = self._forward_marked((), arguments)
        else:  # stock's own: what the mixin does there is done
            output = super(PrunedModelMixin, self).forward(**arguments, return_dict=True)
        if deltas is not None:
            _remember_deltas_of_call(output, deltas)
        return output

    # Python over images and caches, which a compiler would trace anew for each call; it compiles what comes behind.
    @torch.compiler.disable
    def _with_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments of a forward for stock's, with positions, and what its cache is to remember."""
        refuse_budget_among(kwargs)
        arguments = named_arguments(type(self).forward, self, args, kwargs)
        if not self.config.pruning_config.marks_columns:
            refuse_columns_among(kwargs)
            for name in COLUMN_ARGUMENTS:
                arguments.pop(name, None)
        grids = {name: arguments.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        encoded = self.encode_ahead(arguments)
        for name in grids:
            arguments.pop(name, None)
        if arguments.get("position_ids") is not None:
            return arguments, None
        prompt = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        if prompt is None:
            return arguments, None  # stock says what is missing
        cache = cache_among(arguments)
        cached = 0 if cache is None else cached_length(cache)
        positions, deltas = self.positions_of_prompt(
            {**arguments, **grids}, prompt, encoded, deltas_in_cache(cache, cached, len(prompt), prompt.device), cached
        )
        if positions is not None:
            arguments["position_ids"] = positions
        return arguments, deltas

    def encode_ahead(
        self, arguments: dict[str, Any], layouts: list[TokenLayout] | None = None
    ) -> PrunedImageFeaturesOutput | None:
        """As every family's; and videos, whole, as stock takes nothing encoded beside what is not."""
        videos = None
        if arguments.get("pixel_values_videos") is not None:
            pixels = arguments.pop("pixel_values_videos")
            videos = self.get_video_features(pixels, arguments.get("video_grid_thw"), return_dict=True)
        encoded = super().encode_ahead(arguments, layouts)
        if videos is not None:
            arguments["mm_encoder_outputs"] = {**(arguments.get("mm_encoder_outputs") or {}), "video": videos}
        return encoded

    def get_rope_index(self, input_ids: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As stock, of unpruned prompts, and of those whose method looks at no image; others follow from what is kept.

        Raises:
            ValueError: for a prompt with other than one placeholder per token of an unpruned image, under another method or
                another ratio than the configuration's.
        """
        stock_method = self.family.stock_classes.base_model.get_rope_index
        given = parameters_of(stock_method).bind(self, input_ids, *args, **kwargs).arguments
        types, grids = given.get("mm_token_type_ids"), given.get("image_grid_thw")
        if types is not None and grids is not None:
            found = int((types == _IMAGE_TYPE).sum())
            unpruned = int(grids.prod(1).sum()) // self.config.vision_config.spatial_merge_size**2
            if found != unpruned:
                pruning = self.config.pruning_config
                layouts = [self.family.layout(self, grid, pruning, {}) for grid in map(tuple, grids.tolist())]
                kept = choose_by_layout(layouts, self.provided_evidence)
                if kept is not None and found == sum(map(len, kept)):
                    mask = given.get("attention_mask")
                    is_token = torch.ones_like(types, dtype=torch.bool) if mask is None else mask.bool()
                    return self._positions_of_columns(given, types, is_token, kept)
                raise ValueError(
                    f"the prompt has {found} image placeholders, and its unpruned images {unpruned} tokens. Where kept tokens "
                    "stand is known once images are encoded: call `forward` or `generate`, which see to that, or "
                    "`positions_of_prompt` with what `get_image_features` returned."
                )
        return super().get_rope_index(input_ids, *args, **kwargs)

    def positions_of_prompt(
        self, arguments: Mapping[str, Any], prompt: Tensor, encoded: Any, before: Tensor, cached: int
    ) -> tuple[Tensor | None, Tensor]:
        """Where the tokens of a call stand.

        Args:
            arguments: of the call, by name, with the grids of its images and videos.
            prompt: its new columns, as ids (batch, new) or embeddings (batch, new, hidden).
            encoded: what `get_image_features` returned for its images, or None where it has none.
            before: int64 (batch, 1), how far positions run ahead of the tokens that the cache holds.
            cached: how many columns these are.

        Returns:
            int64 (3, batch, new) in time, height and width, or None where all are as in a text; and int64 (batch, 1), how far
            positions run ahead behind this call.

        Raises:
            ValueError: for images without `mm_token_type_ids` or whose kept tokens are not known.
        """
        rows, new = prompt.shape[:2]
        mask = arguments.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        types: Any = arguments.get("mm_token_type_ids")
        grids: Any = arguments.get("image_grid_thw")
        has_video = (arguments.get("mm_encoder_outputs") or {}).get("video") is not None
        if types is None and (encoded is not None or has_video):
            raise ValueError(
                "the prompt came with images and without `mm_token_type_ids`; without them its tokens have no places. Pass all "
                "that the processor returned."
            )
        if types is None or not bool(types[:, -new:].any()):
            if not bool(before.any()):
                return None, before
            if mask is None:
                packed = torch.arange(cached, cached + new, device=prompt.device)[None].expand(rows, -1)
            else:
                packed = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
            return (packed + before)[None].expand(3, -1, -1), before
        is_token = torch.ones(rows, new, dtype=torch.bool, device=prompt.device) if mask is None else mask[:, -new:].bool()
        kept: Any = getattr(encoded, "kept_indices", None)
        if encoded is not None and grids is None:
            raise ValueError("the images came encoded without `image_grid_thw`; pass it as the processor returned it.")
        if kept is None and encoded is not None:
            stock = (grids.prod(1) // self.config.vision_config.spatial_merge_size**2).tolist()
            if stock != [len(features) for features in encoded.pooler_output]:
                raise ValueError(
                    "the images came encoded without `kept_indices`, so the places of their tokens are not known. Give them as "
                    "this model's `get_image_features` returns them, or as pixels."
                )
            kept = [torch.arange(number) for number in stock]
        positions, deltas = self._positions_of_columns(arguments, types[:, -new:], is_token, kept or [])
        if cached:
            first = cached if mask is None else mask[:, :-new].sum(1, keepdim=True)
            positions = positions + (first + before)[None] * is_token
            deltas = deltas + before
        return positions, deltas

    def _positions_of_columns(
        self, arguments: Mapping[str, Any], types: Tensor, is_token: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Stock's positions of the unpruned prompt, of the columns that are there; they begin at 0."""
        grids = arguments.get("image_grid_thw")
        stock = [] if grids is None else (grids.prod(1) // self.config.vision_config.spatial_merge_size**2).tolist()
        images = iter(zip(stock, kept, strict=True))
        full_types, columns_of_rows = [], []
        for of_row, mask in zip(types.tolist(), is_token.tolist(), strict=True):
            full: list[int] = []
            columns: list[int] = []
            present = [kind for kind, is_there in zip(of_row, mask, strict=True) if is_there]
            for kind, run in itertools.groupby(present):
                length = len(list(run))
                if kind != _IMAGE_TYPE:
                    columns += range(len(full), len(full) + length)
                    full += [kind] * length
                    continue
                number, indices = next(images, (0, ()))
                if len(indices) != length:
                    raise ValueError(
                        f"an image keeps {len(indices)} tokens, and the prompt has {length} placeholders in its place. Images "
                        "must come in the prompt's order, with text between two of them."
                    )
                columns += [len(full) + int(index) for index in indices]
                full += [kind] * number
            full_types.append(full)
            columns_of_rows.append(columns)
        longest = max(map(len, full_types))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in full_types], device=types.device)
        lengths = torch.tensor([len(row) for row in full_types], device=types.device)[:, None]
        given = {
            name: arguments.get(name)
            for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            if name in parameters_of(self.family.stock_classes.base_model.get_rope_index).parameters
        }
        full_positions, deltas = super().get_rope_index(
            torch.zeros_like(padded),
            mm_token_type_ids=padded,
            attention_mask=(torch.arange(longest, device=types.device) < lengths).long(),
            **given,
        )
        positions = torch.zeros(3, *types.shape, dtype=torch.int64, device=types.device)
        for row, columns in enumerate(columns_of_rows):
            positions[:, row, is_token[row]] = full_positions[:, row, columns]
        return positions, deltas + lengths - is_token.sum(1, keepdim=True)


class QwenVLGenerationMixin(PrunedGenerationMixin):
    """A model with a language modelling head of these families. Comes before the stock class."""

    _encodes_later_turns = True

    def _place_prompt(
        self, prompt: dict[str, Any], inputs: dict[str, Any], given: Mapping[str, Any], encoded: Any, cached: int
    ) -> Any:
        ids = prompt.get("input_ids") if prompt.get("input_ids") is not None else prompt.get("inputs_embeds")
        if ids is None or inputs.get("position_ids") is not None:
            return None
        new = {name: self._new_columns(prompt, name, cached) for name in ("input_ids", "inputs_embeds")}
        columns: Any = next(value for value in new.values() if value is not None)
        before = deltas_in_cache(cache_among(inputs), cached, len(columns), columns.device)
        mask = prompt.get("attention_mask")
        if mask is None:
            mask = self._default_attention_mask(prompt, torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device))
        arguments = {**inputs, **given, "attention_mask": mask}
        positions, deltas = self.model.positions_of_prompt(arguments, columns, encoded, before, cached)
        text = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)
        if positions is None:
            positions = text[None, :, -columns.shape[1] :].expand(3, -1, -1)
        # Of columns that the cache holds nothing is read, but transformers counts them.
        positions = torch.nn.functional.pad(positions, (text.shape[1] - positions.shape[2], 0))
        inputs["position_ids"] = torch.cat((text[None], positions))
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            inputs.pop(name, None)
        return deltas

    def _remember_placed(self, cache: Any, placed: Any) -> None:
        if cache is not None and placed is not None:
            setattr(cache, _DELTAS_ATTRIBUTE, placed)

    # Stock's goes by what the last prompt left on the model.
    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: dict[str, Any]) -> Tensor:
        text = GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
        cache = cache_among(model_kwargs)
        cached = 0 if cache is None else cached_length(cache)
        before = deltas_in_cache(cache, cached, text.shape[0], text.device)
        return torch.cat((text[None], (text + before)[None].expand(3, -1, -1)))


def deltas_in_cache(cache: Any, cached: int, rows: int, device: Any) -> Tensor:
    """How far positions run ahead of the tokens that a cache holds, int64 (rows, 1); 0 where it is empty.

    Raises:
        ValueError: for a cache that another number of rows filled.
    """
    deltas = getattr(cache, _DELTAS_ATTRIBUTE, None) if cached else None
    if deltas is None:
        return torch.zeros(rows, 1, dtype=torch.int64, device=device)
    if rows % len(deltas):
        raise ValueError(
            f"the cache was filled with {len(deltas)} rows, and the call has {rows}; it must have as many, or a multiple. "
            "Continue with the batch that filled the cache."
        )
    return deltas.to(device).repeat_interleave(rows // len(deltas), dim=0)


@torch.compiler.disable
def _remember_deltas_of_call(output: Any, deltas: Tensor) -> None:
    cache = cache_of(output)
    if cache is not None:
        setattr(cache, _DELTAS_ATTRIBUTE, deltas)
