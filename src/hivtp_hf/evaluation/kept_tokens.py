"""`KeptTokens`: what enters the language model of an image, under a method of the registry or as the base tile alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pruned_features import prune_features
from ..token_layout import TokenLayout
from .tower_pass import SeenImages


class KeptTokens(NamedTuple):
    """What enters the language model of one image.

    Attributes:
        features: (tokens, hidden), in order.
        patches: how many of them show a part of the image.
        newlines: how many are newlines. What is neither is a class token.
    """

    features: Tensor
    patches: int
    newlines: int


@torch.no_grad()
def pruned_tokens(seen: SeenImages, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """What the method of the layouts keeps of every image.

    Args:
        seen: the images.
        layouts: of every image, under one method's settings.

    Raises:
        ValueError: where the method keeps other tokens than its settings say: what is broken must not pass for a bad method.
    """
    kept_of_images = []
    for features, kept, layout in zip(*prune_features(seen.evidence_for(layouts)), layouts, strict=True):
        patches = check_kept_indices(kept, layout)
        # With `exact_count=False` fewer may be kept than there are placeholders, and zeros stand in front. Those take no part.
        kept_of_images.append(KeptTokens(features[len(features) - len(kept) :], patches, layout.num_newlines))
    return kept_of_images


def base_tile_tokens(seen: SeenImages, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """The base tile of every image of LLaVA-NeXT, which stock packs first: no crop, no newline."""
    cells = [layout.grid * layout.grid for layout in layouts]
    return [KeptTokens(features[:number], number, 0) for features, number in zip(seen.features, cells, strict=True)]


def check_kept_indices(kept: Tensor, layout: TokenLayout) -> int:
    """How many patch tokens are kept; a ValueError where the kept positions are not what the layout's settings say.

    Args:
        kept: int64 (n,), positions in the packed sequence.
        layout: of the image.
    """
    cells, wanted = len(layout.cells(kept)), sum(layout.group_totals)
    newlines = len(kept) - cells - layout.num_class_tokens
    fits = cells == wanted if layout.pruning.exact_count else cells <= wanted
    if not fits or newlines != layout.num_newlines or not bool((kept.diff() > 0).all()):
        raise ValueError(
            f"the method {layout.pruning.method!r} keeps {cells} patch tokens and {newlines} newlines, or not in their order; "
            f"{wanted} and {layout.num_newlines} were to be kept, ascending. Its selector is broken."
        )
    return cells
