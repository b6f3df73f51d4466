"""G-Prune's selection: tokens of an image hand their mass along a graph of similar features, and those that gather most stay.

Source: arXiv 2501.02268 (AAAI 2025), section 3.

Reference compatibility: this returns what the authors' released selection returns, token for token (tests/data/gprune.npz).
Language-model positions stay 0 .. L-1, where the released code leaves holes.

It looks at the projected visual features alone. Five products of a vector and a matrix stand for the paper's fifth power of
the matrix: the same numbers at a thousandth of the cost.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, settings_of
from .ranking import check_packed_features, descending_rank, without_autocast

# What one step over several images of a shape may take: of each image, the similarities and their softmax, and two float32
# copies of its features; masks and the stacked features come on top. A single image may take more.
_WORKING_BYTES = 128 * 2**20
# Above so many tokens a graph is never held as a whole: two buffers of it would take more than that.
_MOST_TOKENS_AT_ONCE = 4096


class GPrune(PruningMethod):
    """G-Prune: by the mass that tokens gather on a graph of similar features."""

    name = "gprune"
    rule = "what gathers most mass on a graph of similar features (arXiv 2501.02268)"
    settings = (
        Setting("similarity_threshold", float, 0.5, 0, 1, meaning="cosine similarities below it are no edge"),
        Setting(
            "temperature",
            float,
            0.03,
            0,
            above_minimum=True,
            meaning="divides similarities before the softmax",
            search=(0.003, 1),
        ),
        Setting("iterations", int, 5, 0, 1000, meaning="how often tokens hand their mass to their neighbours", search=(0, 20)),
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

    group = "image"

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.FEATURES}),)

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        return count_gprune(layout, pruning)

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_gprune(evidence.features, evidence.layouts, pruning)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return score_map_gprune(evidence.features, evidence.layouts, pruning)


def count_gprune(layout: TokenLayout, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens of each graph stay: one graph for every part of the layout, such as the base tile and all crops.

    Args:
        layout: of the image.
        pruning: a config of the method "gprune" with a retention ratio, or its settings as a dict. The ratio is taken from
            here, not from the layout.

    Raises:
        ValueError: on another method's config, and a token budget in place of a ratio.
    """
    ratio: Any = settings_of("gprune", pruning).retention_ratio
    first, *others = layout.parts
    # The released code's order of operations: another one may have another floor.
    of_others = [int((ratio * len(part.used_rows)) * len(part.used_columns)) for part in others]
    return int(ratio * sum(layout.valid_per_view[: first.num_views])), *of_others


def select_gprune(
    features: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
    pruning: VisualTokenPruningConfig | Mapping[str, Any],
) -> Tensor:
    """The cells that G-Prune keeps, of all images of a batch.

    An image has a graph for every part of its layout, each with its own count. In LLaVA-NeXT these are the base tile's cells,
    and the un-padded cells of all crops in the raster order of the stitched grid. Newlines and class tokens are in none.

    Args:
        features: of every image the packed stock features (num_stock, hidden), any float dtype, all on one device.
        layouts: of every image its layout. Images that share a layout are scored together, in steps of bounded memory.
        pruning: a config of the method "gprune" with a retention ratio, or its settings as a dict.

    Returns:
        bool (cells of all images,), on the features' device. Each graph keeps as many cells as
        `count_gprune(layout, pruning)` says, whatever the features; equal scores go to the earlier token.

    Raises:
        ValueError: on features that do not fit their layouts, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2501.02268, section 3.
    """
    check_packed_features(features, layouts)
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
    """The scores of all cells, for people to look at. Every graph is scored by itself, as in the selection.

    Args:
        features, layouts, pruning: as for `select_gprune`.

    Returns:
        float32 (cells of all images,) on the CPU, NaN for cells that the stock model does not use.
    """
    maps = []
    for packed, layout in zip(features, layouts, strict=True):
        for part, tokens in enumerate(_tokens_of_parts(packed, layout)):
            maps.append(_as_cells(gprune_scores(tokens.flatten(0, -2)[None], pruning).cpu(), layout, part, math.nan)[0])
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

    Forms two (graphs, tokens, tokens) buffers at a time: the similarities and their softmax. Of more than 4,096 tokens, bands
    of rows are formed one after another, in every round anew.

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
    with torch.no_grad(), without_autocast(features.device):
        # In float16, weak edges would underflow and change the graph.
        features = features.float()
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        directions = features / length.clamp(min=1e-12)
        if features.shape[1] > _MOST_TOKENS_AT_ONCE:
            return _propagated_in_bands(directions, length, pruning)
        transition = _transition(directions, directions, pruning)
        # The number of entries above 0, without a mask: its sum would form an int64 copy, twice as large as the matrix.
        degree = torch.linalg.vector_norm(transition, ord=0, dim=-1)
        mass = length.mT
        for _ in range(pruning.iterations):
            mass = torch.bmm(mass, transition)
        return mass[:, 0], degree


def _propagated_in_bands(directions: Tensor, length: Tensor, pruning: VisualTokenPruningConfig) -> tuple[Tensor, Tensor]:
    """As `propagated_mass`, of graphs too large to be held: bands of rows are made anew in every round."""
    tokens = directions.shape[1]
    # A band lives three times at once: its similarities, their softmax, and that of the band before.
    band = max(1, _WORKING_BYTES // (3 * 4 * tokens * len(directions)))
    mass, degree = length.mT, directions.new_ones(directions.shape[:2])
    for round_ in range(max(1, pruning.iterations)):
        gathered = torch.zeros_like(mass)
        for first in range(0, tokens, band):
            transition = _transition(directions[:, first : first + band], directions, pruning)
            if round_ == 0:
                degree[:, first : first + band] = torch.linalg.vector_norm(transition, ord=0, dim=-1)
            gathered += torch.bmm(mass[:, :, first : first + band], transition)
        mass = gathered if pruning.iterations else mass
    return mass[:, 0], degree


def _transition(rows: Tensor, directions: Tensor, pruning: VisualTokenPruningConfig) -> Tensor:
    """The share of its mass that each token (row) hands to each other (column), for directions of length 1."""
    similarity = torch.bmm(rows, directions.mT)
    # In place: such buffers are the largest of the method by far. A mask of one takes a quarter, and is gone at once.
    similarity.masked_fill_(similarity < pruning.similarity_threshold, 0.0)
    similarity.div_(pruning.temperature)
    similarity.masked_fill_(similarity < 1e-6, -5000.0)
    return similarity.softmax(-1)


def _select_of_layout(features: Sequence[Tensor], layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Tensor:
    """Kept cells of images that share a layout, bool (images, cells)."""
    kept = []
    graphs_of_parts = zip(*(_tokens_of_parts(packed, layout) for packed in features), strict=True)
    for part, (graphs, count) in enumerate(zip(graphs_of_parts, count_gprune(layout, pruning), strict=True)):
        kept.append(_as_cells(_best_tokens(list(graphs), count, pruning), layout, part, False))
    return torch.cat(kept, dim=1)


def _tokens_of_parts(packed: Tensor, layout: TokenLayout) -> list[Tensor]:
    """The features of the cells of every part, (..., hidden) each, as views of those of the packed sequence."""
    tokens, start = [], layout.num_class_tokens
    for number, part in enumerate(layout.parts):
        rows, columns = len(part.used_rows), len(part.used_columns)
        missing = int(layout.skips_first_cell and number == 0)
        of_part = packed[start : start + part.num_tokens - missing]
        if part.newlines == "rows":
            of_part = of_part.unflatten(0, (rows, columns + 1))[:, :columns]
        tokens.append(of_part if part.newlines == "rows" else of_part[: rows * columns - missing])
        start += part.num_tokens - missing
    return tokens


def _as_cells(of_tokens: Tensor, layout: TokenLayout, number: int, elsewhere: Any) -> Tensor:
    """Values of the tokens of a part, (images, tokens), as those of all its cells, (images, cells) in the order of views.

    Padding and views alone lead there, so that no index has to reach the device.

    Args:
        of_tokens: in packed order, without newlines.
        layout: of the images.
        number: which part.
        elsewhere: the value of cells that stock does not use.
    """
    part = layout.parts[number]
    rows, columns = part.used_rows, part.used_columns
    # The first cell is missing where stock drops it as if it were a class token.
    missing = int(layout.skips_first_cell and number == 0)
    grid = torch.nn.functional.pad(of_tokens, (missing, 0), value=elsewhere).unflatten(1, (len(rows), len(columns)))
    right, below = part.across * part.columns - columns.stop, part.down * part.rows - rows.stop
    return part.unstitched(torch.nn.functional.pad(grid, (columns.start, right, rows.start, below), value=elsewhere))


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
