"""Evidence: what a method may look at when it chooses, by kind, and for the images of one call."""

import enum
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TokenLayout
from .registry import METHODS, pruning_method
from .settings import VisualTokenPruningConfig


class Evidence(enum.Enum):
    """A kind of evidence. Methods say which kinds they read, families which they provide.

    Attributes:
        words: what is read.
        source: what a vision tower must have for that, as it follows "has no".
    """

    RECEIVED_ATTENTION = ("the attention that tokens receive", "attention layers that can be read")
    CLASS_ATTENTION = ("what the class token attends to", "class token")
    FEATURES = ("the visual features", "feature for every cell")

    def __init__(self, words: str, source: str):
        self.words = words
        self.source = source


def evidence_to_read(pruning: VisualTokenPruningConfig, provided: Collection[Evidence]) -> frozenset[Evidence] | None:
    """The kinds that a method reads where these are provided: the best alternative, or None where none is possible.

    Whether a method runs on a family is this answer and nothing else.
    """
    alternatives = pruning_method(pruning.method).reads(pruning)
    return next((kinds for kinds in alternatives if kinds <= set(provided)), None)


def methods_of(provided: Collection[Evidence]) -> list[str]:
    """The methods that run, under their default settings, where these kinds of evidence are provided."""
    return [name for name in METHODS if evidence_to_read(VisualTokenPruningConfig(name), provided) is not None]


class VisualEvidence(NamedTuple):
    """What is known of some images when their tokens are chosen.

    Attributes:
        layouts: how the tokens of each image lie.
        valid: bool (tiles of all images, grid, grid), the cells that the stock model uses.
        features: of every image the packed stock features, (num_stock, hidden).
        scores: of every scored encoder layer the attention of the cells, float32 (tiles of all images, grid, grid).
        feature_layer: the encoder layer, 0-based, whose output is the visual feature.
    """

    layouts: Sequence[TokenLayout]
    valid: Tensor
    features: Sequence[Tensor]
    scores: Mapping[int, Tensor]
    feature_layer: int

    @property
    def tile_indices(self) -> list[int]:
        """Of every tile its index in its own image; 0 is the base tile."""
        return [index for layout in self.layouts for index in range(layout.num_tiles)]

    def layer(self, chosen: int | None) -> int:
        """The encoder layer that a setting means, where None stands for the visual feature's."""
        return self.feature_layer if chosen is None else chosen

    def mean_scores(self) -> Tensor:
        """The average over the scored layers, float32 (tiles, grid, grid)."""
        return mean_of_layers(self.scores)

    def of_images(self, members: Sequence[int]) -> "VisualEvidence":
        """The evidence of some of the images, by their indices, ascending."""
        if len(members) == len(self.layouts):
            return self
        tiles = [layout.num_tiles for layout in self.layouts]

        def part(of_tiles: Tensor) -> Tensor:
            split = of_tiles.split(tiles)
            return torch.cat([split[member] for member in members])

        return VisualEvidence(
            [self.layouts[member] for member in members],
            part(self.valid),
            [self.features[member] for member in members],
            {layer: part(scores) for layer, scores in self.scores.items()},
            self.feature_layer,
        )


def mean_of_layers(scores: Mapping[int, Tensor]) -> Tensor:
    """The average of scores of one shape over the layers that they are of."""
    layers = sorted(scores)
    total = torch.zeros_like(scores[layers[0]])
    for layer in layers:
        total = total + scores[layer]
    return total / len(layers)
