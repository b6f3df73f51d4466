"""What a decoder-only language model spends on a prompt, from its configuration alone."""

from collections.abc import Sequence
from typing import Any

import torch


def prefill_flops(text_config: Any, tokens: int | Sequence[int]) -> int:
    """Floating-point operations of one pass over some tokens, a multiplication and an addition counting as two.

    Counted are the matrix products: the four projections and the gated feed-forward network of every layer, attention over
    all pairs of tokens (implementations that skip the masked half do fewer), and the logits of the last token.

    Args:
        text_config: a Llama-like configuration (Llama, Mistral, Qwen2).
        tokens: length of the prompt, or of what each layer sees of it.
    """
    hidden, layers = text_config.hidden_size, text_config.num_hidden_layers
    query, key_value = _projected_widths(text_config)
    projections = hidden * (query + 2 * key_value) + query * hidden
    feed_forward = 3 * hidden * text_config.intermediate_size
    lengths = [tokens] * layers if isinstance(tokens, int) else tokens
    of_layers = sum(length * (projections + feed_forward + 2 * length * query) for length in lengths)
    return 2 * (of_layers + hidden * text_config.vocab_size)


def kv_cache_bytes(text_config: Any, tokens: int | Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values of some tokens, over all layers.

    Args:
        text_config: as for `prefill_flops`.
        tokens: positions in the cache, of every layer or of each.
        dtype: of the cache.
    """
    _, key_value = _projected_widths(text_config)
    positions = text_config.num_hidden_layers * tokens if isinstance(tokens, int) else sum(tokens)
    return 2 * key_value * positions * dtype.itemsize


def _projected_widths(text_config: Any) -> tuple[int, int]:
    """Width of all queries, and of all keys."""
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    key_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return heads * head_width, key_heads * head_width
