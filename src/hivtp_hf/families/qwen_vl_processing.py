"""What the processors of Qwen-VL families share: counts from grids of patches, and a video part that may be missing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.processing_utils import MultiModalData
from transformers.utils import is_torchvision_available

from ..pruning.compat import side_of
from ..pruning.processing import PrunedProcessorMixin
from ..pruning.settings import check_no_setting_among
from .qwen_vl import qwen_vl_layout
from .video_processing import NO_VIDEOS, OptionalVideoPartMixin


class QwenVLProcessorMixin(OptionalVideoPartMixin):
    """A processor of these families. Comes before the stock class."""

    # Spelled out, as transformers takes from this signature which stored settings it may hand over.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        pruning_config=None,
        **kwargs,
    ):
        check_no_setting_among(kwargs)
        self.pruning_config = pruning_config
        part = self._video_part(video_processor)
        super().__init__(image_processor, tokenizer, part, chat_template=chat_template, **kwargs)

    @property
    def model_input_names(self):
        """The names of what a call returns for a model, of videos where there is a video processor."""
        if is_torchvision_available():
            return super().model_input_names
        names = (*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "mm_token_type_ids")
        return list(dict.fromkeys(names))

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None and not is_torchvision_available():
            raise ValueError(f"`videos` was given. {NO_VIDEOS}")
        return super().__call__(images, text, videos, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of one image; stock asks for each in turn."""
        (layout,) = self.family.layouts_of_inputs(
            self, {"image_grid_thw": image_inputs["image_grid_thw"][image_idx : image_idx + 1]}, [self._next_pruning()]
        )
        return self.image_token * layout.num_retained

    def grid_of_image(self, height: int, width: int) -> tuple[int, int, int]:
        """The patches of an image of so many pixels, in time, height and width.

        Raises:
            ValueError: for an image that is more than 200 times as long as it is wide, which stock refuses.
        """
        patch = self.image_processor.patch_size
        limits = [side_of(self.image_processor.size, name) for name in ("shortest_edge", "longest_edge")]
        factor = patch * self.image_processor.merge_size
        resized = smart_resize(height, width, factor, min_pixels=limits[0], max_pixels=limits[1])
        return (1, *(side // patch for side in resized))

    def _num_images(self, inputs: Mapping[str, Any]) -> int:
        # `pixel_values` holds the patches of all images.
        return 0 if inputs.get("image_grid_thw") is None else len(inputs["image_grid_thw"])

    def _changed_image_processing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = super()._changed_image_processing(given)
        edges = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
        edges = {name: pixels for name, pixels in edges.items() if pixels is not None}
        if edges or "size" in changed:
            stored = {name: side_of(self.image_processor.size, name) for name in ("shortest_edge", "longest_edge")}
            changed["size"] = {**stored, **changed.get("size", {}), **edges}
        return changed

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        counted = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if video_sizes is None:
            return counted
        if getattr(self, "video_processor", None) is None:
            raise ValueError(f"`video_sizes` was given. {NO_VIDEOS}")
        of_videos = super(PrunedProcessorMixin, self)._get_num_multimodal_tokens(video_sizes=video_sizes)
        return dataclasses.replace(counted, num_video_tokens=of_videos.num_video_tokens)

    def _stock_num_multimodal_tokens(self, image_sizes: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        grids = [self.grid_of_image(height, width) for height, width in image_sizes]
        merge_size = self.image_processor.merge_size
        tokens = [qwen_vl_layout(grid, self._next_pruning(), merge_size).num_retained for grid in grids]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[height * width for _, height, width in grids])
