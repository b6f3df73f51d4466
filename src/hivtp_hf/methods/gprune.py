"""G-Prune's selection: tokens of an image hand their mass along a graph of similar features, and those that gather most stay.

Source: arXiv 2501.02268 (AAAI 2025), section 3.

Reference compatibility: this returns what the authors' released selection returns, token for token (tests/data/gprune.npz).
Language-model positions stay 0 .. L-1, where the released code leaves holes.

It looks at the projected visual features alone. Five products of a vector and a matrix stand for the paper's fifth power of
the matrix: the same numbers at a thousandth of the cost.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, settings_of
from .ranking import descending_rank

# What one step over several images of a shape may take: of each image, the similarities and their softmax, and two float32
# copies of its features; masks and the stacked features come on top. A single image may take more.
_WORKING_BYTES = 128 * 2**20


class GPrune(PruningMethod):
    """G-Prune: by the mass that tokens gather on a graph of similar features."""

    name = "gprune"
    rule = "what gathers most mass on a graph of similar features (arXiv 2501.02268)"
    settings = (
        Setting("similarity_threshold", float, 0.5, 0, 1, meaning="cosine similarities below it are no edge"),
        Setting("temperature", float, 0.03, 0, above_minimum=True, meaning="divides similarities before the softmax"),
        Setting("iterations", int, 5, 0, 1000, meaning="how often tokens hand their mass to their neighbours"),
    )
    colour = "#E69F00"
    citation = r"""
@misc{jiang2025gprune,
  title = {What Kind of Visual Tokens Do We Need? {Training-free} Visual Token Pruning for Multi-modal Large Language Models
           from the Perspective of Graph},
  author = {Jiang, Yutao and Wu, Qiong and Lin, Wenhao and Yu, Wei and Zhou, Yiyi},
  year = {2025},
  eprint = {2501.02268},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2501.02268},
  note = {AAAI 2025},
}
"""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.FEATURES}),)

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        return count_gprune(layout, pruning)

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_gprune(evidence.features, evidence.layouts, pruning)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return score_map_gprune(evidence.features, evidence.layouts, pruning)


def count_gprune(layout: TokenLayout, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens of each graph stay: of the base tile, and of all crops together where an image has crops.

    Args:
        layout: of the image.
        pruning: a config of the method "gprune" with a retention ratio, or its settings as a dict. The ratio is taken from
            here, not from the layout.

    Raises:
        ValueError: on another method's config, and a token budget in place of a ratio.
    """
    ratio: Any = settings_of("gprune", pruning).retention_ratio
    base = int(ratio * layout.valid_per_tile[0])
    if layout.num_tiles == 1:
        return (base,)
    rows, columns = _crop_shape(layout)
    # The released code's order of operations: another one may have another floor.
    return base, int((ratio * rows) * columns)


def select_gprune(
    features: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
    pruning: VisualTokenPruningConfig | Mapping[str, Any],
) -> Tensor:
    """The cells that G-Prune keeps, of all images of a batch.

    An image has two graphs, each with its own count: the base tile's cells, and the un-padded cells of all crops in the
    raster order of the stitched grid. Newlines and class tokens are in none.

    Args:
        features: of every image the packed stock features (num_stock, hidden), any float dtype, all on one device.
        layouts: of every image its layout. Images that share a layout are scored together, in steps of bounded memory.
        pruning: a config of the method "gprune" with a retention ratio, or its settings as a dict.

    Returns:
        bool (tiles of all images, grid, grid), on the features' device. Each graph keeps as many cells as
        `count_gprune(layout, pruning)` says, whatever the features; equal scores go to the earlier token.

    Raises:
        ValueError: on features that do not fit their layouts, layouts of several grids, another method's config, and a token
            budget in place of a ratio.

    Source: arXiv 2501.02268, section 3.
    """
    _check_images(features, layouts)
    pruning = settings_of("gprune", pruning)
    images_of_layout: dict[TokenLayout, list[int]] = {}
    for image, layout in enumerate(layouts):
        images_of_layout.setdefault(layout, []).append(image)
    kept: dict[int, Tensor] = {}
    for layout, images in images_of_layout.items():
        kept.update(zip(images, _select_of_layout([features[image] for image in images], layout, pruning), strict=True))
    return torch.cat([kept[image] for image in range(len(layouts))])


def score_map_gprune(
    features: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
    pruning: VisualTokenPruningConfig | Mapping[str, Any],
) -> Tensor:
    """The scores of all cells, for people to look at. Base tile and crops are scored apart, as in the selection.

    Args:
        features, layouts, pruning: as for `select_gprune`.

    Returns:
        float32 (tiles of all images, grid, grid) on the CPU, NaN for cells that the stock model does not use.
    """
    maps = []
    for packed, layout in zip(features, layouts, strict=True):
        positions = layout.cell_positions
        tile, row, column = layout.cells(positions).unbind(1)
        of_image = torch.full(layout.valid.shape, math.nan, device="cpu")
        for of_graph in (tile == 0, tile > 0):
            if of_graph.any():
                found = gprune_scores(packed[positions[of_graph].to(packed.device)][None], pruning)[0]
                of_image[tile[of_graph], row[of_graph], column[of_graph]] = found.cpu()
        maps.append(of_image)
    return torch.cat(maps)


def gprune_scores(features: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> Tensor:
    """The score of every token: the mass that it gathers, divided by its number of neighbours.

    Args:
        features: (graphs, tokens, hidden), any float dtype; computed in float32, under autocast too.
        pruning: a config of the method "gprune", or its settings as a dict.

    Returns:
        float32 (graphs, tokens), without gradient.

    Raises:
        ValueError: on a shape or dtype that does not fit, and another method's config.

    Source: arXiv 2501.02268, section 3.
    """
    mass, degree = propagated_mass(features, pruning)
    return mass / degree


def propagated_mass(features: Tensor, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The two parts of `gprune_scores`, of the same arguments.

    Forms two (graphs, tokens, tokens) buffers at a time: the similarities and their softmax.

    Returns:
        mass: float32 (graphs, tokens), what each token has after `iterations` rounds that begin with the features' lengths.
        degree: float32 (graphs, tokens), how many tokens each one hands mass to, itself included; whole numbers.
    """
    if features.ndim != 3 or not features.dtype.is_floating_point:
        raise ValueError(
            f"`features` is {features.dtype} of shape {tuple(features.shape)}; it must be floating point of shape "
            "(graphs, tokens, hidden)."
        )
    pruning = settings_of("gprune", pruning)
    with torch.no_grad(), _without_autocast(features.device):
        # In float16, weak edges would underflow and change the graph.
        features = features.float()
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        transition = _transition(features / length.clamp(min=1e-12), pruning)
        # The number of entries above 0, without a mask: its sum would form an int64 copy, twice as large as the matrix.
        degree = torch.linalg.vector_norm(transition, ord=0, dim=-1)
        mass = length.mT
        for _ in range(pruning.iterations):
            mass = torch.bmm(mass, transition)
        return mass[:, 0], degree


def _transition(directions: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """The share of its mass that each token (row) hands to each other (column), for `directions` of length 1."""
    similarity = torch.bmm(directions, directions.mT)
    # In place: such buffers are the largest of the method by far. A mask of one takes a quarter, and is gone at once.
    similarity.masked_fill_(similarity < pruning.similarity_threshold, 0.0)
    similarity.div_(pruning.temperature)
    similarity.masked_fill_(similarity < 1e-6, -5000.0)
    return similarity.softmax(-1)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)  # not everywhere, and refused there even to switch it off
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def _select_of_layout(features: Sequence[Tensor], layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Tensor:
    """Kept cells of images that share a layout, bool (images, tiles, grid, grid).

    Slices and views alone lead from packed positions to cells and back, so no index has to reach the device.
    """
    grid = layout.grid
    counts = count_gprune(layout, pruning)
    start = layout.num_class_tokens
    stop = start + layout.valid_per_tile[0]
    base = _best_tokens([packed[start:stop] for packed in features], counts[0], pruning)
    # The base tile lacks its first cell where stock drops that as if it were a class token.
    kept = torch.nn.functional.pad(base, (grid * grid - base.shape[1], 0)).view(-1, 1, grid, grid)
    if layout.num_tiles == 1:
        return kept
    rows, columns = _crop_shape(layout)
    without_newlines = [packed[stop:].unflatten(0, (rows, columns + 1))[:, :columns] for packed in features]
    unpadded = _best_tokens(without_newlines, counts[1], pruning).unflatten(1, (rows, columns))
    (top, bottom), (left, right) = layout.row_range, layout.column_range
    padding = (left, layout.tile_columns * grid - right, top, layout.tile_rows * grid - bottom)
    stitched = torch.nn.functional.pad(unpadded, padding)
    crops = stitched.view(-1, layout.tile_rows, grid, layout.tile_columns, grid).transpose(2, 3)
    return torch.cat((kept, crops.reshape(len(features), -1, grid, grid)), dim=1)


def _best_tokens(graphs: list[Tensor], count: int, pruning: VisualTokenPruningConfig) -> Tensor:
    """The `count` best tokens of each graph, bool (graphs, tokens), for graphs of one shape (..., hidden)."""
    tokens, hidden = graphs[0].shape[:-1].numel(), graphs[0].shape[-1]
    if count in (0, tokens):
        return graphs[0].new_full((len(graphs), tokens), count > 0, dtype=torch.bool)
    at_once = max(1, _WORKING_BYTES // (2 * 4 * tokens * (tokens + hidden)))
    ranks = [
        descending_rank(gprune_scores(torch.stack(graphs[first : first + at_once]).flatten(1, -2), pruning))
        for first in range(0, len(graphs), at_once)
    ]
    return torch.cat(ranks) < count


def _crop_shape(layout: TokenLayout) -> tuple[int, int]:
    """Rows and columns of the stitched grid that un-padding keeps."""
    return layout.row_range[1] - layout.row_range[0], layout.column_range[1] - layout.column_range[0]


def _check_images(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> None:
    if not layouts or len(features) != len(layouts):
        raise ValueError(
            f"`features` has {len(features)} images and `layouts` {len(layouts)}; there must be one layout for every image, "
            "and at least one image."
        )
    grids = sorted({layout.grid for layout in layouts})
    if len(grids) > 1:
        raise ValueError(f"`layouts` has tiles of {' and '.join(map(str, grids))} cells a side; they must be of one grid.")
    for image, (packed, layout) in enumerate(zip(features, layouts, strict=True)):
        if packed.ndim != 2 or packed.shape[0] != layout.num_stock or not packed.dtype.is_floating_point:
            raise ValueError(
                f"`features[{image}]` is {packed.dtype} of shape {tuple(packed.shape)}; its layout needs floating point of "
                f"shape ({layout.num_stock}, hidden)."
            )
