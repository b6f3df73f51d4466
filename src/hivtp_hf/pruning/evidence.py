"""Evidence: what a method may look at when it chooses, by kind, and for the images of one call."""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

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
    ATTENTION_ROWS = ("what some tokens attend to", "attention layers that can be read")
    KEYS = ("the keys of tokens", "attention layers that can be read")
    PIXELS = ("pixels", "known scale of its pixels")
    FEATURES = ("the visual features", "feature for every cell")
    ENCODED = ("what the vision encoder says of every cell before the projector", "hidden state to read for every cell")

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


class EncoderFacts(NamedTuple):
    """What methods must know of a vision encoder to say which of its layers they read.

    Attributes:
        num_layers: its depth.
        feature_layer: the layer, 0-based, whose output is the visual feature; -1 for what enters the first.
        default_layers: what settings that name layers mean in this family where nothing is given, by their names.
        comparable_layers: the layers whose attention compares cells of a whole image; None for all. In a layer that attends
            within windows, tokens of a small window receive more, whatever they show.
    """

    num_layers: int
    feature_layer: int
    default_layers: Mapping[str, Any] = {}
    comparable_layers: Collection[int] | None = None

    def layer(self, pruning: VisualTokenPruningConfig, setting: str, default: int | None = None) -> int:
        """The layer that a setting means; else the family's own, else `default`, else the visual feature's."""
        chosen = getattr(pruning, setting)
        if chosen is None:
            chosen = self.default_layers.get(setting, default)
        return self.feature_layer if chosen is None else chosen


class CellFeatures:
    """The features of the cells of some views of one shape, brought together for as many views at a time as are asked for.

    Those of all images of a call may be large, and only some methods look at them.

    Args:
        of_views: of every view features (n, hidden), and int64 (cells,), which of these are its cells', -1 for none; None where
            they are its cells' as they stand.
        device: where they are wanted.
    """

    def __init__(self, of_views: Sequence[tuple[Tensor, Tensor | None]], device: torch.device):
        self._of_views = of_views
        self._device = device

    def __len__(self) -> int:
        """How many views there are."""
        return len(self._of_views)

    @property
    def width(self) -> int:
        """How many numbers a feature has; 0 where there is no view."""
        return self._of_views[0][0].shape[-1] if self._of_views else 0

    def of_views(self, first: int, behind: int, cells: slice = slice(None)) -> Tensor:
        """A copy of the features of some cells of some views, (views, cells, hidden), without gradient.

        What cells have that stock does not use means nothing.
        """
        of_views = [
            (features[cells], None) if places is None else (features, places[cells])
            for features, places in self._of_views[first:behind]
        ]
        features, places = of_views[0]
        number = len(features) if places is None else len(places)
        copy = torch.empty(len(of_views), number, self.width, dtype=features.dtype, device=self._device)
        with torch.no_grad():
            for row, (features, places) in zip(copy, of_views, strict=True):
                if places is None:
                    row.copy_(features)
                elif features.device == row.device:
                    torch.index_select(features, 0, places.clamp(min=0).to(row.device), out=row)
                else:
                    row.copy_(features.index_select(0, places.clamp(min=0).to(features.device)))
        return copy


class ViewEvidence(NamedTuple):
    """What is known of views of one shape, of all images of a call, when cells of each view are chosen.

    Attributes:
        valid: bool (views, rows, columns), the cells that the stock model uses.
        totals: of every view how many cells are kept, as the method's `count` says.
        indices: of every view its index in its own image, from 0; in LLaVA 0 is the base tile.
        received: of every layer read the attention that cells receive, float32 (views, rows, columns).
        class_attention: the same of what the class token attends to.
        encoder: the vision encoder.
        attention_rows: the same of what those tokens attend to that the method's `rows` names.
        grey_levels: uint8 (views, rows, columns, pixels of a cell): the mean of red, green and blue, rounded, from 0 to 255;
            None unless pixels are read.
        features: the visual features of their cells.
        encoded: the same of what the encoder says before the projector; None unless it is read.
        keys: of every layer read the keys of cells, heads averaged, float32 (views, rows, columns, size).
    """

    valid: Tensor
    totals: Sequence[int]
    indices: Sequence[int]
    received: Mapping[int, Tensor]
    class_attention: Mapping[int, Tensor]
    encoder: EncoderFacts
    attention_rows: Mapping[int, Tensor] = {}
    grey_levels: Tensor | None = None
    features: CellFeatures = CellFeatures((), torch.device("cpu"))
    encoded: CellFeatures | None = None
    keys: Mapping[int, Tensor] = {}

    def mean_scores(self) -> Tensor:
        """The average of the attention that cells receive, over the layers read: float32 (views, rows, columns)."""
        return mean_of_layers(self.received)


class VisualEvidence(NamedTuple):
    """What is known of some images when their tokens are chosen.

    Attributes:
        layouts: how the tokens of each image lie, all under equal settings.
        features: of every image the packed stock features, (num_stock, hidden).
        received: of every layer read the attention that cells receive, float32 (cells of all images,), in the order of views.
        class_attention: the same of what the class token attends to.
        encoder: the vision encoder.
        attention_rows: the same of what those tokens attend to that the method's `rows` names.
        grey_levels: uint8 (cells of all images, pixels of a cell): the mean of red, green and blue, rounded, from 0 to 255;
            None unless pixels are read.
        encoded: of every view of every image what the encoder says of its cells before the projector, (cells, hidden); None
            unless it is read.
        keys: of every layer read the keys of cells, heads averaged, float32 (cells of all images, size).
        projector: makes visual features (n, hidden) of what the encoder says, (n, width); None unless that is read.
    """

    layouts: Sequence[TokenLayout]
    features: Sequence[Tensor]
    received: Mapping[int, Tensor]
    class_attention: Mapping[int, Tensor]
    encoder: EncoderFacts
    attention_rows: Mapping[int, Tensor] = {}
    grey_levels: Tensor | None = None
    encoded: Sequence[Tensor] | None = None
    keys: Mapping[int, Tensor] = {}
    projector: Callable[[Tensor], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where cells are chosen: where the attention is, else where the features are."""
        kinds = (self.received, self.class_attention, self.attention_rows)
        return next((scores.device for of_kind in kinds for scores in of_kind.values()), self.features[0].device)

    def of_images(self, members: Sequence[int]) -> "VisualEvidence":
        """The evidence of some of the images, by their indices, ascending."""
        if len(members) == len(self.layouts):
            return self
        cells = [layout.num_cells for layout in self.layouts]

        def part(of_cells: Tensor) -> Tensor:
            of_images = of_cells.split(cells)
            return torch.cat([of_images[member] for member in members])

        def parts(scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {layer: part(of_layer) for layer, of_layer in scores.items()}

        return VisualEvidence(
            [self.layouts[member] for member in members],
            [self.features[member] for member in members],
            parts(self.received),
            parts(self.class_attention),
            self.encoder,
            parts(self.attention_rows),
            None if self.grey_levels is None else part(self.grey_levels),
            None if self.encoded is None else [view for member in members for view in self.encoded_of(member)],
            parts(self.keys),
            self.projector,
        )

    def encoded_of(self, image: int) -> Sequence[Tensor]:
        """What the encoder says of the views of one of the images, where it is read: (cells, hidden) each."""
        first = sum(layout.num_views for layout in self.layouts[:image])
        return (self.encoded or ())[first : first + self.layouts[image].num_views]

    def ask(
        self, method: Any, question: Callable[[Any, VisualTokenPruningConfig], Tensor | None], pruning: Any
    ) -> Tensor | None:
        """A method's answer for all cells, (cells of all images,) in the order of views; None where it has none.

        Args:
            method: whose `group` says what it is asked about: views of one shape at a time, or whole images.
            question: one of its `select`, `importance` and `inclusion`.
            pruning: its settings.
        """
        if method.group == "image":
            return question(self, pruning)
        views = [(layout, index) for layout in self.layouts for index in range(layout.num_views)]
        shapes = [layout.view_shapes[index] for layout, index in views]
        answers: list[Any] = [None] * len(views)
        for shape in dict.fromkeys(shapes):
            members = [view for view in range(len(views)) if shapes[view] == shape]
            answer = question(self._of_views(shapes, members, views), pruning)
            if answer is None:
                return None
            for member, of_view in zip(members, answer.flatten(1), strict=True):
                answers[member] = of_view
        return torch.cat(answers)

    def _of_views(
        self, shapes: Sequence[tuple[int, int]], members: Sequence[int], views: Sequence[tuple[TokenLayout, int]]
    ) -> ViewEvidence:
        sizes = [rows * columns for rows, columns in shapes]
        rows, columns = shapes[members[0]]

        def part(of_cells: Tensor) -> Tensor:
            if len(members) < len(shapes):
                split = of_cells.split(sizes)
                of_cells = torch.cat([split[member] for member in members])
            return of_cells.view(-1, rows, columns, *of_cells.shape[1:])

        return ViewEvidence(
            part(torch.cat([layout.valid for layout in self.layouts])).to(self.device),
            [layout.group_totals[index] for layout, index in (views[member] for member in members)],
            [views[member][1] for member in members],
            {layer: part(scores) for layer, scores in self.received.items()},
            {layer: part(scores) for layer, scores in self.class_attention.items()},
            self.encoder,
            {layer: part(scores) for layer, scores in self.attention_rows.items()},
            None if self.grey_levels is None else part(self.grey_levels),
            self._features_of(members),
            None if self.encoded is None else CellFeatures([(self.encoded[member], None) for member in members], self.device),
            {layer: part(keys) for layer, keys in self.keys.items()},
        )

    def _features_of(self, members: Sequence[int]) -> CellFeatures:
        """The visual features of the cells of some views, by their numbers among those of all images."""
        of_views = [
            (features, places.flatten())
            for features, layout in zip(self.features, self.layouts, strict=True)
            for places in layout.by_view(layout.token_of_cell)
        ]
        return CellFeatures([of_views[member] for member in members], self.device)


def mean_of_layers(scores: Mapping[int, Tensor]) -> Tensor:
    """The average of scores of one shape over the layers that they are of."""
    layers = sorted(scores)
    total = torch.zeros_like(scores[layers[0]])
    for layer in layers:
        total = total + scores[layer]
    return total / len(layers)
