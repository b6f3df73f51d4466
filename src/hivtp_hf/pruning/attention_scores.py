"""Queries and keys of one attention layer, reduced to the attention that tokens receive, what some attend to, or mean keys.

In chunks of bounded memory: the maps of one LLaVA-NeXT image and layer alone would take 100 MB.

Source: HIVTP, arXiv 2509.23663, section 3.1: the mean over heads and over all query rows.
"""

import uuid
from typing import Any

import torch
from torch import Tensor

# One chunk of attention logits. Small on a CPU, where a chunk that stays in cache is several times faster; larger elsewhere,
# where launches count. A chunk lives about three times (logits, their softmax, converted queries): below 256 MiB.
_CPU_CHUNK_BYTES = 2 * 2**20
_DEVICE_CHUNK_BYTES = 64 * 2**20


def received_attention(query: Tensor, key: Tensor, scaling: float, num_heads: int) -> Tensor:
    """The mean attention that every token receives, over all heads and all query rows.

    Args:
        query: (sequences, heads, rows, head_dim) in any float dtype: all tokens, or those whose attention is asked for.
        key: (sequences, heads, tokens, head_dim).
        scaling: factor on the logits.
        num_heads: heads of the layer. Where `query` holds fewer, heads are sharded over the ranks of the default process
            group, and all of them get the average over all.

    Returns:
        float32 (sequences, tokens), without gradient. Every row sums to 1.

    Raises:
        ValueError: if heads are missing and the process group does not account for them.
    """
    with torch.no_grad():
        summed = _summed_attention(query.detach(), key.detach(), scaling)
        return _over_all_heads(summed, query.shape[1], num_heads) / (num_heads * query.shape[2])


def attention_of_rows(query: Tensor, key: Tensor, scaling: float, num_heads: int, rows: Tensor, weights: Tensor) -> Tensor:
    """What some tokens attend to, as a weighted sum of their attention rows, each the mean over all heads.

    Args:
        query, key, scaling, num_heads: as for `received_attention`, `query` of all tokens.
        rows: int64 (sequences, n), of every sequence the tokens whose rows are wanted.
        weights: float32 (sequences, n), by which they are summed.

    Returns:
        float32 (sequences, tokens), without gradient.

    Raises:
        ValueError: as `received_attention`.
    """
    with torch.no_grad():
        summed = _summed_rows(query.detach(), key.detach(), scaling, rows, weights)
        return _over_all_heads(summed, query.shape[1], num_heads) / num_heads


def mean_keys(key: Tensor, num_heads: int) -> Tensor:
    """The keys of tokens, averaged over all heads.

    Args:
        key: (sequences, heads, tokens, head_dim) in any float dtype.
        num_heads: heads of the layer, as for `received_attention`.

    Returns:
        float32 (sequences, tokens, head_dim), without gradient.

    Raises:
        ValueError: as `received_attention`.
    """
    with torch.no_grad():
        summed = torch.zeros_like(key[:, 0], dtype=torch.float32)
        for of_head in key.detach().unbind(1):  # one by one, as a sum in float32 would first convert all of them
            summed = summed + of_head
        return _over_all_heads(summed, key.shape[1], num_heads) / num_heads


def _over_all_heads(summed: Tensor, heads: int, num_heads: int) -> Tensor:
    """Sums over this rank's heads as those over all heads."""
    if heads != num_heads:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if distributed else 1
        if heads * world_size != num_heads:
            raise ValueError(
                f"a scored layer shows {heads} of its {num_heads} heads on {world_size} ranks. Shard the heads evenly "
                "over the default process group, or not at all."
            )
        torch.distributed.all_reduce(summed)
    return summed


def _summed_in_chunks(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention summed over heads and query rows, float32 (sequences, tokens), in chunks of bounded memory."""
    return _rows_in_chunks(query, key, scaling, None, None)


def _rows_in_chunks(query: Tensor, key: Tensor, scaling: float, wanted: Tensor | None, weights: Tensor | None) -> Tensor:
    """The same of some rows of every sequence, (sequences, n), by their weights; of all rows, alike, where these are None."""
    sequences, heads, num_rows, size = query.shape
    num_rows = num_rows if wanted is None else wanted.shape[1]
    tokens = key.shape[2]
    chunk_bytes = _CPU_CHUNK_BYTES if query.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    rows = min(num_rows, max(1, chunk_bytes // (4 * tokens)))
    maps = max(1, chunk_bytes // (4 * tokens * rows))
    at_once, heads_at_once = max(1, maps // heads), min(heads, maps)
    summed = torch.zeros(sequences, tokens, dtype=torch.float32, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for first in range(0, sequences, at_once):
            for head in range(0, heads, heads_at_once):
                at = (slice(first, first + at_once), slice(head, head + heads_at_once))
                keys = key[at].float().transpose(-1, -2)
                for row in range(0, num_rows, rows):
                    if wanted is None or weights is None:
                        logits = (query[at][:, :, row : row + rows].float() * scaling) @ keys
                        summed[at[0]] += logits.softmax(-1).sum(dim=(1, 2))
                        continue
                    of_chunk = (at[0], slice(row, row + rows))
                    places = wanted[of_chunk][:, None, :, None].expand(-1, keys.shape[1], -1, size)
                    attention = ((query[at].gather(2, places).float() * scaling) @ keys).softmax(-1)
                    summed[at[0]] += attention.mul_(weights[of_chunk][:, None, :, None]).sum(dim=(1, 2))
    return summed


def _empty_sums(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    """What `_summed_in_chunks` and `_rows_in_chunks` return, without its values: all that compilers want to know of it."""
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


# Operators of their own, so that compilers take the loop over chunks as one node. Unrolled, it would be traced anew for
# every number of sequences. Registered piece by piece: `torch.library.custom_op` looks through all loaded modules for the line
# that calls it, which is most of what importing this package would take.
_library = torch.library.Library(f"hivtp_{uuid.uuid4().hex}", "DEF")
for _operator, _arguments, _in_chunks in (
    ("summed_attention", "Tensor query, Tensor key, float scaling", _summed_in_chunks),
    ("summed_rows", "Tensor query, Tensor key, float scaling, Tensor rows, Tensor weights", _rows_in_chunks),
):
    _library.define(f"{_operator}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_operator, _in_chunks, "CompositeExplicitAutograd")
    _library.impl(_operator, _empty_sums, "Meta")
_summed_attention = getattr(torch.ops, _library.ns).summed_attention
_summed_rows = getattr(torch.ops, _library.ns).summed_rows
