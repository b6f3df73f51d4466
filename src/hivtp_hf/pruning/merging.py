"""Averages of tokens: what a method that recycles dropped tokens says of one image, and how it reaches what tokens carry.

A method says which tokens go into which average, and with what weights. Whatever a token carries, its feature or a row of
another stream, is averaged alike. All shapes follow from geometry and settings, so that nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Members of averages that are gathered at once, in float32.
_GATHERED_BYTES = 16 * 2**20


class MergedTokens(NamedTuple):
    """The tokens that stay of one image, some of which hold an average.

    Attributes:
        kept_indices: int64 (n,), their positions in the packed sequence, ascending.
        source: int64 (n,), of each the average that it holds; the number of averages where it holds its own feature.
        members: int64 (averages, most members), packed positions of what is averaged.
        weights: float32 (averages, most members), of sum 1 in rows that are held; 0 where there is no member.
    """

    kept_indices: Tensor
    source: Tensor
    members: Tensor
    weights: Tensor

    @property
    def is_average(self) -> Tensor:
        """Which of the tokens that stay hold an average: bool (n,)."""
        return self.source < len(self.members)


def with_averages(stream: Sequence[Any], kept: Sequence[Any], merged: Sequence[MergedTokens | None]) -> list[Any]:
    """Puts averages into what is kept of a stream.

    Args:
        stream: of every image (num_stock, ...), or a list of such streams.
        kept: of every image (num_retained, ...) as `cut` takes it from the stream, or a list of such streams. Rows of zeros may
            stand in front.
        merged: of every image what is averaged, or None.

    Returns:
        As `kept`: the same rows, bit for bit, where no average is held.
    """
    if not all(isinstance(of_image, Tensor) for of_image in stream):
        return [with_averages(one, kept_one, merged) for one, kept_one in zip(stream, kept, strict=True)]
    return [
        rows if of_image is None or not len(of_image.members) else _with_averages_of_image(tokens, rows, of_image)
        for tokens, rows, of_image in zip(stream, kept, merged, strict=True)
    ]


def _with_averages_of_image(tokens: Tensor, rows: Tensor, merged: MergedTokens) -> Tensor:
    averages = _averages(tokens, merged.members.to(tokens.device), merged.weights.to(tokens.device)).to(rows.dtype)
    source, is_average = merged.source.to(rows.device), merged.is_average.to(rows.device)
    surplus = len(rows) - len(source)  # zeros in front, in place of tokens that an inexact count lacks
    source, is_average = torch.nn.functional.pad(source, (surplus, 0)), torch.nn.functional.pad(is_average, (surplus, 0))
    held = averages.index_select(0, source.clamp(max=len(averages) - 1))
    return torch.where(is_average.view(-1, *[1] * (rows.ndim - 1)), held, rows)


def _averages(tokens: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of tokens, float32 (averages, ...), in steps of bounded memory and one order."""
    flat = tokens.flatten(1)
    at_once = max(1, _GATHERED_BYTES // (4 * max(1, flat.shape[1])))
    columns = min(members.shape[1], at_once)
    rows = max(1, at_once // max(1, columns))
    sums = []
    for first in range(0, len(members), rows):
        total: Any = 0.0
        for column in range(0, members.shape[1], columns):
            at = (slice(first, first + rows), slice(column, column + columns))
            gathered = flat[members[at].flatten()].float().unflatten(0, members[at].shape)
            # No product of matrices, which autocast would take to another precision.
            total = total + (gathered * weights[at][..., None]).sum(1)
        sums.append(total)
    return torch.cat(sums).view(-1, *tokens.shape[1:])
