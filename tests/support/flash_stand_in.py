"""Flash attention on a CPU: transformers' own code around its kernels, which unpads and looks for packed sequences, and plain
kernels that take what the real ones take and nothing else.
"""

import functools
from collections import defaultdict
from unittest import mock

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

FLASH = "flash_attention_stand_in_of_language_models"
# The widths of heads that kernels were called with, and whether several sequences came in one row.
calls = []


def attend(query, key, value, softmax_scale, causal, is_packed=False):
    """Queries (batch, queries, heads, width) at the end of the keys (batch, keys, key heads, width); sums in float32."""
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] in range(8, 257, 8)
    assert softmax_scale is not None
    calls.append((query.shape[-1], is_packed))
    groups = query.shape[2] // key.shape[2]
    query, key, value = (
        tensor.transpose(1, 2).float()
        for tensor in (query, key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2))
    )
    logits = query @ key.mT * softmax_scale
    if causal:
        is_behind = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
        logits = logits.masked_fill(is_behind, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


def fixed(query, key, value, softmax_scale, causal, dropout_p=0.0):
    return attend(query, key, value, softmax_scale, causal).to(query.dtype)


def packed(query, key, value, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, dropout_p=0.0):
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    outputs = [attend(*(part[None] for part in row), softmax_scale, causal, is_packed=True)[0] for row in rows]
    return torch.cat(outputs).to(query.dtype)


def kernels(implementation=None, *args, **kwargs):
    utilities = modeling_flash_attention_utils
    supported = defaultdict(bool, dropout_p=True)
    arguments = functools.partial(utilities._process_flash_attention_kwargs, supports_mapping=supported)
    return (fixed, packed, None, utilities._pad_input, utilities._unpad_input), (arguments, None)


def stand_in(module, query, key, value, attention_mask, **kwargs):
    assert attention_mask is None or attention_mask.ndim == 2
    with mock.patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", kernels):
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(FLASH, stand_in)
AttentionMaskInterface.register(FLASH, flash_attention_mask)
