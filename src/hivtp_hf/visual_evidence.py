"""`VisualEvidence`: all that a method may look at when it chooses, for the images of one call."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .token_layout import TokenLayout


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
