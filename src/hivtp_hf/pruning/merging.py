"""Averages of tokens: what a method that recycles dropped tokens says of one image, and how it reaches what tokens carry.

A method says which tokens go into which average, and with what weights. Whatever a token carries, its feature or a row of
another stream, is averaged alike. All shapes follow from geometry and settings, so that nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers of tokens that are held at once in float32.
_AVERAGED_BYTES = 16 * 2**20


class MergedTokens(NamedTuple):
    """The tokens that stay of one image, some of which hold an average.

    Attributes:
        kept_indices: int64 (n,), their positions in the packed sequence, ascending.
        source: int64 (n,), of each the average that it holds; the number of averages where it holds its own feature.
        members: int64 (m,), packed positions of what is averaged, one average after the other.
        weights: float32 (m,), by which the members are summed; 0 where there is no member.
        starts: int64 (averages + 1,), where the members of each average begin, and where the last one's end. What follows
            there belongs to no average.
    """

    kept_indices: Tensor
    source: Tensor
    members: Tensor
    weights: Tensor
    starts: Tensor

    @property
    def num_averages(self) -> int:
        """How many averages there may be; some may be held by no token."""
        return len(self.starts) - 1

    @property
    def is_average(self) -> Tensor:
        """Which of the tokens that stay hold an average: bool (n,)."""
        return self.source < self.num_averages


def averages_of(tokens: Tensor, merged: MergedTokens) -> Tensor:
    """The averages of one image, of whatever its tokens carry: float32 (averages, ...), in steps of bounded memory.

    Members are summed one after the other, so that the result depends on nothing else in a batch.

    Args:
        tokens: (num_stock, ...), any float dtype.
        merged: which of them are averaged.
    """
    flat = tokens.flatten(1)
    columns = max(1, _AVERAGED_BYTES // (4 * max(1, len(flat))))
    members, weights, starts = (of.to(tokens.device) for of in (merged.members, merged.weights, merged.starts))
    sums = [
        # What belongs to no average makes a last sum, so that its numbers, which need not be finite, reach no other.
        torch.nn.functional.embedding_bag(members, part.float().contiguous(), starts, mode="sum", per_sample_weights=weights)[
            :-1
        ]
        for part in flat.split(columns, dim=1)
    ]
    return torch.cat(sums, dim=1).view(-1, *tokens.shape[1:])


def with_averages(
    stream: Sequence[Any],
    kept: Sequence[Any],
    merged: Sequence[MergedTokens | None],
    averages: Sequence[Tensor | None] | None = None,
) -> list[Any]:
    """Puts averages into what is kept of a stream.

    Args:
        stream: of every image (num_stock, ...), or a list of such streams.
        kept: of every image (num_retained, ...) as `cut` takes it from the stream, or a list of such streams. Rows of zeros may
            stand in front.
        merged: of every image what is averaged, or None.
        averages: of every image the averages, (averages, ...), where these are not those of the stream's own rows.

    Returns:
        As `kept`: the same rows, bit for bit, where no average is held.
    """
    if not all(isinstance(of_image, Tensor) for of_image in stream):
        return [with_averages(one, kept_one, merged) for one, kept_one in zip(stream, kept, strict=True)]
    return [
        rows
        if of_image is None or not of_image.num_averages
        else _with_averages_of_image(rows, of_image, averages_of(tokens, of_image) if given is None else given)
        for tokens, rows, of_image, given in zip(stream, kept, merged, averages or [None] * len(kept), strict=True)
    ]


def _with_averages_of_image(rows: Tensor, merged: MergedTokens, averages: Tensor) -> Tensor:
    averages = averages.to(rows)
    source, is_average = merged.source.to(rows.device), merged.is_average.to(rows.device)
    surplus = len(rows) - len(source)  # zeros in front, in place of tokens that an inexact count lacks
    source, is_average = torch.nn.functional.pad(source, (surplus, 0)), torch.nn.functional.pad(is_average, (surplus, 0))
    held = averages.index_select(0, source.clamp(max=len(averages) - 1))
    return torch.where(is_average.view(-1, *[1] * (rows.ndim - 1)), held, rows)
