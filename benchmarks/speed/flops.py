"""Floating-point operations of a real call, counted while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hivtp_hf.pruning import attention_scores


def count_flops(function: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions in a call; a multiplication and an addition count as two.

    Counted are also two kinds of products that `torch.utils.flop_counter` does not know: attention on CPUs, and our scoring.
    Not counted, here as there, is what is no product: softmax, normalisation, activations, sorting. Causal attention counts
    in full, though implementations skip half of it.

    Args:
        function: what to run; its result is dropped.
    """
    scoring = attention_scores._summed_attention
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {scoring: _scoring_flops, cpu_attention: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        function()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _scoring_flops(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Shapes (tiles, heads, rows, head_dim) and (tiles, heads, tokens, head_dim): one product of queries and keys."""
    tiles, heads, rows, head_dim = query
    return 2 * tiles * heads * rows * key[2] * head_dim
