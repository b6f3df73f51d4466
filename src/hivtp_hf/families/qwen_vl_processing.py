"""What the processors of Qwen-VL families share: counts from grids of patches, and a video part that may be missing."""

import copy
import dataclasses
import re
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

_EDGES = ("shortest_edge", "longest_edge")
# What belongs to a vision tower's patches, by the part of a processor and its arguments in a call.
_PATCHES = ("patch_size", "merge_size", "temporal_patch_size")
_PARTS = {"image_processor": "images_kwargs", "video_processor": "videos_kwargs"}
# How NumPy and torch say that an image does not divide into patches.
_NO_WHOLE_PATCHES = re.compile("cannot reshape array|is invalid for input of size")


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
        self._check_patches(kwargs)
        try:
            return super().__call__(images, text, videos, **self._with_both_edges(kwargs))
        except (RuntimeError, ValueError) as error:
            if not _NO_WHOLE_PATCHES.search(str(error)):
                raise
            factor = self.image_processor.patch_size * self.image_processor.merge_size
            raise ValueError(
                "an image or a video does not divide into patches, as `do_resize` is False; its height and width must be "
                f"multiples of {factor} pixels. Resize it before, or leave `do_resize` True."
            ) from error

    def _check_patches(self, given: Mapping[str, Any]) -> None:
        """A ValueError for arguments of a call by which patches would be others than those of the vision tower."""
        for part, nested in _PARTS.items():
            for name, value in {**given, **(given.get(nested) or {})}.items():
                own = getattr(getattr(self, part, None), name, value) if name in _PATCHES else value
                if value is not None and value != own:
                    raise ValueError(
                        f"`{name}` is {value} in a call, and {own} in the checkpoint, whose vision tower has patches of that "
                        "kind alone. Leave it out."
                    )

    def _with_both_edges(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, where a `size` that says one edge alone gets the other one from what is stored."""
        completed, of_all = dict(given), given.get("size")
        if _says_one_edge(of_all):
            del completed["size"]
        for part, nested in _PARTS.items():
            own = given.get(nested) or {}
            size: Any = own.get("size", of_all)
            if getattr(self, part, None) is not None and _says_one_edge(size):
                completed[nested] = {**own, "size": _with_stored_edges(getattr(self, part), size)}
        return completed

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of one image; stock asks for each in turn."""
        (layout,) = self.family.layouts_of_inputs(
            self, {"image_grid_thw": image_inputs["image_grid_thw"][image_idx : image_idx + 1]}, [self._next_pruning()]
        )
        return self.image_token * layout.num_retained

    def grid_of_image(self, height: int, width: int) -> tuple[int, int, int]:
        """The patches of an image of so many pixels, in time, height and width.

        Raises:
            ValueError: for an image that is more than 200 times as long as it is wide, which stock refuses; for one that does
                not divide into patches where it is not to be resized; and for a stored `size` that is no budget of pixels.
        """
        patch = self.image_processor.patch_size
        limits = [side_of(self.image_processor.size, name) for name in _EDGES]
        factor = patch * self.image_processor.merge_size
        if not self.image_processor.do_resize:
            if height % factor or width % factor:
                raise ValueError(
                    f"an image has {height} x {width} pixels, and `do_resize` is False; both must be multiples of {factor}. "
                    "Resize it before, or leave `do_resize` True."
                )
            return (1, height // patch, width // patch)
        if None in limits:
            raise ValueError(
                f"`size` of the image processor is {self.image_processor.size!r}; it must have `shortest_edge` and "
                "`longest_edge`, the least and the most pixels of an image."
            )
        resized = smart_resize(height, width, factor, min_pixels=limits[0], max_pixels=limits[1])
        return (1, *(side // patch for side in resized))

    def _num_images(self, inputs: Mapping[str, Any]) -> int:
        # `pixel_values` holds the patches of all images.
        return 0 if inputs.get("image_grid_thw") is None else len(inputs["image_grid_thw"])

    def _changed_image_processing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = {**super()._changed_image_processing(given), **_changed_size(self.image_processor, given)}
        if given.get("do_resize") is not None:
            changed["do_resize"] = given["do_resize"]
        return changed

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        self._check_patches(kwargs)
        counted = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if video_sizes is None:
            return counted
        if getattr(self, "video_processor", None) is None:
            raise ValueError(f"`video_sizes` was given. {NO_VIDEOS}")
        given = {**kwargs, **(kwargs.get("videos_kwargs") or {})}
        if given.get("do_resize") is False:
            raise ValueError(
                "`do_resize` is False, and `video_sizes` were given; transformers counts resized videos alone. Leave it True."
            )
        # As for images, releases before 5.23 keep keyword arguments in defaults of stock's class, where they stay.
        asked = copy.copy(self)
        asked.video_processor = copy.copy(self.video_processor)
        for name, value in _changed_size(self.video_processor, given).items():
            setattr(asked.video_processor, name, value)
        of_videos = super(PrunedProcessorMixin, asked)._get_num_multimodal_tokens(video_sizes=video_sizes)
        return dataclasses.replace(counted, num_video_tokens=of_videos.num_video_tokens)

    def _stock_num_multimodal_tokens(self, image_sizes: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        grids = [self.grid_of_image(height, width) for height, width in image_sizes]
        merge_size = self.image_processor.merge_size
        tokens = [qwen_vl_layout(grid, self._next_pruning(), merge_size).num_retained for grid in grids]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[height * width for _, height, width in grids])


def _says_one_edge(size: Any) -> bool:
    return isinstance(size, Mapping) and len({*_EDGES} & {*size}) == 1


def _with_stored_edges(part: Any, size: Mapping[str, Any]) -> dict[str, Any]:
    """A budget of pixels, with what it does not say from that of a part of a processor."""
    return {**{name: side_of(part.size, name) for name in _EDGES}, **size}


def _changed_size(part: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The `size` of a part of a processor that a call means, by `size`, `min_pixels` or `max_pixels`; nothing for its own."""
    edges = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
    edges = {name: pixels for name, pixels in edges.items() if pixels is not None}
    size = given.get("size") or {}
    return {"size": _with_stored_edges(part, {**size, **edges})} if size or edges else {}
