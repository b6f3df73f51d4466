"""`TokenSums`: what the images and answers of a run came to, as numbers for lmms-eval's file of results."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ..pruning.layout import TokenLayout
from ..pruning.settings import VisualTokenPruningConfig


@dataclass
class TokenSums:
    """Sums over rows.

    Attributes:
        rows: that the model answered; those from a cache are not among them.
        images: of these rows.
        stock_tokens: that the unpruned model would have for the images, newlines included.
        patch_tokens, newline_tokens, class_tokens: that the images have under the settings. With `exact_count=False` the
            first is the most that there can be.
        generated_tokens: of all answers.
        seconds: spent in the model.
    """

    rows: int = 0
    images: int = 0
    stock_tokens: int = 0
    patch_tokens: int = 0
    newline_tokens: int = 0
    class_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def add_image(self, layout: TokenLayout) -> None:
        """Counts an image."""
        self.images += 1
        self.stock_tokens += layout.num_stock
        self.patch_tokens += sum(layout.group_totals)
        self.newline_tokens += layout.num_newlines
        self.class_tokens += layout.num_class_tokens

    def add(self, other: "TokenSums") -> None:
        """Adds the sums of other rows."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def metrics(self) -> dict[str, float]:
        """Rows, images, and the tokens of an image on average, if there was one."""
        of_images: dict[str, float] = {"rows": self.rows, "images": self.images}
        if not self.images:
            return of_images
        means = {
            "stock_tokens": self.stock_tokens,
            "retained_patch_tokens": self.patch_tokens,
            "retained_newline_tokens": self.newline_tokens,
            "retained_class_tokens": self.class_tokens,
        }
        return {**of_images, **{name: total / self.images for name, total in means.items()}}


def summed(all_sums: Iterable[TokenSums]) -> TokenSums:
    """The sums of all processes. Their seconds are added up, as those of one process after another."""
    total = TokenSums()
    for sums in all_sums:
        total.add(sums)
    return total


def settings_as_numbers(pruning: VisualTokenPruningConfig) -> dict[str, Any]:
    """The settings as lmms-eval can store them, which are numbers: words and lists by names of their own, no None."""
    settings = {name: _as_word(value) if isinstance(value, list) else value for name, value in pruning.to_dict().items()}
    words = {f"{name}_{value}": 1 for name, value in settings.items() if isinstance(value, str)}
    return {**words, **{name: value for name, value in settings.items() if not isinstance(value, str | None)}}


def _as_word(values: list[Any]) -> str | None:
    """A list of layers or stages as the command line takes it, such as 7+15 and 8:0.5+16:0.5; None for an empty one."""
    return "+".join(":".join(map(str, value)) if isinstance(value, list) else str(value) for value in values) or None
