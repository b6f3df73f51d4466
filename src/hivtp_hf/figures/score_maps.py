"""`plot_kept_cells`: the kept cells of one image and the scores that chose them, as a matplotlib figure for a paper.

Needs matplotlib.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pruning.layout import TokenLayout
from ..pruning.registry import pruning_method
from .kept_cells import boxes_of_tiles, checked_arguments, draw_tile_borders, draw_tiles, panels_of, size_of_panel
from .plotting import DPI, check_finite, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures are laid out in pixels at their resolution, so that a PNG shows every pixel of a panel as it was drawn. Two panels
# and their margins are then as wide as a page's text.
PANEL_SIDE = 960
_MARGIN, _COLUMN_GAP, _ROW_GAP = 30, 50, 24
_BAR_HEIGHT, _BAR_GAP, _BAR_TEXT_HEIGHT = 32, 20, 100
_NARROWEST_BAR = 420

# In points.
_TITLE_SIZE, _CAPTION_SIZE, _LABEL_SIZE = 9, 8, 7
_LINE_HEIGHT = 1.35

# Received attention is heavy-tailed: a few cells (registers) gather many times the others' share, and a scale that reached up
# to them would show all others in one colour. Its ends are these quantiles; arrows on the bar say where scores lie beyond.
_SCALE_QUANTILES = (0.01, 0.99)
# From this ratio of its ends on, a scale is logarithmic: on a linear one the border between kept and dropped, which ranks
# alone decide, would lie among its lowest colours.
_WIDE_RANGE = 8
_COLOUR_MAP = "viridis"
# How much of a colour comes from the score; the rest is the photograph in grey, squeezed into the middle so that its light
# and shade never pass for a score.
_SCORE_SHARE = 0.72
_DARKEST, _BRIGHTEST = 0.1, 0.9
_TILE_BORDER = (255, 255, 255)


def _note_of_hivtp(pruning: Any) -> str:
    first, number = pruning.importance_start_layer, pruning.importance_num_layers
    if pruning.importance_layers is not None:
        return f"mean of layers {', '.join(map(str, pruning.importance_layers))}"
    if first is None and number is None:
        return "mean of middle layers"
    return f"mean of {number or 3} layers from {'a middle one' if first is None else first} on"


def _note_of_layer(layer: int | None) -> str:
    return "layer of the visual feature" if layer is None else f"layer {layer}"


# How a method's scores are called, and a line about the settings under which they arose. Others have plain words.
_WORDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "hivtp": ("attention received", _note_of_hivtp),
    "hiprune": ("attention received, deep layer", lambda pruning: _note_of_layer(pruning.deep_layer)),
    "cls_attention": ("attention of the class token", lambda pruning: _note_of_layer(pruning.layer)),
    "vflowopt": ("attention of sinks", lambda pruning: "layer of the visual feature"),
    "visionzip": ("rank, dominant tokens first", lambda pruning: f"by attention, {_note_of_layer(pruning.layer)}"),
    "gprune": ("mass gathered per neighbour", lambda pruning: f"after {pruning.iterations} iterations"),
}


def plot_kept_cells(
    image: Image.Image,
    layout: TokenLayout,
    kept_indices: Tensor,
    scores: Tensor | None = None,
    title: str | None = None,
) -> "Figure":
    """Draws which cells of an image are kept, and the scores that chose them, as a figure for a paper.

    Panels of the base tile and, where there are any, of the crops: kept cells show the photograph and everything else fades
    to grey, as `draw_kept_cells` does; below (right of it for an image without crops) every cell has the colour of its score
    over the photograph in grey. Each map of scores has a scale of its own, since scores of base tile and crops are never
    compared with each other. It spans all but the lowest and the highest hundredth of the scores, where an arrow says that
    some lie beyond, and is logarithmic where its ends lie far apart. Cells that un-padding removes have no colour.

    Args:
        image: the image that the processor was given, in any mode.
        layout: the layout of its size, `processor.token_layout(image.height, image.width)`.
        kept_indices: int64 (n,) on any device, positions in the packed sequence: `choice_of_image(...).kept_indices` or
            `model.model.get_image_features(...).kept_indices[i]`.
        scores: floating point (cells,) on any device, view by view, as `choice_of_image(...).scores`; what it
            holds for cells that the stock model does not use is ignored. None leaves the map out.
        title: in place of the method, its ratio and the number of tokens; "" for none.

    Returns:
        A `matplotlib.figure.Figure`, to be saved by `savefig` or drawn by a notebook. The longer side of a panel measures
        `PANEL_SIDE` pixels at `DPI`, which is 3.2 inches.

    Raises:
        ValueError: as `draw_kept_cells`, for scores of another shape or dtype or that are not finite, and where matplotlib
            is missing.
    """
    check_matplotlib()
    kept_indices = checked_arguments(image, layout, kept_indices)
    values = None if scores is None else _checked_scores(scores, layout)
    lines = (_title_of(layout, kept_indices) if title is None else title).splitlines()

    columns, panels = [], panels_of(layout)
    scales = [] if values is None else [_scale(values[tiles.start : tiles.stop]) for _, tiles in panels]
    # All or none, so that maps side by side read alike.
    logarithmic = all(scale.lowest > 0 for scale in scales) and any(scale.is_wide for scale in scales)
    for number, (name, tiles) in enumerate(panels):
        panel, kept, cells = draw_tiles(image, layout, kept_indices, tiles, PANEL_SIDE)
        columns.append([_Panel(f"{name}: {kept} of {cells} cells kept", panel)])
        if values is not None:
            columns[-1].append(_score_panel(image, layout, values, name, tiles, scales[number], logarithmic))
    if len(columns) == 1:  # side by side
        columns = [[panel] for panel in columns[0]]
    return _figure(lines, columns)


class _Scale(NamedTuple):
    """The ends of a scale, and whether scores lie beyond them."""

    lowest: float
    highest: float
    below: bool
    above: bool

    @property
    def is_wide(self) -> bool:
        return self.highest > _WIDE_RANGE * self.lowest


def _scale(views: Sequence[np.ndarray]) -> _Scale:
    """The scale for scores of some views, NaN where there are none."""
    values = np.concatenate([view.ravel() for view in views])
    found = values[~np.isnan(values)]
    if not len(found):  # un-padding leaves nothing of the crops of a very narrow image
        return _Scale(1.0, 1.0, False, False)
    lowest, highest = map(float, np.quantile(found, _SCALE_QUANTILES))
    return _Scale(lowest, highest, bool(found.min() < lowest), bool(found.max() > highest))


class _Panel(NamedTuple):
    """A picture under its caption. `bar` makes the colour bar in an `Axes` of the figure, if there is one."""

    caption: str
    picture: Image.Image
    bar: Callable[["Figure", Any], None] | None = None


def _title_of(layout: TokenLayout, kept_indices: Tensor) -> str:
    pruning, kept = layout.pruning, len(kept_indices)
    words = [pruning.method]
    if pruning.retention_ratio is not None and not pruning_method(pruning.method).keeps_everything:
        words.append(f"retention ratio {pruning.retention_ratio:.3g}")
    newlines = kept - len(layout.cells(kept_indices)) - layout.num_class_tokens
    others = [f"{newlines} newlines"] * (newlines > 0) + ["the class token"] * layout.num_class_tokens
    count = f"{kept} of {layout.num_stock} tokens ({kept / layout.num_stock:.1%}"
    return f"{', '.join(words)}: {count}{', with ' if others else ''}{' and '.join(others)})"


def _checked_scores(scores: Any, layout: TokenLayout) -> list[np.ndarray]:
    """The scores of every view as float64 (rows, columns), NaN where the stock model uses no cell."""
    shape = (layout.num_cells,)
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point or tuple(scores.shape) != shape:
        given = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"`scores` is {given}; it must be a floating-point tensor of shape {shape}, one for each cell of this layout. "
            "Pass `choice_of_image(...).scores` of the same image."
        )
    scores = scores.detach().cpu().double()
    check_finite(scores, layout.valid)
    return [view.numpy() for view in layout.by_view(scores.masked_fill(~layout.valid, math.nan))]


def _score_panel(
    image: Image.Image,
    layout: TokenLayout,
    values: Sequence[np.ndarray],
    name: str,
    tiles: range,
    scale: _Scale,
    logarithmic: bool,
) -> _Panel:
    """The map of scores over some tiles of an image; `values` as `_checked_scores` returns them."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    size = size_of_panel(image, PANEL_SIDE)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)[..., None] / 255
    grey = _DARKEST + (_BRIGHTEST - _DARKEST) * grey

    score_of_pixel = np.full(grey.shape[:2], math.nan)
    cells, boxes = boxes_of_tiles(layout, torch.arange(layout.num_stock), tiles, image.size, size)
    for (tile, row, column), (left, top, right, bottom) in zip(cells.tolist(), boxes.tolist(), strict=True):
        score_of_pixel[top:bottom, left:right] = values[tile][row, column]

    lowest, highest = scale.lowest, scale.highest
    norm = functools.partial(LogNorm if logarithmic else Normalize, lowest, highest)
    colours = matplotlib.colormaps[_COLOUR_MAP]
    painted = _SCORE_SHARE * colours(norm(clip=True)(score_of_pixel))[..., :3] + (1 - _SCORE_SHARE) * grey
    outside = np.isnan(score_of_pixel)
    painted[outside] = 0.75 + 0.25 * np.broadcast_to(grey, painted.shape)[outside]
    picture = Image.fromarray((painted * 255).round().astype(np.uint8))
    draw_tile_borders(picture, boxes, cells[:, 0], _TILE_BORDER)

    # The bar shows colours as they come out over middle grey.
    middle = (_DARKEST + _BRIGHTEST) / 2
    as_painted = ListedColormap(_SCORE_SHARE * colours(np.linspace(0, 1, 256))[:, :3] + (1 - _SCORE_SHARE) * middle)
    caption, note = _WORDS.get(layout.pruning.method, ("scores", lambda pruning: ""))
    ticks = _log_ticks(lowest, highest) if logarithmic else []
    exponent = _exponent(ticks[0] if ticks else max(abs(lowest), abs(highest)))
    label = " ".join(filter(None, [note(layout.pruning), f"($\\times 10^{{{exponent}}}$)" if exponent else ""]))

    def bar(figure: "Figure", axes: Any) -> None:
        drawn = figure.colorbar(
            ScalarMappable(norm(), as_painted),
            cax=axes,
            orientation="horizontal",
            extend={(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[scale.below, scale.above],
            extendfrac=0.03,
            ticks=ticks or MaxNLocator(4),
            format=FuncFormatter(lambda value, position: f"{value / 10.0**exponent:.4g}"),
        )
        drawn.outline.set_linewidth(0.4)
        drawn.ax.minorticks_off()  # a logarithmic bar brings its own
        axes.tick_params(labelsize=_LABEL_SIZE, width=0.4, length=2, pad=1.5)
        axes.set_xlabel(label, fontsize=_LABEL_SIZE, labelpad=1.5)

    return _Panel(f"{name}: {caption}", picture, bar)


def _log_ticks(lowest: float, highest: float) -> list[float]:
    """A handful of round numbers within the ends of a logarithmic scale."""
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if lowest <= step * 10.0**decade <= highest]
        if len(ticks) <= 5:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 5)]


def _exponent(number: float) -> int:
    """The power of ten that ticks like `number` are divided by; 0 where they read well as they are."""
    # Just above a power of ten, so that rounding cannot take a tick below it.
    exponent = math.floor(math.log10(number) + 1e-9) if number > 0 else 0
    return 0 if -2 < exponent < 4 else exponent


def _figure(title: list[str], columns: list[list[_Panel]]) -> "Figure":
    """Panels in columns from the top, all of one size, their captions above and their bars below them."""
    from matplotlib.figure import Figure

    panel_width, panel_height = columns[0][0].picture.size
    captions = [_text_width(panel.caption, _CAPTION_SIZE) for column in columns for panel in column]
    has_bars = any(panel.bar for column in columns for panel in column)
    column_width = max(panel_width, *captions, _NARROWEST_BAR if has_bars else 0)
    content = column_width * len(columns) + _COLUMN_GAP * (len(columns) - 1)
    width = 2 * _MARGIN + max(content, *(_text_width(line, _TITLE_SIZE) for line in title), 0)
    caption_height = _line_height(_CAPTION_SIZE)
    # Panels side by side lie in one row, with room for a bar if any has one.
    rows = [any(column[row].bar for column in columns) for row in range(len(columns[0]))]
    heights = [caption_height + panel_height + (_BAR_GAP + _BAR_HEIGHT + _BAR_TEXT_HEIGHT) * bars for bars in rows]
    title_height = _line_height(_TITLE_SIZE) * len(title)
    height = 2 * _MARGIN + title_height + sum(heights) + _ROW_GAP * (len(rows) - 1) + (_MARGIN // 2) * bool(title)

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def axes(left: int, top: int, across: int, down: int) -> Any:
        return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height))

    # Texts are data, not formulas: a dollar in a title is a dollar.
    top = _MARGIN
    for line in title:
        middle = 1 - (top + _line_height(_TITLE_SIZE) / 2) / height
        figure.text(0.5, middle, line, size=_TITLE_SIZE, ha="center", va="center", parse_math=False)
        top += _line_height(_TITLE_SIZE)
    top += (_MARGIN // 2) * bool(title)
    for row, row_height in enumerate(heights):
        for number, column in enumerate(columns):
            panel = column[row]
            left = (width - content) // 2 + (column_width + _COLUMN_GAP) * number
            x, y = (left + column_width / 2) / width, 1 - (top + caption_height / 2) / height
            figure.text(x, y, panel.caption, size=_CAPTION_SIZE, ha="center", va="center", parse_math=False)
            panel_left, panel_top = left + (column_width - panel_width) // 2, top + caption_height
            picture = axes(panel_left, panel_top, panel_width, panel_height)
            picture.imshow(np.asarray(panel.picture), interpolation="none", aspect="auto")
            picture.set_axis_off()
            if panel.bar is not None:
                bar_width = max(panel_width, _NARROWEST_BAR)
                bar_left, bar_top = left + (column_width - bar_width) // 2, panel_top + panel_height + _BAR_GAP
                panel.bar(figure, axes(bar_left, bar_top, bar_width, _BAR_HEIGHT))
        top += row_height + _ROW_GAP
    return figure


def _line_height(size: float) -> int:
    return math.ceil(size * _LINE_HEIGHT * DPI / 72)


def _text_width(text: str, size: float) -> int:
    """In pixels, without a renderer."""
    from matplotlib.textpath import TextPath

    # An empty path has no extents.
    return math.ceil(TextPath((0, 0), text, size=size).get_extents().width * DPI / 72) if text.strip() else 0
