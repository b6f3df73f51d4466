"""`CallBudget`: what one call of a processor says of how much to keep, image by image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .checked_values import shown
from .retention_bits import SMALLEST_RATIO, bits_of_ratio
from .settings import VisualTokenPruningConfig, check_one_budget, setting_meant_by

# The settings that a call can give, one of them.
BUDGETS = ("retention_ratio", "token_budget")
# Where transformers keeps arguments for a processor's parts: no place for ours, which belong to all of them.
_NESTED = ("images_kwargs", "text_kwargs", "common_kwargs", "videos_kwargs", "audio_kwargs")


class CallBudget:
    """The pruning settings of every image of one processor call.

    Args:
        settings: the processor's own.
        retention_ratio, token_budget: of the call, at most one of them: a number for all images, a sequence with one for
            each, or None.

    Raises:
        ValueError: for both, for values out of range, and for nested sequences.
    """

    def __init__(self, settings: VisualTokenPruningConfig, retention_ratio: Any = None, token_budget: Any = None):
        check_one_budget(retention_ratio, token_budget)
        self._name = "retention_ratio" if token_budget is None else "token_budget"
        given = retention_ratio if token_budget is None else token_budget
        if hasattr(given, "tolist"):  # arrays, tensors and their scalars
            given = given.tolist()
        self.is_given = given is not None
        self._one_per_image = isinstance(given, Sequence) and not isinstance(given, str)
        values = given if self._one_per_image else [given]
        if self._one_per_image and any(value is None for value in values):
            raise ValueError(f"`{self._name}` is {shown(given)}; give a value for each image, or a single one for all.")
        self._prunings = [settings.for_call(**{self._name: value}) for value in values]
        self._settings, self._asked = settings, 0

    @classmethod
    def taken_from(
        cls, settings: VisualTokenPruningConfig, keywords: dict[str, Any], default: Mapping[str, Any]
    ) -> "CallBudget":
        """The budget among the keywords of a call, which it leaves, since transformers does not know it; else the default one.

        Raises:
            ValueError: also for a budget that is nested among the arguments for a part, and for whole settings.
        """
        for nested in _NESTED:
            for name in set(BUDGETS) & set(keywords.get(nested) or ()):
                raise ValueError(
                    f"`{name}` was given inside `{nested}`; give it at the top level: processor(..., {name}=...), or "
                    f"processor_kwargs={{{name!r}: ...}}."
                )
        for name in keywords:
            meant = setting_meant_by(name)
            if meant is not None and meant != name:
                raise ValueError(f"`{name}` is no argument. Did you mean `{meant}`?")
            if meant is not None and name not in (*BUDGETS, "pruning_config"):
                raise ValueError(
                    f"`{name}` is a setting of model and processor, and cannot be given to a call. Assign "
                    "`processor.pruning_config` and `model.config.pruning_config`."
                )
        if "pruning_config" in keywords:
            raise ValueError(
                "`pruning_config` was given to a call, which takes `retention_ratio` or `token_budget`. To change the "
                "settings, assign `processor.pruning_config` and `model.config.pruning_config`; for a pipeline that "
                "loads the model itself, pass `model_kwargs={'pruning_config': ...}` when it is built."
            )
        return cls(settings, **with_default(default, **{name: keywords.pop(name) for name in BUDGETS if name in keywords}))

    def of_image(self, index: int) -> VisualTokenPruningConfig:
        """The settings of the image `index`, counted through the whole call."""
        if not self._one_per_image:
            return self._prunings[0]
        # Beyond the last value the settings of the call stand in: `check_number` then says how many images there were.
        return self._prunings[index] if index < len(self._prunings) else self._settings

    def of_next_image(self) -> VisualTokenPruningConfig:
        """The settings of the next image, where images are asked for in their order."""
        self._asked += 1
        return self.of_image(self._asked - 1)

    def check_number(self, num_images: int) -> None:
        """A ValueError if there is one value per image, and another number of images."""
        if self._one_per_image and num_images != len(self._prunings):
            images = "1 image" if num_images == 1 else f"{num_images} images"
            raise ValueError(
                f"`{self._name}` has {len(self._prunings)} values, and the call has {images}. Give one value for "
                "each image, in their order, or a single one for all. In a pipeline every chat is a call of its own."
            )


def with_default(default: Mapping[str, Any], **given: Any) -> Mapping[str, Any]:
    """The budget that is given, by name, or the default one where none is."""
    return given if any(value is not None for value in given.values()) else default


def as_model_input(ratios: Sequence[float], like: Any) -> Any:
    """The ratios of a call's images as a model input: int64 (num_images,), the bits of their float64 values.

    Args:
        ratios: one per image.
        like: another input of the same call, whose kind (PyTorch, NumPy, list) the result takes.
    """
    # What a model reads as bits begins at the smallest ratio, which keeps as little as all below it: nothing.
    bits = [bits_of_ratio(max(ratio, SMALLEST_RATIO)) for ratio in ratios]
    if isinstance(like, torch.Tensor):
        return torch.tensor(bits, dtype=torch.int64)
    return np.array(bits, dtype=np.int64) if isinstance(like, np.ndarray) else bits


def refuse_budget_among(keywords: Mapping[str, Any]) -> None:
    """A ValueError for what a model's call would swallow: a token budget, and a misspelt ratio."""
    for name in keywords:
        if name == "token_budget" or (name.startswith("retention") and name != "retention_ratio"):
            raise ValueError(
                f"`{name}` is no argument of a model. Give `retention_ratio` or `token_budget` to the processor, and its "
                "`retention_ratio` to the model."
            )
