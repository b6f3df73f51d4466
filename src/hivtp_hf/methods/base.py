"""What a pruning method must provide.

A method is one class in one file: subclass `PruningMethod`, add the class to `METHOD_CLASSES` of methods/__init__.py (or call
`hivtp_hf.register_method` from a package of your own), and every family, command, figure and card knows it. A method never sees
a model. It sees evidence, and says which cells stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..pruning.evidence import EncoderFacts, Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.merging import MergedTokens
from ..pruning.settings import Setting, VisualTokenPruningConfig
from ..pruning.stages import layer_of_stage
from .ranking import share_of_views


class PruningMethod(ABC):
    """A way to choose visual tokens. Instances hold no state.

    Attributes:
        name: what `pruning_config.method` says.
        rule: what it keeps, in a line, and where that is from.
        settings: its own, beside those that all methods share.
        colour: of its lines and points in figures.
        citation: BibTeX of the papers that it is from, which model cards cite; empty where there is none.
        default_retention_ratio: what `retention_ratio` reads where no budget is given.
        keeps_everything: whether it prunes nothing, so that a ratio below 1 would be a slip.
        content_dependent_count: whether its published selection keeps a number that depends on the image's content, so that
            `exact_count=False` means something.
        knows_inclusion: whether it says how likely a cell is to be kept, so that `token_weights="inclusion"` means something.
        group: among which cells it chooses. "view": those of one view, so it is given `ViewEvidence`, views of one shape at a
            time, and answers with (views, rows, columns). "image": those of a whole image, so it is given `VisualEvidence`, and
            answers with (cells of all images,).
        counts_newlines: whether its budget is of all tokens of an image as stock packs them, newlines too. `count` then gives
            one number, of tokens; token budgets, layouts and processors follow it.
        merges: whether some tokens that it keeps hold averages of others, so that `merge` says what stays. Of a method that
            reads `Evidence.ENCODED` they are averages of that, and then go through the projector.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    settings: ClassVar[tuple[Setting, ...]] = ()
    colour: ClassVar[str] = "#555555"
    citation: ClassVar[str] = ""
    default_retention_ratio: ClassVar[float | None] = 0.5
    keeps_everything: ClassVar[bool] = False
    content_dependent_count: ClassVar[bool] = False
    knows_inclusion: ClassVar[bool] = False
    group: ClassVar[str] = "view"
    counts_newlines: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def check_settings(self, pruning: VisualTokenPruningConfig) -> None:  # noqa: B027  (most have nothing to add)
        """Refuses settings, each in its range, that contradict each other: a ValueError."""

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        """The kinds of evidence that it needs: sets that would each do, best first. By default it looks at nothing."""
        return (frozenset(),)

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        """The encoder layers, 0-based and ascending, whose attention it reads; none by default.

        Lazy where settings bound it, such as a range: it is asked for before they are held against an encoder's depth.

        Args:
            pruning: the settings.
            encoder: the vision encoder, with the family's own defaults.
        """
        return ()

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        """How many cells are kept of each group of cells among which it chooses, from geometry alone.

        By default a rounded share of every view. `pruning` has the ratio, not `layout`. Where the method `counts_newlines`, one
        number: how many of the `num_offered` tokens of the image.
        """
        return share_of_views(layout, pruning)

    @property
    def ranks(self) -> bool:
        """Whether it says how important each cell is, so that stages inside a language model can follow it."""
        return type(self).importance is not PruningMethod.importance

    def drops_in_stages(self, pruning: VisualTokenPruningConfig) -> bool:
        """Whether it has tokens dropped inside the language model, at some ratio; by default where a setting says so."""
        return any(ratio < 1 for _, ratio in pruning.stages)

    def stages(self, pruning: VisualTokenPruningConfig, num_layers: int) -> Sequence[tuple[int, float]]:
        """Before which decoder layers which share of an image's tokens left goes on: (layer, ratio), ascending.

        By default the setting `stages`. The layers must not depend on the ratio, which may differ from image to image.

        Args:
            pruning: the settings. They may have a token budget in place of a ratio; ratios of stages then say nothing.
            num_layers: of the language model.

        Raises:
            ValueError: for stages that the language model is not deep enough for, or that no ratio fulfils.
        """
        return [(layer_of_stage(layer, num_layers), ratio) for layer, ratio in pruning.stages]

    def rows(self, received: Tensor, prunings: Sequence[VisualTokenPruningConfig]) -> tuple[Tensor, Tensor]:
        """The tokens of an encoder whose attention rows it reads, for methods that read `Evidence.ATTENTION_ROWS`.

        Asked inside the pass, once for every layer read, before queries and keys are gone.

        Args:
            received: the attention that tokens receive from each other, float32 (sequences, tokens), class tokens left out. A
                sequence is a view; a tower that merges cells has several tokens a cell.
            prunings: the settings of every sequence.

        Returns:
            int64 (sequences, n), the tokens, and float32 (sequences, n), the weights by which their rows are summed.

        Raises:
            ValueError: unless the method defines it.
        """
        raise ValueError(f"the method {self.name!r} reads attention rows, but does not say of which tokens; define its `rows`.")

    @abstractmethod
    def select(self, evidence: Any, pruning: VisualTokenPruningConfig) -> Tensor:
        """The cells that stay, bool, as many of each group as `count` says. `group` says evidence and shape."""

    def merge(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Sequence[MergedTokens]:
        """Of every image which tokens stay, and which of them hold averages of which others; for methods that say they merge.

        Asked in place of `select`, always of whole images. The count is the layout's, as without averages. Tokens of the packed
        sequence are meant, newlines too, and what a method leaves out here is dropped.

        Raises:
            ValueError: unless the method defines it.
        """
        raise ValueError(f"the method {self.name!r} says that it merges tokens, but not how; define its `merge`.")

    def importance(self, evidence: Any, pruning: VisualTokenPruningConfig) -> Tensor | None:
        """The scores by which it ranks, float, NaN for cells that have none; None where it does not rank.

        Stages inside a language model drop the lowest of what is kept. Of a method that `counts_newlines` they drop newlines
        too, last of all; there these have an importance of 1, the most.
        """
        return None

    def inclusion(self, evidence: Any, pruning: VisualTokenPruningConfig) -> Tensor | None:
        """The chance of every cell to be kept, float32; None, the default, where that is not known."""
        return None


def check_views(valid: Tensor, **scores: Tensor) -> None:
    """Refuses tensors that are not views of cells: selections are public functions.

    Args:
        valid: must be bool (views, rows, columns).
        **scores: by the name of their argument; must be floating point and of the same shape.

    Raises:
        ValueError: names the argument, what was given and what it must be.
    """
    for name, given in (("valid", valid), *scores.items()):
        if not isinstance(given, Tensor):
            raise ValueError(f"`{name}` is a {type(given).__name__}; it must be a torch.Tensor.")
    if valid.ndim != 3 or 0 in valid.shape[1:]:
        raise ValueError(
            f"`valid` has shape {tuple(valid.shape)}; it must be (views, rows, columns), with at least one cell a view."
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"`valid` is {valid.dtype}; it must be bool.")
    for name, given in scores.items():
        if given.shape != valid.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(given.shape)} and `valid` {tuple(valid.shape)}; both must be (views, rows, "
                "columns)."
            )
        if not given.dtype.is_floating_point:
            raise ValueError(f"`{name}` is {given.dtype}; it must be floating point.")


def settings_of(method: str, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> VisualTokenPruningConfig:
    """The settings of a selection, also given as a dict.

    Raises:
        ValueError: for another method's settings, and for a token budget, which means another ratio for each image.
    """
    pruning = VisualTokenPruningConfig.coerce(pruning)
    if pruning.method != method:
        raise ValueError(f"`pruning` has the method {pruning.method!r}; select_{method} needs {method!r}.")
    if pruning.token_budget is not None:
        raise ValueError(
            f"`pruning` has a `token_budget` ({pruning.token_budget}), whose meaning depends on the image; give a "
            "`retention_ratio`, such as that of `TokenLayout.pruning`."
        )
    return pruning
