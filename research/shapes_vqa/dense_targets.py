"""What every visual token shows: the labels from which the vision tower learns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.shapes_vqa.scenes import Scene
from examples.shapes_vqa.vocabulary import CHARACTERS, CODE_LENGTH, COLOURS, DIGITS, KINDS
from hivtp_hf import TokenLayout

from .tokens import SIGN

# What a cell can show: a shape of some kind, or a sign.
SHOWN_KINDS = (*KINDS, SIGN)
# A cell is looked at in so many points a side.
_POINTS = 4
# A character is in a cell if it takes so much of the cell, or if so much of it is in there.
_OF_CELL, _OF_CHARACTER = 0.3, 0.45


@dataclass(frozen=True)
class DenseTargets:
    """Labels of the cells of one image, (cells,) each, in the order of the packed sequence, newlines left out.

    Attributes:
        positions: of the cells in the packed sequence.
        tile, row, column: where each cell lies.
        shape: index of the shape that covers most of it among the scene's, -1 for none.
        sign: index of the sign that covers most of it, -1 for none.
        kind, colour, digit: indices into `SHOWN_KINDS` and the vocabulary; one beyond the end where there is none.
        characters: which character it shows of those that are first, second and third in a code, (cells, 3); one beyond the
            end for none.
        is_centre: whether a shape's centre lies in it.
    """

    positions: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor
    shape: Tensor
    sign: Tensor
    kind: Tensor
    colour: Tensor
    digit: Tensor
    characters: Tensor
    is_centre: Tensor

    @property
    def is_shown(self) -> Tensor:
        """Which cells show a shape or a sign."""
        return (self.shape >= 0) | (self.sign >= 0)


def dense_targets(scene: Scene, layout: TokenLayout, scale: float = 1.0) -> DenseTargets:
    """The labels of a scene's image, whose tokens lie as told, after it was made larger by a factor."""
    positions = layout.cell_positions
    tile, row, column = layout.cells(positions).unbind(1)
    left, top, right, bottom = layout.pixel_boxes(positions).numpy().T / scale
    covered = np.zeros((len(left), len(scene.shapes)), dtype=np.int64)
    written = np.zeros_like(covered)
    signs = scene.signs
    on_sign = np.zeros((len(left), len(signs)), dtype=np.int64)
    on_character = np.zeros((len(left), len(signs), CODE_LENGTH), dtype=np.int64)
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
            for index, sign in enumerate(signs):
                on_sign[:, index] += sign.covers(x, y)
                on_character[:, index] += sign.character_at(x, y)[:, None] == np.arange(CODE_LENGTH)
    for shape in (*scene.shapes, *signs):
        is_centre |= (left <= shape.x) & (shape.x < right) & (top <= shape.y) & (shape.y < bottom)
    of_cell, of_sign = (_most(points, _POINTS**2 // 3) for points in (covered, on_sign))
    with_digit = _most(written, _POINTS**2 // 4)

    def labels(values: list[int], of_cells: np.ndarray, nothing: int) -> Tensor:
        return torch.from_numpy(np.array([*values, nothing])[of_cells])  # -1 is the last one

    kind = labels([KINDS.index(shape.kind) for shape in scene.shapes], of_cell, len(SHOWN_KINDS))
    kind[of_sign >= 0] = SHOWN_KINDS.index(SIGN)
    colour = labels([list(COLOURS).index(shape.colour) for shape in scene.shapes], of_cell, len(COLOURS))
    plate = labels([list(COLOURS).index(sign.colour) for sign in signs], of_sign, len(COLOURS))
    colour = torch.where(plate < len(COLOURS), plate, colour)
    cell_area = (right - left) * (bottom - top)
    return DenseTargets(
        positions,
        tile,
        row,
        column,
        torch.from_numpy(of_cell),
        torch.from_numpy(of_sign),
        kind,
        colour,
        labels([DIGITS.index(shape.digit) if shape.digit else len(DIGITS) for shape in scene.shapes], with_digit, len(DIGITS)),
        _characters(scene, on_character / _POINTS**2, cell_area),
        torch.from_numpy(is_centre),
    )


def _most(points: np.ndarray, least: int) -> np.ndarray:
    """Of every cell what most of its points lie on, -1 where these are fewer than told; points are (cells, things)."""
    if points.shape[1] == 0:
        return np.full(len(points), -1)
    return np.where(points.max(1) >= least, points.argmax(1), -1)


def _characters(scene: Scene, share: np.ndarray, cell_area: np.ndarray) -> Tensor:
    """Labels by the share of every cell that characters of signs take, (cells, signs, 3)."""
    of_cells = np.full((len(share), CODE_LENGTH), len(CHARACTERS))
    if scene.signs:
        area = np.array([sign.character_area for sign in scene.signs])
        is_there = (share >= _OF_CELL) | (share * cell_area[:, None, None] >= _OF_CHARACTER * area[:, None])
        codes = np.array([[CHARACTERS.index(character) for character in sign.code] for sign in scene.signs])
        most = np.where(is_there, share, 0).argmax(1)
        of_cells = np.where(is_there.any(1), codes[most, np.arange(CODE_LENGTH)], of_cells)
    return torch.from_numpy(of_cells)
