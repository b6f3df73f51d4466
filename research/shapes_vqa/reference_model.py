"""What training asks of a model of either family."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from hivtp_hf import TokenLayout, VisualTokenPruningConfig

UNPRUNED = VisualTokenPruningConfig(method="none")


@dataclass(frozen=True)
class Encoded:
    """What a tower makes of images.

    Attributes:
        features: of each image, (tokens, width), as the language model gets them.
        hidden_states: of all layers, as the tower has them.
    """

    features: Sequence[Tensor]
    hidden_states: Sequence[Tensor]


class Places(NamedTuple):
    """Where an image's tokens stand.

    Attributes:
        of_tokens: time, row and column, int64 (3, tokens).
        rows, columns: of the whole image. Words behind it go on beyond the larger one.
    """

    of_tokens: Tensor
    rows: int
    columns: int


class ReferenceModel(ABC):
    """A small model of stock classes: how it is built, run and started.

    Attributes:
        name: of the checkpoint's folder.
        before, after: what the chat template writes in front of an image and behind it.
        middle_state: the hidden state at which every token is asked what its tile, or its image, holds.
        has_base_tile: whether there is a tile of the whole image, whose cells can tell where in it they lie.
        scales: images are made smaller or larger by a factor between these in a part of training; (1, 1) for models whose
            number of tokens hardly follows the size.
    """

    name: ClassVar[str]
    before: ClassVar[str]
    after: ClassVar[str]
    middle_state: ClassVar[int]
    has_base_tile: ClassVar[bool]
    scales: ClassVar[tuple[float, float]] = (1.0, 1.0)

    @abstractmethod
    def make_config(self) -> Any:
        """The stock configuration."""

    @abstractmethod
    def make_processor(self, config: Any) -> Any:
        """The processor of the model, which does not prune."""

    @abstractmethod
    def make_model(self, config: Any, seed: int) -> Any:
        """The model with random weights; `set_starting_point` then sets what training builds on."""

    @abstractmethod
    def set_starting_point(self, model: Any, inputs: Mapping[str, Tensor], random: np.random.Generator) -> None:
        """Sets what the model starts from, by the pixels of some images."""

    @abstractmethod
    def layout_of(self, processor: Any, height: int, width: int) -> TokenLayout:
        """How the visual tokens of an image lie."""

    @abstractmethod
    def tower_parts(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """The vision tower and what leads to the language model."""

    @abstractmethod
    def encode(self, model: Any, inputs: Mapping[str, Tensor], hidden_states: bool = False) -> Encoded:
        """Runs the tower and what leads to the language model."""

    @abstractmethod
    def places(self, layout: TokenLayout) -> Places | None:
        """Where an image's tokens stand; None where they are counted as words are."""

    @abstractmethod
    def train_faster(self, model: Any) -> None:
        """Chooses how attention is computed in training."""

    @abstractmethod
    def write(self, model: Any, processor: Any, folder: Any) -> None:
        """Writes a stock checkpoint in float16."""

    def inputs_of(self, processor: Any, images: Sequence[Any]) -> dict[str, Tensor]:
        """Images as the model takes them."""
        return dict(processor.image_processor(images, return_tensors="pt"))

    def prompt_of(self, question: str, image: str) -> str:
        """What the chat template makes of an image, by its placeholder, and a question."""
        return f"{self.before}{image}{self.after}{question}{ASKED}"


# What the chat template writes behind a question.
ASKED = " ASSISTANT:"
