"""What a model family must provide.

A family is one file: a subclass of `Family`, and thin subclasses of the stock configuration, processor and models that name it.
Add the `Family` to `FAMILIES` of families/__init__.py, and every method, command, card and test knows it. Which methods run on
it is derived from `provides`, and written down nowhere.

How the families here answer, LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and Qwen-VL:

* `image_sizes`. LLaVA-1.5: the tower's own size, once for each tile of `pixel_values`. LLaVA-NeXT: the rows of `image_sizes`.
  OneVision: these, each with whether it is alone in its prompt (`batch_num_images`), as several images get no crops. Qwen: the
  rows of `image_grid_thw`; `pixel_values` is a list of patches there, whose length says nothing of images.
* `layout`. LLaVA-1.5: one square tile. LLaVA-NeXT: a base tile and stitched crops, un-padded, a newline a row. OneVision: the
  same, and above nine crops a rectangle of resampled cells; beside other images one tile and a newline. Qwen: one rectangle of
  merged cells, without newlines.
* `processor_layout`. LLaVA: from `crop_size` and the original image. OneVision: the same. Qwen: from `smart_resize` of it.
* `encoder`, `num_layers`, `feature_layer`. LLaVA and OneVision: `vision_tower`, and the hidden state that
  `vision_feature_layer` names. Qwen: `visual`, whose last block's output is merged 2 x 2.
* `cell_scores`. LLaVA: one call of the layer, the class token's column goes. OneVision: scores are packed as stock packs
  features, and resampled with them. Qwen: a call for every segment, the mean of every 2 x 2 patches, and then brought back
  from the order of windows.
* `provides`, `comparable_layers`. LLaVA: received and class attention, features, and what the encoder says before the
  projector; all layers. OneVision: no class attention.
  Qwen: received attention of the full blocks alone, as inside a window it sums to 1, whatever the window shows.
* `streams`. LLaVA, OneVision and Qwen2.5-VL: features. Qwen3-VL: DeepStack features as well.
* Positions follow the sequence in all LLaVA families. Qwen's are those of the unpruned prompt, of which kept columns are
  taken: its models see to that by themselves.

Where a family to come needs what nobody here needs yet, the contract grows by a method with a default that is right for the
families here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import register_methods
from ..pruning.evidence import EncoderFacts, Evidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import VisualTokenPruningConfig

# Whoever loads a family, from the package or from its one file, has the methods.
register_methods()


class FamilyClasses(NamedTuple):
    """One family's classes: configuration, base model, model with a language modelling head, processor."""

    config: Any
    base_model: Any
    model: Any
    processor: Any


class Family(ABC):
    """One model family: what about it differs from others. Instances hold no state.

    `arguments` are always those of a call of `get_image_features` or `forward`, by name; missing ones mean the configuration's.

    Attributes:
        name: of its stock model type, and the end of its own.
        title: what people call it.
        provides: the kinds of evidence that its published towers have.
        image_inputs: the arguments that say what the images of a call are, pixels first.
        feature_arguments: the arguments that say how features are made of them.
        streams: the fields of what stock's `get_image_features` returns that have a row for every token, features first. They
            are cut together.
        keeps_at_least_one: whether a token is kept of every image at any ratio.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    provides: ClassVar[frozenset[Evidence]]
    image_inputs: ClassVar[tuple[str, ...]]
    feature_arguments: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[tuple[str, ...]] = ("pooler_output",)
    keeps_at_least_one: ClassVar[bool] = False

    # What it is made of.

    @property
    @abstractmethod
    def classes(self) -> FamilyClasses:
        """Ours."""

    @property
    @abstractmethod
    def stock_classes(self) -> FamilyClasses:
        """Those of transformers that ours subclass, and whose key renamings ours take."""

    # The vision encoder.

    @abstractmethod
    def encoder(self, model: Any) -> nn.Module:
        """The vision encoder of a base model, stock's or ours."""

    @abstractmethod
    def num_layers(self, config: Any) -> int:
        """The depth of the encoder."""

    @abstractmethod
    def feature_layer(self, config: Any, arguments: Mapping[str, Any]) -> int:
        """The encoder layer, 0-based, whose output is the visual feature; -1 where that is what enters the first layer."""

    def comparable_layers(self, config: Any) -> Collection[int] | None:
        """The encoder layers whose attention compares cells of a whole image; None, the default, for all."""
        return None

    def default_layers(self, config: Any) -> Mapping[str, Any]:
        """What settings that name encoder layers mean in this family where nothing is given, by their names.

        By default nothing: methods then go by the layers that their papers name.
        """
        return {}

    def encoder_facts(self, config: Any, arguments: Mapping[str, Any]) -> EncoderFacts:
        """What methods must know of the encoder to say which layers they read."""
        layer = self.feature_layer(config, arguments)
        return EncoderFacts(self.num_layers(config), layer, self.default_layers(config), self.comparable_layers(config))

    def provided_by(self, model: Any) -> frozenset[Evidence]:
        """The kinds of evidence that this very model has; towers of one family may differ."""
        return self.provides

    def check_config(self, config: Any) -> None:  # noqa: B027  (most families take every configuration)
        """Refuses, before a model is built, what the family cannot prune: a ValueError."""

    def check_pruning(self, pruning: VisualTokenPruningConfig) -> None:  # noqa: B027  (most families take all settings)
        """Refuses, where they are set, settings that the family cannot follow, whatever the model: a ValueError."""

    def ending_early(
        self, stock: Callable[..., Any], config: Any, arguments: Mapping[str, Any], layers: Sequence[int]
    ) -> Callable[..., Any]:
        """`stock`, a call of stock's `get_image_features`, without layers that nothing is read from; `stock` by default.

        Args:
            stock: takes further keywords.
            config: of the model.
            arguments: of the call.
            layers: whose attention is read.
        """
        return stock

    # How images lie as tokens. Processor and model both come here, and nothing else counts.

    @abstractmethod
    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[Any]:
        """Of every image of a call what its layout follows from, such as (height, width) in pixels.

        Raises:
            ValueError: for inputs that are no images of this family.
        """

    @abstractmethod
    def layout(self, model: Any, size: Any, pruning: VisualTokenPruningConfig, arguments: Mapping[str, Any]) -> TokenLayout:
        """The layout of an image of a size, as `image_sizes` gives it or (height, width) in pixels, in a model."""

    @abstractmethod
    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        """A ValueError where the pixels of a call are not those of images that lie so."""

    @abstractmethod
    def cell_scores(self, model: Any, scores: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
        """Attention or keys of the tokens of an encoder as those of cells: float32 (cells of all images, ...), view by view.

        Args:
            model: a base model, stock's or ours.
            scores: of every call of the layer in one pass float32 (sequences, tokens), or of keys (sequences, tokens, size).
                An encoder that packs images into one sequence calls it for each segment.
            layouts: of every image.

        Raises:
            ValueError: where scores are not of images that lie so.
        """

    def grey_levels(self, model: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> Tensor:
        """The grey levels of the pixels of every cell, for families that provide `Evidence.PIXELS`.

        From pixels as they were before the image processor's mean and standard deviation: the mean of red, green and blue of 8
        bits each, rounded. A model is not told these two; they are the published ones of its tower's type.

        Returns:
            uint8 (cells of all images, pixels of a cell), in the order of views.

        Raises:
            ValueError: unless the family defines it.
        """
        raise ValueError(f"the family {self.name!r} provides pixels, but does not say them; define its `grey_levels`.")

    def encoded_cells(
        self, model: Any, output: Any, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]
    ) -> Sequence[Tensor] | None:
        """What the encoder says of the cells of every view, before the projector: (cells, hidden) each.

        None, the default, for families that do not provide `Evidence.ENCODED`.

        Args:
            model: a base model, stock's or ours.
            output: what stock's `get_image_features` returned.
            arguments: of that call.
            layouts: of every image.
        """
        return None

    def project(self, model: Any, encoded: Tensor) -> Tensor:
        """Visual features (n, hidden) of what the encoder says, (n, width), for families that provide `Evidence.ENCODED`.

        Raises:
            ValueError: unless the family defines it.
        """
        raise ValueError(f"the family {self.name!r} provides what its encoder says, but no projector; define its `project`.")

    @abstractmethod
    def processor_layout(self, processor: Any, height: int, width: int, pruning: VisualTokenPruningConfig) -> TokenLayout:
        """The layout of an image of so many pixels, as a processor of ours sees it."""

    @abstractmethod
    def layouts_of_inputs(
        self, processor: Any, inputs: Mapping[str, Any], prunings: Sequence[VisualTokenPruningConfig]
    ) -> list[TokenLayout]:
        """The layout of every image of a finished call of a processor, from its inputs and the settings of each image."""

    # Tests and demo.

    @abstractmethod
    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        """What a small configuration needs beside its towers' ones, for tiles of so many pixels."""

    @abstractmethod
    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        """The preprocessor_config.json of a small checkpoint with this configuration."""


def as_grey_levels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey levels of normalised pixels.

    Args:
        pixels: (images, 3, ...), any float dtype, red, green and blue.
        mean, std: of red, green and blue, of pixels from 0 to 1.

    Returns:
        uint8 (images, ...), the mean of the three levels of 8 bits, rounded.
    """
    across = [-1, *[1] * (pixels.ndim - 2)]
    scale, shift = (torch.tensor(values, dtype=torch.float32, device=pixels.device).view(across) for values in (std, mean))
    parts = [((part.float() * scale + shift) * 255).mean(1).round().clamp(0, 255).to(torch.uint8) for part in pixels.split(512)]
    return torch.cat(parts)
