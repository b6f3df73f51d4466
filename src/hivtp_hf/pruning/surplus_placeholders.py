"""Placeholders without a token behind them: what `exact_count=False` needs, so that they have no effect.

The published selection keeps a number of tokens that depends on the image's content. The processor has written placeholders
for the exact count by then, so some are left over. They come first among an image's placeholders, since the last one must
be a kept token: where a prompt ends in an image, the next token is read off there. They hold zeros, are masked out of
attention, and positions run as if they were not there.

A cache remembers which of its columns are surplus, because later calls see neither the image nor its placeholders. The mark
lives on the cache object: one conversation, one cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CACHE_ATTRIBUTE = "hivtp_surplus"


def surplus_of_images(is_placeholder: Tensor, written: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Which placeholders are left over.

    Args:
        is_placeholder: bool (batch, sequence), with `sum(written)` placeholders, images in order row by row.
        written: placeholders of each image.
        kept: tokens kept of each image, at most as many.

    Returns:
        bool (batch, sequence), the first `written[i] - kept[i]` placeholders of each image.
    """
    left_over = [torch.arange(number) < number - tokens for number, tokens in zip(written, kept, strict=True)]
    surplus = torch.zeros_like(is_placeholder)
    if left_over:
        surplus[is_placeholder] = torch.cat(left_over).to(surplus.device)
    return surplus


def surplus_of_features(is_placeholder: Tensor, encoded: Any) -> Tensor:
    """`surplus_of_images` for the output of `get_image_features`; nothing is surplus where it says nothing of that."""
    kept_indices = getattr(encoded, "kept_indices", None)
    if kept_indices is None or len(kept_indices) != len(encoded.pooler_output):
        return torch.zeros_like(is_placeholder)
    written = [len(features) for features in encoded.pooler_output]
    return surplus_of_images(is_placeholder, written, [len(kept) for kept in kept_indices])


def check_cached_placeholders(is_placeholder: Tensor, cache: Any) -> None:
    """Refuses a cache that holds placeholders, but not which of them are surplus.

    Args:
        is_placeholder: bool (batch, cached length), of the ids that the cache was filled with.
        cache: the cache, or None.

    Raises:
        ValueError: if placeholders without a token can no longer be told from others.
    """
    if surplus_in_cache(cache) is None and bool(is_placeholder.any()):
        raise ValueError(
            f"the cache holds {int(is_placeholder.sum())} image placeholders, but not which of them have no token "
            "behind them (`exact_count=False`). Continue on the cache object that this model filled, without converting it, "
            "or start anew without a cache."
        )


def surplus_in_cache(cache: Any) -> Tensor | None:
    """The surplus columns of what a cache holds, bool (batch, cached length), or None if none are known."""
    surplus = getattr(cache, _CACHE_ATTRIBUTE, None)
    length = 0 if cache is None else cached_length(cache)
    # A cache may have been cropped or emptied since.
    return None if surplus is None or length == 0 else surplus[:, :length]


def remember_surplus(cache: Any, surplus: Tensor) -> None:
    """Marks the surplus columns of a cache: bool (rows, length), `rows` dividing the cache's own number of rows."""
    if cache is not None:
        setattr(cache, _CACHE_ATTRIBUTE, surplus)


def cached_length(cache: Any) -> int:
    """The number of positions that a cache holds."""
    return int(cache.get_seq_length())


def with_cached_surplus(surplus: Tensor, cache: Any) -> Tensor:
    """`surplus` of the new positions (batch, new), preceded by that of the cached ones: (batch, cached + new)."""
    if cache is None or cached_length(cache) == 0:
        return surplus
    before = surplus_in_cache(cache)
    if before is None:
        before = surplus.new_zeros(surplus.shape[0], cached_length(cache))
    elif before.shape[0] != surplus.shape[0]:
        before = before.repeat_interleave(surplus.shape[0] // before.shape[0], dim=0)
    # A cache that was filled further by a call that knew no surplus: its newer columns have none.
    before = torch.nn.functional.pad(before, (0, cached_length(cache) - before.shape[1]))
    return torch.cat((before, surplus), dim=1)


def positions_of(attention_mask: Tensor, number: int) -> Tensor:
    """Positions of the last `number` columns, int64 (batch, number), counting attended columns alone."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -number:]


def move_labels(labels: Tensor, surplus: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels under which surplus placeholders neither predict nor are predicted.

    The token before a run of surplus placeholders must predict the kept one behind the run. Losses shift by one position,
    so that label moves to the run's first place, and the rest is ignored.

    Args:
        labels, surplus: (batch, sequence).
    """
    before = torch.nn.functional.pad(surplus, (1, 0))[:, :-1]
    behind_run = before & ~surplus
    first_of_run = surplus & ~before
    moved = labels.masked_fill(surplus | behind_run, ignore_index)
    moved[first_of_run] = labels[behind_run]  # runs are in the same order in both, and never end a row
    return moved


def check_sliding_window(text_config: Any, length: int) -> None:
    """Refuses a sliding window shorter than the sequence: it would count surplus positions and shut out real ones.

    Args:
        text_config: the language model's configuration.
        length: cached and new positions, surplus included.

    Raises:
        ValueError: if a token could no longer see all that it would see without the surplus.
    """
    window = getattr(text_config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"the sequence has {length} positions, and the language model's sliding window {window}. With `exact_count=False` "
            "the window would also count placeholders that hold no token. Use `exact_count=True`, or a shorter sequence."
        )
