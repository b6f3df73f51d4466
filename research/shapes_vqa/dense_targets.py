"""What every visual token shows: the labels from which the vision tower learns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.shapes_vqa.scenes import TILE, Scene
from examples.shapes_vqa.vocabulary import COLOURS, DIGITS, KINDS
from hivtp_hf import TokenLayout, VisualTokenPruningConfig

from .model import PATCH, PINPOINTS

_UNPRUNED = VisualTokenPruningConfig(method="none")
# A cell is looked at in so many points a side.
_POINTS = 4


def layout_of(scene: Scene) -> TokenLayout:
    """How the visual tokens of a scene's image lie in the stock model."""
    return TokenLayout.from_image_size(
        scene.height, scene.width, _UNPRUNED, tile_size=TILE, patch_size=PATCH, pinpoints=PINPOINTS
    )


@dataclass(frozen=True)
class DenseTargets:
    """Labels of the cells of one image, (cells,) each, in the order of the packed sequence, newlines left out.

    Attributes:
        positions: of the cells in the packed sequence.
        tile, row, column: where each cell lies.
        shape: index of the shape that covers most of it among the scene's, -1 for none.
        kind, colour, digit: indices into the vocabulary; one beyond its end where there is none.
        is_centre: whether a shape's centre lies in it.
    """

    positions: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    shape: Tensor
    kind: Tensor
    colour: Tensor
    digit: Tensor
    is_centre: Tensor


def dense_targets(scene: Scene) -> DenseTargets:
    """The labels of a scene's image."""
    layout = layout_of(scene)
    positions = layout.cell_positions
    tile, row, column = layout.cells(positions).unbind(1)
    left, top, right, bottom = layout.pixel_boxes(positions).numpy().T
    covered = np.zeros((len(left), len(scene.shapes)), dtype=np.int64)
    written = np.zeros_like(covered)
    is_centre = np.zeros(len(left), dtype=bool)
    for step_y in (np.arange(_POINTS) + 0.5) / _POINTS:
        y = top + step_y * (bottom - top)
        for step_x in (np.arange(_POINTS) + 0.5) / _POINTS:
            x = left + step_x * (right - left)
            for index, shape in enumerate(scene.shapes):
                covered[:, index] += np.hypot(x - shape.x, y - shape.y) < 0.85 * shape.radius
                if shape.digit is not None:
                    box_left, box_top, box_right, box_bottom = shape.digit_box
                    written[:, index] += (x > box_left) & (x < box_right) & (y > box_top) & (y < box_bottom)
    for shape in scene.shapes:
        is_centre |= (left <= shape.x) & (shape.x < right) & (top <= shape.y) & (shape.y < bottom)
    most = covered.argmax(1)
    of_cell = np.where(covered.max(1) >= _POINTS**2 // 3, most, -1)
    with_digit = np.where(written.max(1) >= _POINTS**2 // 4, written.argmax(1), -1)

    def labels(values: list[int], of_cells: np.ndarray, nothing: int) -> Tensor:
        return torch.from_numpy(np.array([*values, nothing])[of_cells])  # -1 is the last one

    return DenseTargets(
        positions,
        tile,
        row,
        column,
        torch.from_numpy(of_cell),
        labels([KINDS.index(shape.kind) for shape in scene.shapes], of_cell, len(KINDS)),
        labels([list(COLOURS).index(shape.colour) for shape in scene.shapes], of_cell, len(COLOURS)),
        labels([DIGITS.index(shape.digit) if shape.digit else len(DIGITS) for shape in scene.shapes], with_digit, len(DIGITS)),
        torch.from_numpy(is_centre),
    )
