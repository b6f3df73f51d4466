"""LLaVA-OneVision with visual token pruning: what is particular to it, and thin subclasses of transformers' classes.

An image alone in its prompt is a base tile and crops, as in LLaVA-NeXT. Stock resamples the crops where they have more cells
than so many tiles; methods then choose among the cells of the result. Images that share a prompt are a tile each. Frames of a
video are pooled, and pruned like tiles.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.processing_utils import MultiModalData
from transformers.utils import can_return_tuple, is_torchvision_available

from ..pruning.checked_values import checked_pinpoints, positive_integer, shown
from ..pruning.compat import side_of, with_stock_signature
from ..pruning.configuration import PrunedConfigMixin
from ..pruning.evidence import Evidence
from ..pruning.generation import PrunedGenerationMixin
from ..pruning.layout import TokenLayout, cells_per_side
from ..pruning.model import PrunedImageFeaturesOutput, PrunedModelMixin, has_pixels
from ..pruning.retention_bits import ratios_of_images
from ..pruning.settings import VisualTokenPruningConfig, check_no_setting_among
from .base import Family, FamilyClasses
from .llava_onevision_layout import llava_onevision_layout, llava_onevision_video_layout
from .llava_towers import (
    LlavaTowersFamily,
    check_feature_selection,
    check_tiles,
    feature_argument,
    has_class_token,
    sizes_of_images,
)
from .video_processing import FramesProcessor, OptionalVideoPartMixin


class LlavaOnevisionFamily(LlavaTowersFamily):
    """LLaVA-OneVision: a base tile and crops, which are resampled above a limit; or one tile, beside other images."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    # Resampled cells have no pixels of their own.
    provides = frozenset({Evidence.RECEIVED_ATTENTION, Evidence.ATTENTION_ROWS, Evidence.KEYS, Evidence.FEATURES})
    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    feature_arguments: ClassVar[tuple[str, ...]] = (*LlavaTowersFamily.feature_arguments, "vision_aspect_ratio")

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(
            HIVTPLlavaOnevisionConfig,
            HIVTPLlavaOnevisionModel,
            HIVTPLlavaOnevisionForConditionalGeneration,
            HIVTPLlavaOnevisionProcessor,
        )

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(
            LlavaOnevisionConfig, LlavaOnevisionModel, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
        )

    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
        """Of every image (height, width) in pixels, and whether it is alone in its prompt."""
        sizes = sizes_of_images(arguments.get("image_sizes"))
        alone = _alone_in_prompt(arguments.get("batch_num_images"), len(sizes))
        return [(*size, is_alone) for size, is_alone in zip(sizes, alone, strict=True)]

    def layout(self, model: Any, size: Any, pruning: VisualTokenPruningConfig, arguments: Mapping[str, Any]) -> TokenLayout:
        strategy = feature_argument(model.config, arguments, "vision_feature_select_strategy")
        check_feature_selection(strategy, has_class_token(model))
        height, width, *alone = size
        vision = model.config.vision_config
        return llava_onevision_layout(
            positive_integer("height", height),
            positive_integer("width", width),
            alone != [False],
            pruning,
            vision.image_size,
            vision.patch_size,
            checked_pinpoints(model.config.image_grid_pinpoints),
            feature_argument(model.config, arguments, "vision_aspect_ratio"),
        )

    def video_layout(self, model: Any, frames: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        """The layout of a video of so many frames, in a model."""
        vision = model.config.vision_config
        return llava_onevision_video_layout(
            frames, pruning, cells_per_side(vision.image_size, vision.patch_size), vision.image_size, vision.patch_size
        )

    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        check_tiles(arguments["pixel_values"], [layout.num_tiles for layout in layouts])

    def processor_layout(
        self,
        processor: Any,
        height: int,
        width: int,
        pruning: VisualTokenPruningConfig,
        tile_size: int | None = None,
        alone: bool = True,
    ) -> TokenLayout:
        """As every family's.

        Args:
            processor, height, width, pruning: as every family's.
            tile_size: of a call which has its own, in pixels.
            alone: whether the image is the only one of its prompt.
        """
        tile_size, patch_size = processor.tile_and_patch_size(tile_size)
        pinpoints = checked_pinpoints(processor.image_processor.image_grid_pinpoints)
        height, width = positive_integer("height", height), positive_integer("width", width)
        return llava_onevision_layout(
            height, width, alone, pruning, tile_size, patch_size, pinpoints, processor.vision_aspect_ratio
        )

    def layouts_of_inputs(
        self, processor: Any, inputs: Mapping[str, Any], prunings: Sequence[VisualTokenPruningConfig]
    ) -> list[TokenLayout]:
        """Of every image, and then of every video."""
        images = len(inputs.get("pixel_values", ()))
        layouts = [processor.layout_in_inputs(inputs, image, prunings[image]) for image in range(images)]
        videos = inputs.get("pixel_values_videos", ())
        return layouts + [
            processor.video_token_layout(len(frames), pruning=pruning)
            for frames, pruning in zip(videos, prunings[images:], strict=True)
        ]

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        sides = range(1, 4)
        return {
            "image_grid_pinpoints": [[rows * tile_size, columns * tile_size] for rows in sides for columns in sides],
            "vision_aspect_ratio": "anyres_max_4",
        }

    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": side, "width": side},
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }


def _alone_in_prompt(batch_num_images: Any, num_images: int) -> list[bool]:
    """Of every image whether its prompt has no other; all, where nothing is said, as in stock.

    Args:
        batch_num_images: how many images each prompt has; prompts without any may be left out.
        num_images: of all prompts.
    """
    if batch_num_images is None:
        return [True] * num_images
    numbers = batch_num_images.tolist() if hasattr(batch_num_images, "tolist") else list(batch_num_images)
    alone = [number == 1 for number in numbers for _ in range(number)]
    if len(alone) != num_images:
        raise ValueError(
            f"`batch_num_images` is {shown(numbers)}, {len(alone)} images in all, and there are {num_images}; it must name as "
            "many, prompt by prompt. Pass it as the processor returned it."
        )
    return alone


class HIVTPLlavaOnevisionConfig(PrunedConfigMixin, LlavaOnevisionConfig):
    r"""
    Configuration of [`HIVTPLlavaOnevisionForConditionalGeneration`]: LLaVA-OneVision's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.LlavaOnevisionConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("llava_onevision") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava_onevision"
    stock_model_type: ClassVar[str] = LlavaOnevisionConfig.model_type
    family: ClassVar[Family] = LlavaOnevisionFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPLlavaOnevisionProcessor(OptionalVideoPartMixin, LlavaOnevisionProcessor):
    r"""
    LLaVA-OneVision's processor, except that images and videos get as many placeholders as the model keeps of them.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextProcessor`].
        image_processor, tokenizer, video_processor, num_image_tokens, vision_feature_select_strategy, chat_template,
        image_token, video_token, vision_aspect_ratio:
            As for [`~transformers.LlavaOnevisionProcessor`]. Without torchvision there is no video processor; what was stored
            of it is kept, and videos are taken as frames, PIL images or arrays, which the image processor's steps prepare.

    A call takes `retention_ratio` or `token_budget` as that of [`HIVTPLlavaNextProcessor`]; a list has one value for each image
    and then one for each video, which must be equal for all videos.

    Raises:
        ValueError: for settings out of range, and at a call for what is no image or video.
    """

    family: ClassVar[Any] = HIVTPLlavaOnevisionConfig.family
    video_processor_type = "LlavaOnevisionVideoProcessor"

    # Spelled out, as transformers takes from this signature which stored settings it may hand over.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        pruning_config=None,
        **kwargs,
    ):
        check_no_setting_among(kwargs)
        self.pruning_config = pruning_config
        part = self._video_part(video_processor)
        super().__init__(
            image_processor,
            tokenizer,
            part,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )
        if not is_torchvision_available():
            self.video_processor = FramesProcessor(self.image_processor, self._stored_video_processor)

    @property
    def model_input_names(self):
        """The names of what a call returns for a model."""
        return list(dict.fromkeys((*super().model_input_names, *FramesProcessor.model_input_names)))

    def cells_per_side(self) -> int:
        """Cells per side of a tile.

        Raises:
            ValueError: where `num_image_tokens` are no square of cells.
        """
        number = positive_integer("num_image_tokens", self.num_image_tokens) - (
            self.vision_feature_select_strategy == "default"
        )
        grid = math.isqrt(number)
        if grid < 1 or grid * grid != number:
            raise ValueError(
                f"`num_image_tokens` is {self.num_image_tokens} and `vision_feature_select_strategy` "
                f"{self.vision_feature_select_strategy!r}; that leaves {number} tokens a tile, which are no square of cells. "
                "Both must be those of the vision tower: 729 and 'full' for SigLIP of 384 pixels."
            )
        return grid

    def tile_and_patch_size(self, tile_size: int | None = None) -> tuple[int, int]:
        """Sides in pixels of the tiles that the image processor makes, or of given ones, and of the largest patches that fit.

        A processor does not know the tower's patches; of SigLIP's 384 pixels in 27 cells these are 14, as they are there.
        """
        if tile_size is None:
            crop, size = self.image_processor.crop_size, self.image_processor.size
            tile_size = (side_of(crop, "height") if crop else None) or side_of(size, "height") or side_of(size, "shortest_edge")
        grid = self.cells_per_side()
        return tile_size, max(1, tile_size // grid)

    def layout_in_inputs(self, inputs: Mapping[str, Any], image: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        """The layout of an image among the inputs of a call, by its index.

        Args:
            inputs: with `pixel_values`, `image_sizes` and `batch_num_images`.
            image: its index.
            pruning: its settings.
        """
        height, width = (int(side) for side in inputs["image_sizes"][image])
        alone = _alone_in_prompt(inputs["batch_num_images"], len(inputs["image_sizes"]))[image]
        tile_size = inputs["pixel_values"][0][0].shape[-1]
        return self.family.processor_layout(self, height, width, pruning, tile_size, alone)

    def video_token_layout(
        self,
        frames: int,
        retention_ratio: float | None = None,
        token_budget: int | None = None,
        image_size: tuple[int, int] | None = None,
        pruning: VisualTokenPruningConfig | None = None,
    ) -> TokenLayout:
        """The layout of a video under this processor's settings, or under the budget of one call.

        Args:
            frames: how many.
            retention_ratio, token_budget: as for a call, at most one of them.
            image_size: (height, width) of the frames in pixels, for where cells lie in them.
            pruning: settings in place of the processor's own.
        """
        settings = (self.pruning_config if pruning is None else pruning).for_call(retention_ratio, token_budget)
        grid = self.cells_per_side()
        return llava_onevision_video_layout(frames, settings, grid, *self.tile_and_patch_size(), image_size)

    def prompt_token_layouts(self, sizes: Sequence[tuple[int, int]]) -> list[TokenLayout]:
        """As every family's; several images in a prompt get no crops."""
        alone = len(sizes) == 1
        return [self.family.processor_layout(self, *size, self.pruning_config, alone=alone) for size in sizes]

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of one image; stock asks for each in turn."""
        return self.image_token * self.layout_in_inputs(image_inputs, image_idx, self._next_pruning()).num_retained

    def replace_video_token(self, video_inputs, video_idx, **kwargs):
        """The placeholders of one video; stock asks for each in turn, after the images."""
        layout = self.video_token_layout(len(video_inputs["pixel_values_videos"][video_idx]), pruning=self._next_pruning())
        if not layout.keeps_everything:
            check_video_pruning(layout.pruning)
        return self.video_token * layout.num_retained

    def _num_images(self, inputs: Any) -> int:
        return len(inputs.get("pixel_values", ())) + len(inputs.get("pixel_values_videos", ()))

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        budget = {name: kwargs[name] for name in ("retention_ratio", "token_budget") if name in kwargs}
        counted = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if video_sizes is not None:
            layouts = [self.video_token_layout(frames, **budget) for frames, _, _ in video_sizes]
            counted.num_video_tokens = [layout.num_retained for layout in layouts]
        return counted

    def _stock_num_multimodal_tokens(self, image_sizes: Any) -> MultiModalData:
        # Stock reads the tile's size from other settings than its image processor.
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.family.processor_layout(self, height, width, self._next_pruning()) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_retained for layout in layouts], num_image_patches=[1] * len(layouts)
        )


def check_video_pruning(pruning: VisualTokenPruningConfig) -> None:
    """Refuses settings under which videos cannot be pruned: a ValueError."""
    if not pruning.exact_count or pruning.marks_columns:
        own = pruning.drops_in_stages and not pruning.stages
        raise ValueError(
            f"`exact_count` is {pruning.exact_count}, `token_weights` {pruning.token_weights!r}, `positions` "
            f"{pruning.positions!r} and `stages` {pruning.stages!r}; with videos they must be True, 'none', 'packed' and empty"
            + (f", and the method another than {pruning.method!r}, which has stages of its own" if own else "")
            + ". Images take all of them. Change the pruning_config of model and processor."
        )


class HIVTPLlavaOnevisionModel(PrunedModelMixin, LlavaOnevisionModel):
    r"""
    The LLaVA-OneVision model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaOnevisionConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, a feature selection that is
            not one feature per cell, a method that needs a class token where there is none.

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaOnevisionConfig
    config_class = HIVTPLlavaOnevisionConfig
    family: ClassVar[Any] = HIVTPLlavaOnevisionConfig.family

    def __init__(self, config: HIVTPLlavaOnevisionConfig):
        super().__init__(config)
        self._start_pruning()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: Tensor | None = None,
        retention_ratio: Tensor | float | None = None,
        **kwargs: Any,
    ) -> tuple | PrunedImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every image, after the projector.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, tiles, channels, height, width)`):
                As the processor returns them; images with fewer tiles are padded.
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`):
                Height and width of the original images in pixels.
            vision_feature_layer (`int` or `list[int]`, *optional*), vision_feature_select_strategy (`str`, *optional*),
            vision_aspect_ratio (`str`, *optional*):
                As for the stock model; the configuration's by default.
            batch_num_images (`torch.LongTensor` of shape `(num_prompts,)`, *optional*):
                How many images each prompt has: those of a prompt with several get no crops. One each unless given.
            retention_ratio (`torch.LongTensor` of shape `(num_images,)` or `float`, *optional*):
                Prunes this call at these ratios, whatever the configuration says: as the processor returns it (the bits
                of float64 values), or a number for all images.

        Returns:
            [`PrunedImageFeaturesOutput`]: stock's output with pruned `pooler_output`, and `kept_indices`.

        Raises:
            ValueError: for inputs that do not fit each other or the pruning settings.
        """
        arguments = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "vision_aspect_ratio": vision_aspect_ratio,
            "batch_num_images": batch_num_images,
        }
        return self._prune_image_features(super().get_image_features, arguments, retention_ratio, **kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        retention_ratio: Tensor | float | None = None,
        **kwargs: Any,
    ) -> tuple | PrunedImageFeaturesOutput:
        r"""
        The visual tokens that are kept of every video, after the projector and stock's pooling.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, frames, channels, height, width)`):
                As the processor returns them.
            vision_feature_layer (`int` or `list[int]`, *optional*), vision_feature_select_strategy (`str`, *optional*):
                As for the stock model; the configuration's by default.
            retention_ratio (`torch.LongTensor` of shape `(num_videos,)` or `float`, *optional*):
                As for images; one for all videos, as these become one tensor.

        Returns:
            [`PrunedImageFeaturesOutput`]: stock's output with `pooler_output` of shape (num_videos, num_retained, hidden), and
            `kept_indices`, a tensor for each video.

        Raises:
            ValueError: for inputs that do not fit the tower or the pruning settings.
        """
        layouts = self._layouts_of_videos(pixel_values_videos, vision_feature_select_strategy, retention_ratio)
        arguments = {
            "pixel_values_videos": pixel_values_videos,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        output = self._prune_image_features(super().get_video_features, arguments, None, token_layouts=layouts, **kwargs)
        if not isinstance(output.pooler_output, Tensor):
            output.pooler_output = torch.stack(list(output.pooler_output))
        return output

    # Python over counts, which a compiler would trace anew for each number of frames.
    @torch.compiler.disable
    def _layouts_of_videos(self, pixels: Tensor, strategy: str | None, retention_ratio: Any) -> list[TokenLayout]:
        side = self.config.vision_config.image_size
        if not isinstance(pixels, Tensor) or pixels.ndim != 5 or pixels.shape[-2:] != (side, side):
            given = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"`pixel_values_videos` is {given}; it must be a tensor (videos, frames, channels, {side}, {side}), as the "
                "processor returns it."
            )
        check_feature_selection(strategy or self.config.vision_feature_select_strategy, has_class_token(self))
        pruning, ratios = self.config.pruning_config, ratios_of_images(retention_ratio, len(pixels))
        if ratios and len(set(ratios)) > 1:
            raise ValueError(
                f"`retention_ratio` holds {ratios} for videos of one tensor; they must have the same. Make a call for each."
            )
        pruning = pruning.for_call(ratios[0]) if ratios else pruning
        layout = self.family.video_layout(self, pixels.shape[1], pruning)
        if not layout.keeps_everything:
            check_video_pruning(pruning)
        return [layout] * len(pixels)

    def check_prompt(self, arguments: Mapping[str, Any]) -> list[TokenLayout] | None:
        """As every family's; and the same of videos that come as pixels."""
        of_images, of_videos = _ratios_apart(arguments)
        layouts = super().check_prompt({**arguments, "retention_ratio": of_images})
        pixels, ids = arguments.get("pixel_values_videos"), arguments.get("input_ids")
        if pixels is not None and ids is not None:
            strategy = arguments.get("vision_feature_select_strategy")
            kept = sum(layout.num_retained for layout in self._layouts_of_videos(pixels, strategy, of_videos))
            found = int((ids == self.config.video_token_id).sum())
            if found != kept:
                raise ValueError(
                    f"the prompt has {found} video placeholders, but the model keeps {kept} tokens of {len(pixels)} videos. "
                    f"The model prunes by {self.config.pruning_config!r}. Make the inputs with a processor of the same "
                    "settings (`processor.pruning_config = model.config.pruning_config`), and pass all that it returned."
                )
        return layouts

    def encode_ahead(
        self, arguments: dict[str, Any], layouts: list[TokenLayout] | None = None
    ) -> PrunedImageFeaturesOutput | None:
        """As every family's; and videos, as stock takes nothing encoded beside what is not."""
        layouts = self.check_prompt(arguments) if layouts is None else layouts
        arguments["retention_ratio"], of_videos = _ratios_apart(arguments)
        videos = None
        if arguments.get("pixel_values_videos") is not None:
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            videos = self.get_video_features(
                arguments.pop("pixel_values_videos"),
                **{name: arguments.get(name) for name in names},
                retention_ratio=of_videos,
                return_dict=True,
                features_only=True,
            )
            arguments.pop("image_sizes_videos", None)
        encoded = super().encode_ahead(arguments, layouts)
        if videos is not None:
            arguments["mm_encoder_outputs"] = {**(arguments.get("mm_encoder_outputs") or {}), "video": videos}
        return encoded

    @with_stock_signature(LlavaOnevisionModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _ratios_apart(arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """The ratios of a call, those of its images and those of its videos, which the processor writes one behind the other."""
    given = arguments.get("retention_ratio")
    if arguments.get("pixel_values_videos") is None or given is None:
        return given, None
    if isinstance(given, (bool, int, float)) or (hasattr(given, "ndim") and given.ndim == 0):
        return given, given
    images = len(arguments["pixel_values"]) if has_pixels(arguments) else 0
    return given[:images] if images else None, given[images:]


class HIVTPLlavaOnevisionForConditionalGeneration(PrunedGenerationMixin, LlavaOnevisionForConditionalGeneration):
    r"""
    LLaVA-OneVision with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock LLaVA-OneVision checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPLlavaOnevisionConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPLlavaOnevisionModel`].

    Source: the methods that `VisualTokenPruningConfig` names.
    """

    config: HIVTPLlavaOnevisionConfig
    config_class = HIVTPLlavaOnevisionConfig

    def __init__(self, config: HIVTPLlavaOnevisionConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self._build_on(HIVTPLlavaOnevisionModel(config))

    @functools.wraps(HIVTPLlavaOnevisionModel.get_image_features)
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_image_features(*args, **kwargs)

    @functools.wraps(HIVTPLlavaOnevisionModel.get_video_features)
    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_video_features(*args, **kwargs)

    @with_stock_signature(LlavaOnevisionForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
