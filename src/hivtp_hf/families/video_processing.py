"""The part of a processor that makes videos, and what stands in for it without torchvision, which transformers' own needs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format
from transformers.utils import is_torchvision_available
from transformers.video_utils import make_batched_videos

from ..pruning.base_checkpoint import ACCESS
from ..pruning.compat import found_file, side_of
from ..pruning.processing import PrunedProcessorMixin

# Where older releases store the settings of a video processor; before that file was, they took those of the image processor.
_VIDEO_FILE, _IMAGE_FILE = "video_preprocessor_config.json", "preprocessor_config.json"
NO_VIDEOS = (
    "Videos need a video processor, and that of transformers needs torchvision, which is not installed: "
    "`pip install torchvision`, in the version that fits torch. Images go without."
)


class OptionalVideoPartMixin(PrunedProcessorMixin):
    """A processor with a video processor among its parts. Comes before the stock class.

    Without torchvision there is no such part. What is stored of one is then kept aside, and written back on saving.
    """

    # What stock reads stored settings of a video processor with, where they name no class.
    video_processor_type: ClassVar[str]
    _stored_video_processor: Mapping[str, Any] | None = None

    def _video_part(self, video_processor: Any) -> Any:
        """The part to hand to stock; called by constructors, before stock's own. Stored settings are kept aside."""
        self._stored_video_processor = video_processor if isinstance(video_processor, Mapping) else None
        return None if self._stored_video_processor is not None else video_processor

    @classmethod
    def get_attributes(cls):
        """The names of the parts; the video processor is one where torchvision is there."""
        parts = super().get_attributes()
        return parts if is_torchvision_available() else [part for part in parts if part != "video_processor"]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        where = {key: value for key, value in kwargs.items() if key in (*ACCESS, "revision", "subfolder")}
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not is_torchvision_available() and "video_processor" not in processor_dict:
            files = (found_file(pretrained_model_name_or_path, name, where) for name in (_VIDEO_FILE, _IMAGE_FILE))
            stored = next((file for file in files if file is not None), None)
            if stored is not None:
                with open(stored, encoding="utf-8") as file:
                    settings = json.load(file)
                settings.pop("image_processor_type", None)
                processor_dict["video_processor"] = {"video_processor_type": cls.video_processor_type, **settings}
        return processor_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """As for any of our processors, with what is stored of a video processor."""
        output = super().to_dict()
        if not is_torchvision_available():
            output.pop("video_processor", None)
        if self._stored_video_processor is not None:
            output["video_processor"] = dict(self._stored_video_processor)
        return output


class FramesProcessor:
    """A video processor for frames, by the steps of an image processor: resized, rescaled and normalised, each by itself.

    It stands in for transformers' own where torchvision is missing. It reads no files and samples no frames.

    Args:
        image_processor: whose steps are taken, and whose settings.
        stored: settings of a video processor, which rule over these.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values_videos"]
    _settings: ClassVar[tuple[str, ...]] = (
        *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
        "do_convert_rgb",
    )

    def __init__(self, image_processor: Any, stored: Mapping[str, Any] | None = None):
        self.image_processor = image_processor
        self.stored = dict(stored or {})

    def __call__(self, videos: Any, return_tensors: Any = None, **given: Any) -> BatchFeature:
        """The frames of videos, float32 (videos, frames, channels, height, width), as `pixel_values_videos`.

        Args:
            videos: a video or a list of them: each a list of PIL images or arrays, or an array of four dimensions, frames
                first.
            return_tensors: as for any processor.
            **given: settings of this call.

        Raises:
            ValueError: for files, frames that are no images, videos of unequal numbers of frames, and settings that need
                transformers' own video processor.
        """
        unknown = [name for name, value in given.items() if name not in self._settings and value not in (None, False)]
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` was given with videos, and there is no torchvision: without it, frames are resized and "
                "normalised as they come. Give the frames to be seen, or `pip install torchvision`."
            )
        stored = {name: getattr(self.image_processor, name, None) for name in self._settings}
        settings = {**stored, **{name: self.stored[name] for name in self._settings if self.stored.get(name) is not None}}
        settings |= {name: value for name, value in given.items() if name in self._settings and value is not None}
        made = [np.stack([self._frame(frame, settings) for frame in video]) for video in _frames_of_videos(videos)]
        lengths = sorted({len(video) for video in made})
        if len(lengths) > 1:
            raise ValueError(
                f"the videos of a call have {lengths[0]} to {lengths[-1]} frames; they must have as many each. Give as many "
                "frames of each, or make a call for each video."
            )
        return BatchFeature({"pixel_values_videos": np.stack(made)}, tensor_type=return_tensors)

    def _frame(self, frame: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
        steps, size = self.image_processor, settings["size"]
        if settings["do_resize"]:
            shortest = side_of(size, "shortest_edge")
            height, width = (side_of(size, "height"), side_of(size, "width")) if not shortest else (shortest, shortest)
            frame = steps.resize(image=frame, size=SizeDict(height=height, width=width), resample=settings["resample"])
        if settings["do_rescale"]:
            frame = steps.rescale(image=frame, scale=settings["rescale_factor"])
        if settings["do_normalize"]:
            frame = steps.normalize(image=frame, mean=settings["image_mean"], std=settings["image_std"])
        return np.asarray(frame, dtype=np.float32)


def _frames_of_videos(videos: Any) -> list[list[np.ndarray]]:
    """Of every video its frames, (channels, height, width) each; ValueError for what is none."""

    def as_arrays(given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return [as_arrays(one) for one in given]
        return np.asarray(given.convert("RGB")) if hasattr(given, "convert") else given

    arrays: Sequence[Any] = make_batched_videos(as_arrays(videos))
    if not len(arrays) or any(isinstance(video, str) for video in arrays):
        raise ValueError(
            "`videos` holds no frames; without torchvision videos are not read from files. Give every video as a list of PIL "
            "images or as an array (frames, height, width, channels)."
        )
    found = []
    for video in arrays:
        frames = [np.asarray(frame) for frame in video]
        if not frames or any(frame.ndim != 3 for frame in frames):
            raise ValueError(
                f"a video has frames of shape {frames[0].shape if frames else 'none'}; frames must be images of three "
                "dimensions, and at least one."
            )
        last = ChannelDimension.LAST
        is_last = [infer_channel_dimension_format(frame, num_channels=(1, 3)) == last for frame in frames]
        channels = [frame.transpose(2, 0, 1) if of_last else frame for frame, of_last in zip(frames, is_last, strict=True)]
        found.append([np.broadcast_to(frame, (3, *frame.shape[1:])) for frame in channels])
    return found
