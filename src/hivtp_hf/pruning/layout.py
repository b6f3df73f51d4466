"""`TokenLayout`: how the visual tokens of one image lie, and how many of them are kept.

Processor and model both ask this module, and nothing else counts. Integers and geometry only: no model, no pixels.

Words. A *tile* is one square view that the vision encoder sees: the base tile (the whole image, squeezed), then the crops,
row by row. A *cell* is one patch of a tile. The *packed sequence* is what stock transformers hands to the language model:
the base tile's cells, then the rows of the stitched and un-padded crops, each row followed by one newline. LLaVA-1.5 has
the base tile alone; where its class token is kept, that comes first.

Source of the geometry: transformers' LLaVA-NeXT (`pack_image_features`, `unpad_image`); of the counts: the methods.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from .checked_values import MOST_CELLS, checked_image_size, checked_pinpoints, checked_view, positive_integer, shown
from .registry import pruning_method
from .retention_bits import SMALLEST_RATIO, bits_of_ratio, ratio_of_bits
from .settings import VisualTokenPruningConfig

LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# What packed positions show that is no cell.
_NEWLINE = -1
_CLASS_TOKEN = -2


class TokenLayout:
    """The visual tokens of one image under one pruning config. Immutable; `from_image_size` and `single_tile` build it.

    Attributes:
        image_size: (height, width) of the original image in pixels; None where the layout was built without it.
        pruning: the settings. A token budget among them has become the ratio that it means for this image.
        grid: cells per side of a tile.
        tile_rows, tile_columns: how the crops are stitched; 0 where there are none.
        row_range, column_range: the half-open ranges of stitched rows and columns that un-padding keeps.
        valid_per_tile: how many cells of each tile the stock model uses, base tile first.
        group_totals: cells kept of each group of cells among which the method chooses: of each tile, base tile first; for
            gprune of the base tile and of all crops together.
        num_stock: tokens that the stock model uses for this image.
        num_newlines: newline tokens kept.
        num_class_tokens: class tokens kept, 0 or 1.
        num_retained: placeholders of this image: `sum(group_totals) + num_newlines + num_class_tokens`.
        keeps_everything: whether the kept sequence is the stock one, so that there is nothing to select.
    """

    def __init__(
        self,
        image_size: tuple[int, int] | None,
        pruning: VisualTokenPruningConfig,
        *,
        grid: int,
        tile_rows: int = 0,
        tile_columns: int = 0,
        row_range: tuple[int, int] = (0, 0),
        column_range: tuple[int, int] = (0, 0),
        extra_tokens: int = 0,
        view: tuple[float, float, float, float] | None = None,
    ):
        self.image_size = image_size
        self.grid = grid
        self.tile_rows = tile_rows
        self.tile_columns = tile_columns
        self.row_range = row_range
        self.column_range = column_range
        self._extra_tokens = extra_tokens
        self._view = view

        rows, columns = row_range[1] - row_range[0], column_range[1] - column_range[0]
        self.num_stock = grid * grid + extra_tokens + rows * (columns + 1)
        self.num_newlines = rows if pruning.keep_newlines else 0
        self.num_class_tokens = max(extra_tokens, 0)
        self.valid_per_tile: tuple[int, ...] = self._count_valid()
        # A layout outlives the call that first asks for it, and so must not take on that call's surroundings: images are
        # encoded under inference mode, and models built under a meta device. Against the latter, tensors here and below name
        # the CPU, each by itself, as a device context would double what counting takes.
        with torch.inference_mode(False):
            self.pruning = self._with_ratio(pruning)
            self.group_totals: tuple[int, ...] = self._count(self.pruning)
        self.num_retained = sum(self.group_totals) + self.num_newlines + self.num_class_tokens
        # Without an exact count the number kept may stay below that of the placeholders, except at a ratio of 1.
        certain = self.pruning.exact_count or self.pruning.retention_ratio == 1
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
            positive_integer("height", height),
            positive_integer("width", width),
            VisualTokenPruningConfig.coerce(pruning),
            positive_integer("tile_size", tile_size),
            positive_integer("patch_size", patch_size),
            checked_pinpoints(pinpoints),
        )

    @staticmethod
    def single_tile(
        grid: int,
        pruning: VisualTokenPruningConfig,
        *,
        extra_tokens: int = 0,
        image_size: Sequence[int] | None = None,
        view: Sequence[float] | None = None,
    ) -> "TokenLayout":
        """The layout of an image in LLaVA-1.5: one tile, no newlines; remembered for repeated arguments.

        Args:
            grid: cells per side of the tile.
            pruning: which tokens to keep.
            extra_tokens: what the stock sequence has beyond one token per cell: 1 where it begins with the class token, which
                is then kept and counted; -1 where stock drops the first cell as if that were one; else 0.
            image_size: (height, width) of the original image in pixels.
            view: (left, top, right, bottom), the part of the original image that the cells show, in its pixels; all of it
                unless given.

        Raises:
            ValueError: for a grid that is no positive integer, or of more than 2**17 cells, and for other extra tokens,
                sizes and views than described.
        """
        grid = positive_integer("grid", grid, "cells")
        if grid * grid > MOST_CELLS:
            raise ValueError(f"`grid` is {grid}; {grid * grid} cells are too many, {MOST_CELLS} are allowed.")
        if isinstance(extra_tokens, bool) or not isinstance(extra_tokens, int) or extra_tokens not in (-1, 0, 1):
            raise ValueError(f"`extra_tokens` is {shown(extra_tokens)}; it must be -1, 0 or 1.")
        if image_size is not None:
            image_size = checked_image_size(image_size)
            view = (0, 0, image_size[1], image_size[0]) if view is None else view
        return _single_tile_layout(
            grid,
            VisualTokenPruningConfig.coerce(pruning),
            extra_tokens,
            image_size,
            None if view is None else checked_view(view),
        )

    @property
    def num_tiles(self) -> int:
        """The base tile and the crops."""
        return 1 + self.tile_rows * self.tile_columns

    @property
    def cell_positions(self) -> Tensor:
        """The packed positions that show a cell, not a newline or a class token: int64, ascending, on the CPU."""
        return (self._cell_of_token >= 0).nonzero()[:, 0]

    def kept_indices(self, kept_cells: Tensor) -> Tensor:
        """Positions in the packed sequence that stay, newlines included.

        Args:
            kept_cells: bool (tiles, grid, grid) on any device, as many of each group as `group_totals` says;
                with `exact_count=False` any number up to that.

        Returns:
            int64, ascending, on the same device: (num_retained,) without waiting for the device, or as many as there are
            with `exact_count=False`.
        """
        cell_of_token = self._cell_of_token.to(kept_cells.device)
        kept = kept_cells.flatten()[cell_of_token.clamp(min=0)]
        kept = torch.where(cell_of_token == _NEWLINE, self.pruning.keep_newlines, kept | (cell_of_token == _CLASS_TOKEN))
        if not self.pruning.exact_count:
            return kept.nonzero().flatten()
        # Kept positions first, in order: a stable sort knows the length of its result, `nonzero` would have to wait.
        return torch.sort((~kept).to(torch.uint8), stable=True).indices[: self.num_retained]

    def cells(self, kept_indices: Tensor) -> Tensor:
        """The cells behind packed positions; what is no cell (newlines, class token) is left out.

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
        """Where in the original image the cells behind packed positions lie; what is no cell is left out.

        Args:
            kept_indices: int64 (n,), positions in the packed sequence.

        Returns:
            float64 (cells, 4): left, top, right, bottom in pixels of the original image, rows in the order of `cells`.
            A cell that reaches into padding is cut at the image's border.
        """
        tile, row, column = self.cells(kept_indices.cpu()).unbind(1)
        if self.image_size is None:
            raise ValueError("this layout was built without `image_size`; give it to say where cells lie in the image.")
        height, width = self.image_size
        left, top, right, bottom = self._view or (0, 0, width, height)
        step = torch.tensor([right - left, bottom - top] * 2, dtype=torch.float64, device="cpu") / self.grid
        origin = torch.tensor([left, top] * 2, dtype=torch.float64, device="cpu")
        limit = torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
        base = (torch.stack((column, row, column + 1, row + 1), dim=1) * step + origin).clamp(min=0).minimum(limit)
        if self.num_tiles == 1:
            return base

        # In units of one cell of the stitched grid.
        crop = (tile - 1).clamp(min=0)
        top_cell = crop // self.tile_columns * self.grid + row
        left_cell = crop % self.tile_columns * self.grid + column
        padded = torch.stack((left_cell, top_cell, left_cell + 1, top_cell + 1), dim=1).double()
        # Stock resizes to the largest size that fits the pinpoint and pads to its centre.
        target_height, target_width = self.tile_rows * self.grid, self.tile_columns * self.grid
        scale = min(target_width / width, target_height / height)
        resized_height, resized_width = min(height * scale, target_height), min(width * scale, target_width)
        pad_left, pad_top = (target_width - resized_width) / 2, (target_height - resized_height) / 2
        crops = (padded - torch.tensor([pad_left, pad_top, pad_left, pad_top], dtype=torch.float64, device="cpu")) / scale
        return torch.where((tile == 0)[:, None], base, crops.clamp(min=0).minimum(limit))

    def _with_ratio(self, pruning: VisualTokenPruningConfig) -> VisualTokenPruningConfig:
        """`pruning`, with a ratio in place of a token budget: the largest one whose tokens do not exceed it."""
        if pruning.token_budget is None:
            return pruning
        budget = pruning.token_budget - self.num_newlines - self.num_class_tokens
        if budget < 0:
            names = [f"{self.num_newlines} newline tokens"] * (self.num_newlines > 0)
            names += ["the class token"] * self.num_class_tokens
            raise ValueError(
                f"`token_budget` is {pruning.token_budget}, but an image of this shape has {' and '.join(names)} that stay "
                "whatever is pruned. Give a larger budget"
                + (", or set `keep_newlines` to False, which drops the newlines." if self.num_newlines else ".")
            )

        def exceeds(ratio: float) -> bool:
            return sum(self._count(pruning.replace(retention_ratio=ratio))) > budget

        # What is kept grows with the ratio, so the ratios that fit end somewhere: found among the floats themselves, whose bits
        # are ordered as they are. The first keeps nothing of any image.
        fits, too_large = bits_of_ratio(SMALLEST_RATIO), bits_of_ratio(1.0)
        if not exceeds(1.0):
            return pruning.replace(retention_ratio=1.0)
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            fits, too_large = (fits, middle) if exceeds(ratio_of_bits(middle)) else (middle, too_large)
        return pruning.replace(retention_ratio=ratio_of_bits(fits))

    def _count(self, pruning: VisualTokenPruningConfig) -> tuple[int, ...]:
        return tuple(pruning_method(pruning.method).count(self, pruning))

    def _count_valid(self) -> tuple[int, ...]:
        """By arithmetic: a processor asks for nothing else as a rule, and tensors would take longer than all the counting."""

        def shared(tiles: int, kept: tuple[int, int]) -> list[int]:
            """How many lines of each tile along a side un-padding keeps."""
            starts = range(0, tiles * self.grid, self.grid)
            return [max(0, min(kept[1], start + self.grid) - max(kept[0], start)) for start in starts]

        rows, columns = shared(self.tile_rows, self.row_range), shared(self.tile_columns, self.column_range)
        return (self.grid**2 + min(self._extra_tokens, 0), *(height * width for height in rows for width in columns))

    @functools.cached_property
    @torch.inference_mode(False)
    def valid(self) -> Tensor:
        """bool (tiles, grid, grid), base tile first; the cells that the stock model uses."""
        grid = self.grid
        stitched = torch.zeros(self.tile_rows * grid, self.tile_columns * grid, dtype=torch.bool, device="cpu")
        stitched[slice(*self.row_range), slice(*self.column_range)] = True
        crops = stitched.view(self.tile_rows, grid, self.tile_columns, grid).transpose(1, 2).reshape(-1, grid, grid)
        base = torch.ones(1, grid, grid, dtype=torch.bool, device="cpu")
        base[0, 0, 0] = self._extra_tokens >= 0
        return torch.cat((base, crops))

    @functools.cached_property
    @torch.inference_mode(False)
    def _cell_of_token(self) -> Tensor:
        """For every packed position the cell it shows, as an index into `valid.flatten()`. Counting does without."""
        grid = self.grid
        base = torch.arange(grid * grid, device="cpu")
        crops = torch.arange(grid * grid, self.num_tiles * grid * grid, device="cpu")
        stitched = crops.view(self.tile_rows, self.tile_columns, grid, grid).transpose(1, 2)
        stitched = stitched.reshape(self.tile_rows * grid, self.tile_columns * grid)
        unpadded = stitched[slice(*self.row_range), slice(*self.column_range)]
        with_newlines = torch.nn.functional.pad(unpadded, (0, 1), value=_NEWLINE)
        class_token = torch.full((self.num_class_tokens,), _CLASS_TOKEN, device="cpu")
        return torch.cat((class_token, base[max(0, -self._extra_tokens) :], with_newlines.flatten()))

    def __repr__(self) -> str:
        size = "image" if self.image_size is None else "{} x {}".format(*self.image_size)
        return (
            f"TokenLayout({size}: {self.num_stock} stock tokens, {self.num_retained} retained, "
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
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        row_range=row_range,
        column_range=column_range,
    )


@functools.lru_cache(maxsize=1024)
def _single_tile_layout(
    grid: int,
    pruning: VisualTokenPruningConfig,
    extra_tokens: int,
    image_size: tuple[int, int] | None,
    view: tuple[float, float, float, float] | None,
) -> TokenLayout:
    return TokenLayout(image_size, pruning, grid=grid, extra_tokens=extra_tokens, view=view)


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
