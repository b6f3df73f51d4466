"""`TokenLayout`: how the visual tokens of one image lie, and how many of them are kept.

Processor and model both ask this module, and nothing else counts. Integers and geometry only: no model, no pixels.

Words. A *tile* is one square view that the vision encoder sees: the base tile (the whole image, squeezed), then the crops,
row by row. A *cell* is one patch of a tile. The *packed sequence* is what stock transformers hands to the language model:
the base tile's cells, then the rows of the stitched and un-padded crops, each row followed by one newline.

Source of the geometry: transformers' LLaVA-NeXT (`pack_image_features`, `unpad_image`); of the counts: the methods.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from .methods import pruning_method, shown
from .pruning_config import VisualTokenPruningConfig

LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# Bounds on time and memory, far from any model: LLaVA-NeXT's largest image has 2880 cells. A side is what image libraries hold.
LARGEST_SIDE = 2**31 - 1
MOST_CELLS = 2**17


class TokenLayout:
    """The visual tokens of one image under one pruning config. Immutable; build it with `from_image_size`.

    Attributes:
        image_size: (height, width) of the original image in pixels.
        grid: cells per side of a tile.
        tile_rows, tile_columns: how the crops are stitched.
        row_range, column_range: the half-open ranges of stitched rows and columns that un-padding keeps.
        valid: bool (tiles, grid, grid), base tile first; the cells that un-padding keeps.
        tile_totals: cells kept of each tile, base tile first.
        num_stock: tokens that the stock model uses for this image.
        num_newlines: newline tokens kept.
        num_retained: placeholders of this image: `sum(tile_totals) + num_newlines`.
        keeps_everything: whether the kept sequence is the stock one, so that there is nothing to select.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        pruning: VisualTokenPruningConfig,
        *,
        grid: int,
        cell_pixels: int,
        tile_rows: int,
        tile_columns: int,
        row_range: tuple[int, int],
        column_range: tuple[int, int],
    ):
        self.image_size = image_size
        self.pruning = pruning
        self.grid = grid
        self.tile_rows = tile_rows
        self.tile_columns = tile_columns
        self.row_range = row_range
        self.column_range = column_range
        self._cell_pixels = cell_pixels

        rows, columns = row_range[1] - row_range[0], column_range[1] - column_range[0]
        self.num_stock = grid * grid + rows * (columns + 1)
        self.num_newlines = rows if pruning.keep_newlines else 0
        # A layout outlives the call that first asks for it, and so must not take on that call's surroundings: models are
        # built under a meta device, and images encoded under inference mode.
        with torch.device("cpu"), torch.inference_mode(False):
            self.valid = self._valid_cells()
            # For every packed position the cell it shows, as an index into `valid.flatten()`; -1 for a newline.
            self._cell_of_token = self._packed_cells()
            totals = pruning_method(pruning.method).load_selector().count(self.valid, pruning)
        self.tile_totals: tuple[int, ...] = tuple(totals.tolist())
        self.num_retained = sum(self.tile_totals) + self.num_newlines
        # Without an exact count the number kept may stay below that of the placeholders, except at a ratio of 1.
        certain = pruning.exact_count or pruning.retention_ratio == 1
        self.keeps_everything = certain and self.num_retained == self.num_stock

    @staticmethod
    def from_image_size(
        height: int,
        width: int,
        pruning: VisualTokenPruningConfig,
        *,
        tile_size: int = 336,
        patch_size: int = 14,
        pinpoints: Sequence[Sequence[int]] = LLAVA_NEXT_PINPOINTS,
    ) -> "TokenLayout":
        """The layout of an image in LLaVA-NeXT, remembered for repeated sizes.

        Args:
            height, width: of the original image, in pixels.
            pruning: which tokens to keep.
            tile_size: side of a tile in pixels.
            patch_size: side of a cell in pixels.
            pinpoints: the resolutions (height, width) that crops may form, in pixels.

        Raises:
            ValueError: for sizes that are no positive integers below 2**31, tiles that do not divide into patches, pinpoints
                that do not divide into tiles, and more than 2**17 cells an image.
        """
        return _llava_next_layout(
            _positive_integer("height", height),
            _positive_integer("width", width),
            VisualTokenPruningConfig.coerce(pruning),
            _positive_integer("tile_size", tile_size),
            _positive_integer("patch_size", patch_size),
            _checked_pinpoints(pinpoints),
        )

    @property
    def num_tiles(self) -> int:
        """The base tile and the crops."""
        return 1 + self.tile_rows * self.tile_columns

    def kept_indices(self, kept_cells: Tensor) -> Tensor:
        """Positions in the packed sequence that stay, newlines included.

        Args:
            kept_cells: bool (tiles, grid, grid) on any device, with `tile_totals` cells per tile; with
                `exact_count=False` any number up to that.

        Returns:
            int64, ascending, on the same device: (num_retained,) without waiting for the device, or as many as there are
            with `exact_count=False`.
        """
        cell_of_token = self._cell_of_token.to(kept_cells.device)
        is_newline = cell_of_token < 0
        kept = kept_cells.flatten()[cell_of_token.clamp(min=0)]
        kept = torch.where(is_newline, self.pruning.keep_newlines, kept)
        if not self.pruning.exact_count:
            return kept.nonzero().flatten()
        # Kept positions first, in order: a stable sort knows the length of its result, `nonzero` would have to wait.
        return torch.sort((~kept).to(torch.uint8), stable=True).indices[: self.num_retained]

    def cells(self, kept_indices: Tensor) -> Tensor:
        """The cells behind packed positions, newlines left out.

        Args:
            kept_indices: int64 (n,), positions in the packed sequence.

        Returns:
            int64 (cells, 3): tile (0 is the base tile, crops follow row by row), row and column in the tile.
        """
        flat = self._cell_of_token.to(kept_indices.device)[kept_indices]
        flat = flat[flat >= 0]
        per_tile = self.grid * self.grid
        return torch.stack((flat // per_tile, flat % per_tile // self.grid, flat % self.grid), dim=1)

    def pixel_boxes(self, kept_indices: Tensor) -> Tensor:
        """Where in the original image the cells behind packed positions lie, newlines left out.

        Args:
            kept_indices: int64 (n,), positions in the packed sequence.

        Returns:
            float64 (cells, 4): left, top, right, bottom in pixels of the original image, rows in the order of `cells`.
            A crop's cell that reaches into the padding is cut at the image's border.
        """
        tile, row, column = self.cells(kept_indices.cpu()).unbind(1)
        height, width = self.image_size
        base = torch.stack((column, row, column + 1, row + 1), dim=1).double() / self.grid
        base = base * torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
        if self.num_tiles == 1:
            return base

        crop = (tile - 1).clamp(min=0)
        top = (crop // self.tile_columns * self.grid + row) * self._cell_pixels
        left = (crop % self.tile_columns * self.grid + column) * self._cell_pixels
        padded = torch.stack((left, top, left + self._cell_pixels, top + self._cell_pixels), dim=1).double()
        # Stock resizes to the largest size that fits the pinpoint and pads to its centre.
        target_height = self.tile_rows * self.grid * self._cell_pixels
        target_width = self.tile_columns * self.grid * self._cell_pixels
        scale = min(target_width / width, target_height / height)
        resized_height, resized_width = min(height * scale, target_height), min(width * scale, target_width)
        pad_left, pad_top = (target_width - resized_width) / 2, (target_height - resized_height) / 2
        crops = (padded - torch.tensor([pad_left, pad_top, pad_left, pad_top], dtype=torch.float64, device="cpu")) / scale
        limit = torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
        return torch.where((tile == 0)[:, None], base, crops.clamp(min=0).minimum(limit))

    def _valid_cells(self) -> Tensor:
        grid = self.grid
        stitched = torch.zeros(self.tile_rows * grid, self.tile_columns * grid, dtype=torch.bool)
        stitched[slice(*self.row_range), slice(*self.column_range)] = True
        crops = stitched.view(self.tile_rows, grid, self.tile_columns, grid).transpose(1, 2).reshape(-1, grid, grid)
        return torch.cat((torch.ones(1, grid, grid, dtype=torch.bool), crops))

    def _packed_cells(self) -> Tensor:
        grid = self.grid
        base = torch.arange(grid * grid)
        crops = torch.arange(grid * grid, self.num_tiles * grid * grid)
        stitched = crops.view(self.tile_rows, self.tile_columns, grid, grid).transpose(1, 2)
        stitched = stitched.reshape(self.tile_rows * grid, self.tile_columns * grid)
        unpadded = stitched[slice(*self.row_range), slice(*self.column_range)]
        with_newlines = torch.nn.functional.pad(unpadded, (0, 1), value=-1)
        return torch.cat((base, with_newlines.flatten()))

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"TokenLayout({height} x {width}: {self.num_stock} stock tokens, {self.num_retained} retained, "
            f"of them {self.num_newlines} newlines)"
        )


@functools.lru_cache(maxsize=1024)
def _llava_next_layout(
    height: int,
    width: int,
    pruning: VisualTokenPruningConfig,
    tile_size: int,
    patch_size: int,
    pinpoints: tuple[tuple[int, int], ...],
) -> TokenLayout:
    grid = cells_per_side(tile_size, patch_size)
    odd = [pinpoint for pinpoint in pinpoints if pinpoint[0] % tile_size or pinpoint[1] % tile_size]
    if odd:
        raise ValueError(
            f"the pinpoint {odd[0]} does not divide into tiles of {tile_size} pixels. Use pinpoints whose sides are "
            "multiples of the tile size (`image_grid_pinpoints` of the configuration and the image processor)."
        )
    most_tiles = max(height // tile_size * (width // tile_size) for height, width in pinpoints)
    if grid * grid * (1 + most_tiles) > MOST_CELLS:
        raise ValueError(
            f"tiles of {grid} x {grid} cells, up to {1 + most_tiles} an image, make {grid * grid * (1 + most_tiles)} cells; "
            f"{MOST_CELLS} are allowed. Use smaller tiles or pinpoints, or larger patches."
        )
    best_height, best_width = select_best_resolution((height, width), list(pinpoints))
    tile_rows, tile_columns = best_height // tile_size, best_width // tile_size
    row_range, column_range = _unpadded_ranges(height, width, tile_rows * grid, tile_columns * grid)
    return TokenLayout(
        (height, width),
        pruning,
        grid=grid,
        cell_pixels=patch_size,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        row_range=row_range,
        column_range=column_range,
    )


def cells_per_side(tile_size: int, patch_size: int) -> int:
    """Cells per side of a tile; a ValueError if the tile does not divide into patches."""
    if tile_size % patch_size:
        raise ValueError(
            f"a tile of {tile_size} pixels does not divide into patches of {patch_size} pixels. Pruning needs tiles whose "
            "side is a multiple of the patch size (`image_size` and `patch_size` of the vision configuration)."
        )
    return tile_size // patch_size


def _unpadded_ranges(height: int, width: int, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stitched rows and columns that un-padding keeps. The order of the float operations is upstream's: it matters."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return (padding, rows - padding), (0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return (0, rows), (padding, columns - padding)


def _positive_integer(field: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # the latter from tensors that hold no data
        number = 0
    if not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"`{field}` is {shown(value)}; it must be a whole number of pixels from 1 to {LARGEST_SIDE}.")
    return number


def _checked_pinpoints(pinpoints: Any) -> tuple[tuple[int, int], ...]:
    try:
        # A length first: what has none need not end.
        pairs = tuple((height, width) for height, width in pinpoints) if len(pinpoints) else ()
    except (TypeError, ValueError):
        pairs = ()
    if not pairs:
        raise ValueError(f"`pinpoints` is {shown(pinpoints)}; it must be a list of (height, width) in pixels.")
    return tuple((_positive_integer("pinpoints", height), _positive_integer("pinpoints", width)) for height, width in pairs)
