"""`TokenLayout`: how the visual tokens of one image lie, and how many of them are kept.

Processor and model both ask this module, and nothing else counts. Integers and geometry only: no model, no pixels.

Words. A *view* is a rectangle of cells that methods choose from, rows x columns: a tile of LLaVA, a frame, or a whole image. A
*cell* is one visual token of a view. *Stitched views* are views of one shape, side by side, that are packed as one grid. The
*packed sequence* is what stock transformers hands to the language model. For LLaVA-NeXT these are the base tile's cells, then
the rows of the stitched and un-padded crops, each row followed by one newline. LLaVA-1.5 has the base tile alone; where its
class token is kept, that comes first. LLaVA-OneVision resamples large stitched crops to fewer cells, and pools the frames of a
video: there cells are those of the result, and `resampled_from` says what the tower saw.

Source of the geometry: transformers' LLaVA-NeXT and LLaVA-OneVision (`pack_image_features`, `unpad_image`, `apply_pooling`); of
the counts: the methods.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from .checked_values import MOST_CELLS, checked_flag, checked_image_size, checked_pinpoints, checked_view, positive_integer
from .registry import pruning_method
from .retention_bits import SMALLEST_RATIO, bits_of_ratio, ratio_of_bits
from .settings import VisualTokenPruningConfig

LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# What packed positions show that is no cell.
_NEWLINE = -1
_CLASS_TOKEN = -2


class StitchedViews(NamedTuple):
    """Views of one shape, stitched into one grid of cells, a rectangle of which is packed row by row.

    Attributes:
        rows, columns: cells of one view.
        down, across: how many views are stitched.
        row_range, column_range: the half-open ranges of stitched rows and columns that stock uses; None for all.
        newlines: where newline tokens follow: "none", "rows" (one after every row) or "end" (one after all).
        box: (left, top, right, bottom) of the stitched grid in pixels of the original image; it may reach beyond the image.
            None for the whole image.
        covered: the share of a view's height and width that its cells show, from the upper left. Towers leave a rest that is
            no whole patch unused: of 384 pixels, patches of 14 pixels cover 378.
        resampled_from: the stitched views of the tower, where stock resamples these to other cells: the used rectangle of each
            becomes as many of the rows here, all of its columns, one below the other. Empty where cells are the tower's own.
    """

    rows: int
    columns: int
    down: int = 1
    across: int = 1
    row_range: tuple[int, int] | None = None
    column_range: tuple[int, int] | None = None
    newlines: str = "none"
    box: tuple[float, float, float, float] | None = None
    covered: float = 1.0
    resampled_from: "tuple[StitchedViews, ...]" = ()

    @property
    def of_tower(self) -> "tuple[StitchedViews, ...]":
        """The stitched views as the tower sees them."""
        return self.resampled_from or (self,)

    @property
    def num_views(self) -> int:
        """How many views are stitched."""
        return self.down * self.across

    @property
    def used_rows(self) -> range:
        """The stitched rows that stock uses."""
        return range(self.down * self.rows) if self.row_range is None else range(*self.row_range)

    @property
    def used_columns(self) -> range:
        """The stitched columns that stock uses."""
        return range(self.across * self.columns) if self.column_range is None else range(*self.column_range)

    @property
    def num_newlines(self) -> int:
        """How many newline tokens stock adds."""
        return {"none": 0, "rows": len(self.used_rows), "end": 1}[self.newlines]

    @property
    def num_tokens(self) -> int:
        """How many tokens stock packs: cells and newlines."""
        return len(self.used_rows) * len(self.used_columns) + self.num_newlines

    def valid_per_view(self) -> list[int]:
        """How many cells of every view stock uses, views row by row."""

        def of_line(views: int, cells: int, used: range) -> list[int]:
            starts = range(0, views * cells, cells)
            return [max(0, min(used.stop, start + cells) - max(used.start, start)) for start in starts]

        across = of_line(self.across, self.columns, self.used_columns)
        return [height * width for height in of_line(self.down, self.rows, self.used_rows) for width in across]

    def stitched(self, of_cells: Tensor) -> Tensor:
        """Values of cells in the order of views, (..., cells), as the stitched grid: (..., down * rows, across * columns)."""
        views = of_cells.unflatten(-1, (self.down, self.across, self.rows, self.columns))
        return views.transpose(-3, -2).flatten(-4, -3).flatten(-2)

    def from_tower(self, of_cells: Tensor) -> Tensor:
        """Values of the tower's cells, float (cells, ...), as those of the cells here, resampled as stock does it."""
        if not self.resampled_from:
            return of_cells
        sizes = [views.num_views * views.rows * views.columns for views in self.resampled_from]
        shape = (self.rows * self.down // len(sizes), self.columns * self.across)
        resampled = []
        for views, values in itertools.groupby(
            zip(self.resampled_from, of_cells.reshape(len(of_cells), -1).split(sizes), strict=True), lambda pair: pair[0]
        ):
            grids = views.stitched(torch.stack([value.T for _, value in values]))
            rows, columns = views.used_rows, views.used_columns
            used = grids[:, :, rows.start : rows.stop, columns.start : columns.stop]
            # Grids lie one below the other, and their numbers side by side.
            resampled.append(torch.nn.functional.interpolate(used, shape, mode="bilinear").transpose(0, 1).flatten(1))
        whole = torch.cat(resampled, dim=1).unflatten(1, (self.down * self.rows, self.across * self.columns))
        return self.unstitched(whole).T.reshape(-1, *of_cells.shape[1:])

    def unstitched(self, grid: Tensor) -> Tensor:
        """The reverse of `stitched`."""
        views = grid.unflatten(-2, (self.down, self.rows)).unflatten(-1, (self.across, self.columns))
        return views.transpose(-3, -2).flatten(-4)


class TokenLayout:
    """The visual tokens of one image under one pruning config. Immutable; `from_image_size` and `single_tile` build it.

    Attributes:
        image_size: (height, width) of the original image in pixels; None where the layout was built without it.
        pruning: the settings. A token budget among them has become the ratio that it means for this image.
        parts: the stitched views, in the order in which they are packed.
        has_class_token: whether the packed sequence begins with the class token, which is then kept.
        skips_first_cell: whether stock drops the first cell, as if that were a class token.
        view_shapes: (rows, columns) of every view, part by part, each part row by row. Cells are counted view by view.
        valid_per_view: how many cells of each view the stock model uses.
        group_totals: cells kept of each group of cells among which the method chooses: of each view; for gprune of each part.
        num_stock: tokens that the stock model uses for this image.
        num_newlines: newline tokens kept; of methods that count them, the most that may be.
        num_class_tokens: class tokens kept, 0 or 1.
        num_retained: placeholders of this image: `sum(group_totals) + num_newlines + num_class_tokens`.
        num_offered: tokens that a method may keep: all that stock uses, without newlines where `keep_newlines` is False.
        keeps_everything: whether the kept sequence is the stock one, so that there is nothing to select.

    With `at_least_one`, a ratio that keeps no cell of the image becomes the smallest one that does.

    Where the method `counts_newlines`, its count is of all tokens, so a budget is too; newlines and the class token are taken
    to be kept first, as far as the count goes, and `group_totals` has one number, the cells that are left. With `at_least_one`
    the count is then 1 where it would be 0.
    """

    def __init__(
        self,
        image_size: tuple[int, int] | None,
        pruning: VisualTokenPruningConfig,
        parts: Sequence[StitchedViews],
        *,
        has_class_token: bool = False,
        skips_first_cell: bool = False,
        at_least_one: bool = False,
    ):
        self.image_size = image_size
        self.parts = tuple(parts)
        self.has_class_token = has_class_token
        self.skips_first_cell = skips_first_cell

        self.view_shapes = tuple((part.rows, part.columns) for part in self.parts for _ in range(part.num_views))
        self.num_stock = sum(part.num_tokens for part in self.parts) + has_class_token - skips_first_cell
        newlines = sum(part.num_newlines for part in self.parts)
        self.num_newlines = newlines if pruning.keep_newlines else 0
        self.num_offered = self.num_stock - newlines + self.num_newlines
        self.num_class_tokens = int(has_class_token)
        self._counts_newlines = pruning_method(pruning.method).counts_newlines
        # By arithmetic: a processor asks for nothing else as a rule, and tensors would take longer than all the counting.
        valid = [number for part in self.parts for number in part.valid_per_view()]
        self.valid_per_view: tuple[int, ...] = (valid[0] - skips_first_cell, *valid[1:])
        # A layout outlives the call that first asks for it, and so must not take on that call's surroundings: images are
        # encoded under inference mode, and models built under a meta device. Against the latter, tensors here and below name
        # the CPU, each by itself, as a device context would double what counting takes.
        with torch.inference_mode(False):
            self.pruning = self._with_ratio(pruning)
            if at_least_one and not self._counts_newlines:
                self.pruning = self._with_a_cell(self.pruning)
            self.group_totals: tuple[int, ...] = self._count(self.pruning)
        if self._counts_newlines:
            tokens = max(sum(self.group_totals), int(at_least_one))
            self.num_class_tokens = min(self.num_class_tokens, tokens)
            self.num_newlines = min(self.num_newlines, tokens - self.num_class_tokens)
            self.group_totals = (tokens - self.num_newlines - self.num_class_tokens,)
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
            tile_size: side of a tile in pixels. A rest that is no whole patch is not seen.
            patch_size: side of a cell in pixels.
            pinpoints: the resolutions (height, width) that crops may form, in pixels.

        Raises:
            ValueError: for sizes that are no positive integers below 2**31, tiles smaller than a patch, pinpoints that do not
                divide into tiles, and more than 2**17 cells an image.
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
        has_class_token: bool = False,
        skips_first_cell: bool = False,
        image_size: Sequence[int] | None = None,
        view: Sequence[float] | None = None,
    ) -> "TokenLayout":
        """The layout of an image in LLaVA-1.5: one tile, no newlines; remembered for repeated arguments.

        Args:
            grid: cells per side of the tile.
            pruning: which tokens to keep.
            has_class_token: whether the stock sequence begins with the class token, which is then kept and counted.
            skips_first_cell: whether stock drops the first cell, as if that were a class token.
            image_size: (height, width) of the original image in pixels.
            view: (left, top, right, bottom), the part of the original image that the cells show, in its pixels; all of it
                unless given.

        Raises:
            ValueError: for a grid that is no positive integer, or of more than 2**17 cells, for both flags at once, and for
                other sizes and views than described.
        """
        grid = positive_integer("grid", grid, "cells")
        if grid * grid > MOST_CELLS:
            raise ValueError(f"`grid` is {grid}; {grid * grid} cells are too many, {MOST_CELLS} are allowed.")
        if checked_flag("has_class_token", has_class_token) and checked_flag("skips_first_cell", skips_first_cell):
            raise ValueError(
                "`has_class_token` and `skips_first_cell` are both True; at most one of them may be True. Stock packs the "
                "class token, or drops the first token, or neither."
            )
        if image_size is not None:
            image_size = checked_image_size(image_size)
            view = (0, 0, image_size[1], image_size[0]) if view is None else view
        return _single_tile_layout(
            grid,
            VisualTokenPruningConfig.coerce(pruning),
            has_class_token,
            checked_flag("skips_first_cell", skips_first_cell),
            image_size,
            None if view is None else checked_view(view),
        )

    @property
    def num_views(self) -> int:
        """How many views the image has; in LLaVA-NeXT the base tile and the crops."""
        return len(self.view_shapes)

    @property
    def num_tiles(self) -> int:
        """How many views the tower sees: `num_views`, unless stock resamples them."""
        return sum(views.num_views for part in self.parts for views in part.of_tower)

    @property
    def num_cells(self) -> int:
        """The cells of all views, those included that stock does not use."""
        return sum(rows * columns for rows, columns in self.view_shapes)

    def by_view(self, of_cells: Tensor) -> list[Tensor]:
        """Values of all cells, (cells,), as those of every view: (rows, columns) each."""
        views = of_cells.split([rows * columns for rows, columns in self.view_shapes])
        return [view.view(shape) for view, shape in zip(views, self.view_shapes, strict=True)]

    def by_part(self, of_cells: Tensor) -> list[Tensor]:
        """Values of all cells, (cells,), as those of every part: (cells of the part,) each, in the order of views."""
        return list(of_cells.split([part.num_views * part.rows * part.columns for part in self.parts]))

    @property
    def cell_positions(self) -> Tensor:
        """The packed positions that show a cell, not a newline or a class token: int64, ascending, on the CPU."""
        return (self._cell_of_token >= 0).nonzero()[:, 0]

    @property
    def offered_positions(self) -> Tensor:
        """The packed positions that a method may keep: int64 (num_offered,), ascending, on the CPU."""
        return ((self._cell_of_token != _NEWLINE) | self.pruning.keep_newlines).nonzero()[:, 0]

    @property
    def is_no_cell(self) -> Tensor:
        """Which packed positions show a newline or a class token: bool (num_stock,), on the CPU."""
        return self._cell_of_token < 0

    def packed(self, of_cells: Tensor, newline: float, class_token: float) -> Tensor:
        """Values of all cells, (cells,), as those of packed positions, (num_stock,): newlines and a class token as given."""
        cell_of_token = self._cell_of_token.to(of_cells.device)
        packed = of_cells[cell_of_token.clamp(min=0)]
        packed = torch.where(cell_of_token == _NEWLINE, newline, packed)
        return torch.where(cell_of_token == _CLASS_TOKEN, class_token, packed)

    def kept_indices(self, kept_cells: Tensor) -> Tensor:
        """Positions in the packed sequence that stay, newlines included.

        Args:
            kept_cells: bool (cells,) on any device, or of another shape in the same order, as many of each group as
                `group_totals` says; with `exact_count=False` any number up to that.

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

    def cell_numbers(self, kept_indices: Tensor) -> Tensor:
        """The cells behind packed positions, int64 (cells,), counted view by view; what is no cell is left out."""
        flat = self._cell_of_token.to(kept_indices.device)[kept_indices]
        return flat[flat >= 0]

    def cells(self, kept_indices: Tensor) -> Tensor:
        """The cells behind packed positions; what is no cell (newlines, class token) is left out.

        Args:
            kept_indices: int64 (n,), positions in the packed sequence.

        Returns:
            int64 (cells, 3): view (in LLaVA 0 is the base tile, crops follow row by row), row and column in the view.
        """
        return self._place_of_cell.to(kept_indices.device)[self.cell_numbers(kept_indices)]

    def pixel_boxes(self, kept_indices: Tensor) -> Tensor:
        """Where in the original image the cells behind packed positions lie; what is no cell is left out.

        Args:
            kept_indices: int64 (n,), positions in the packed sequence.

        Returns:
            float64 (cells, 4): left, top, right, bottom in pixels of the original image, rows in the order of `cells`.
            A cell that reaches into padding is cut at the image's border.
        """
        if self.image_size is None:
            raise ValueError("this layout was built without `image_size`; give it to say where cells lie in the image.")
        height, width = self.image_size
        limit = torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
        view, row, column = self.cells(kept_indices.cpu()).unbind(1)
        boxes = torch.zeros(len(view), 4, dtype=torch.float64, device="cpu")
        first = 0
        for part in self.parts:
            of_part = (view >= first) & (view < first + part.num_views)
            view_row, view_column = (view - first) // part.across, (view - first) % part.across
            stitched_row, stitched_column = view_row * part.rows + row, view_column * part.columns + column
            left, top, right, bottom = part.box or (0, 0, width, height)
            view_size = [(right - left) / part.across, (bottom - top) / part.down]
            step = [(right - left) / (part.across * part.columns), (bottom - top) / (part.down * part.rows)]
            corners = torch.stack((stitched_column, stitched_row, stitched_column + 1, stitched_row + 1), dim=1)
            step_of_side = torch.tensor(step * 2, dtype=torch.float64, device="cpu") * part.covered
            unseen = torch.tensor(view_size * 2, dtype=torch.float64, device="cpu") * (1 - part.covered)
            views_before = torch.stack((view_column, view_row), dim=1).repeat(1, 2)
            origin = torch.tensor([left, top] * 2, dtype=torch.float64, device="cpu") + views_before * unseen
            boxes = torch.where(of_part[:, None], corners * step_of_side + origin, boxes)
            first += part.num_views
        return boxes.clamp(min=0).minimum(limit)

    def _with_ratio(self, pruning: VisualTokenPruningConfig) -> VisualTokenPruningConfig:
        """`pruning`, with a ratio in place of a token budget: the largest one whose tokens do not exceed it."""
        if pruning.token_budget is None:
            return pruning
        budget = pruning.token_budget
        if not self._counts_newlines:
            budget -= self.num_newlines + self.num_class_tokens
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

    def _with_a_cell(self, pruning: VisualTokenPruningConfig) -> VisualTokenPruningConfig:
        """`pruning`, with the smallest ratio that keeps a cell of the image where its own keeps none."""
        ratio = pruning.retention_ratio
        if ratio is None or any(self._count(pruning)):
            return pruning
        keeps_none, keeps_some = bits_of_ratio(ratio), bits_of_ratio(1.0)
        while keeps_some - keeps_none > 1:
            middle = (keeps_none + keeps_some) // 2
            if any(self._count(pruning.replace(retention_ratio=ratio_of_bits(middle)))):
                keeps_some = middle
            else:
                keeps_none = middle
        return pruning.replace(retention_ratio=ratio_of_bits(keeps_some))

    def _count(self, pruning: VisualTokenPruningConfig) -> tuple[int, ...]:
        return tuple(pruning_method(pruning.method).count(self, pruning))

    @functools.cached_property
    @torch.inference_mode(False)
    def valid(self) -> Tensor:
        """bool (cells,); the cells that the stock model uses."""
        valid = torch.zeros(self.num_cells, dtype=torch.bool, device="cpu")
        valid[self._cell_of_token[self._cell_of_token >= 0]] = True
        return valid

    @functools.cached_property
    @torch.inference_mode(False)
    def token_of_cell(self) -> Tensor:
        """int64 (cells,), on the CPU: the packed position of every cell, -1 for those that stock does not use."""
        positions = self.cell_positions
        tokens = torch.full((self.num_cells,), -1, dtype=torch.int64, device="cpu")
        tokens[self._cell_of_token[positions]] = positions
        return tokens

    @functools.cached_property
    @torch.inference_mode(False)
    def _cell_of_token(self) -> Tensor:
        """For every packed position the cell it shows, as an index into `valid`. Counting does without."""
        packed = [torch.full((int(self.has_class_token),), _CLASS_TOKEN, device="cpu")]
        for part, cells in zip(self.parts, self.by_part(torch.arange(self.num_cells, device="cpu")), strict=True):
            rows, columns = part.used_rows, part.used_columns
            used = part.stitched(cells)[rows.start : rows.stop, columns.start : columns.stop]
            if part.newlines == "rows":
                used = torch.nn.functional.pad(used, (0, 1), value=_NEWLINE)
            packed.append(used.flatten())
            if part.newlines == "end":
                packed.append(torch.full((1,), _NEWLINE, device="cpu"))
        # What stock drops as if it were a class token is the first cell of all.
        return torch.cat(packed)[int(self.skips_first_cell) :]

    @functools.cached_property
    @torch.inference_mode(False)
    def token_places(self) -> Tensor:
        """Where every packed token lies: int64 (num_stock, 3), part, and row and column among those of it that stock uses.

        A newline stands behind its row, one after all behind the last. The class token is in no part: -1, 0, 0.
        """
        places = [torch.tensor([[-1, 0, 0]] * int(self.has_class_token), dtype=torch.int64, device="cpu").view(-1, 3)]
        for number, part in enumerate(self.parts):
            rows, columns = len(part.used_rows), len(part.used_columns)
            lines = [torch.arange(side, device="cpu") for side in (rows, columns + (part.newlines == "rows"))]
            places.append(torch.cartesian_prod(torch.tensor([number], device="cpu"), *lines))
            if part.newlines == "end":
                places.append(torch.tensor([[number, rows - 1, columns]], device="cpu"))
        return torch.cat(places)[int(self.skips_first_cell) :]

    @functools.cached_property
    @torch.inference_mode(False)
    def _place_of_cell(self) -> Tensor:
        """int64 (cells, 3): view, row and column of every cell."""
        lines = [[torch.arange(side, device="cpu") for side in shape] for shape in self.view_shapes]
        views = [torch.tensor([view], device="cpu") for view in range(self.num_views)]
        return torch.cat([torch.cartesian_prod(view, *sides) for view, sides in zip(views, lines, strict=True)])

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
    covered = grid * patch_size / tile_size
    crops = stitched_crops(height, width, grid, tile_size, pinpoints, covered)
    return TokenLayout((height, width), pruning, (StitchedViews(grid, grid, covered=covered), crops))


def stitched_crops(
    height: int, width: int, grid: int, tile_size: int, pinpoints: Sequence[tuple[int, int]], covered: float = 1.0
) -> StitchedViews:
    """The crops of an image, which are packed with a newline a row.

    Args:
        height, width: of the image in pixels.
        grid: cells per side of a tile.
        tile_size: side of a tile in pixels.
        pinpoints: the resolutions (height, width) that crops may form, in pixels.
        covered: the share of a tile's side that its cells show.

    Raises:
        ValueError: for pinpoints that do not divide into tiles, and more than 2**17 cells an image.
    """
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
    # Stock resizes to the largest size that fits the pinpoint and pads to its centre.
    target_height, target_width = tile_rows * grid, tile_columns * grid
    scale = min(target_width / width, target_height / height)
    left = -max(target_width - width * scale, 0) / 2 / scale
    top = -max(target_height - height * scale, 0) / 2 / scale
    return StitchedViews(
        grid,
        grid,
        down=tile_rows,
        across=tile_columns,
        row_range=row_range,
        column_range=column_range,
        newlines="rows",
        box=(left, top, left + target_width / scale, top + target_height / scale),
        covered=covered,
    )


@functools.lru_cache(maxsize=1024)
def _single_tile_layout(
    grid: int,
    pruning: VisualTokenPruningConfig,
    has_class_token: bool,
    skips_first_cell: bool,
    image_size: tuple[int, int] | None,
    view: tuple[float, float, float, float] | None,
) -> TokenLayout:
    tile = StitchedViews(grid, grid, box=view)
    return TokenLayout(image_size, pruning, (tile,), has_class_token=has_class_token, skips_first_cell=skips_first_cell)


def cells_per_side(tile_size: int, patch_size: int) -> int:
    """Cells per side of a tile, whole patches alone; a ValueError if it has none."""
    if tile_size < patch_size:
        raise ValueError(
            f"a tile of {tile_size} pixels is smaller than a patch of {patch_size} pixels. Check `image_size` and `patch_size` "
            "of the vision configuration."
        )
    return tile_size // patch_size


def _unpadded_ranges(height: int, width: int, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stitched rows and columns that un-padding keeps. The order of the float operations is upstream's: it matters."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return (padding, rows - padding), (0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return (0, rows), (padding, columns - padding)
