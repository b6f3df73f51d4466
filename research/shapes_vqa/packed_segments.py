"""Attention over packed segments, all of them at once: what training of a tower with windows takes.

Stock runs one call a window wherever flash attention is missing, thousands of them a step. It hands packed sequences and their
bounds to functions whose name says "flash"; this one pads windows to one length, and runs whole images one by one. Checkpoints
never name it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED_SEGMENTS = "shapes_segments_as_flash"
# Longer segments are images. Padding them would cost more than their calls do.
_LONGEST_WINDOW = 128


def _packed_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    lengths = cu_seq_lens_q.diff()
    if int(lengths.max()) > _LONGEST_WINDOW:
        parts = zip(*(packed.split(lengths.tolist(), dim=2) for packed in (query, key, value)), strict=True)
        images = [nn.functional.scaled_dot_product_attention(*of_image, scale=scaling) for of_image in parts]
        return torch.cat(images, dim=2).transpose(1, 2), None
    place = torch.arange(int(lengths.max()), device=query.device)
    is_there = place < lengths[:, None]
    padded = (cu_seq_lens_q[:-1, None] + place).clamp(max=query.shape[2] - 1)

    def segments(packed: Tensor) -> Tensor:  # (1, heads, sequence, width) to (segments, heads, length, width)
        return packed[0].transpose(0, 1)[padded].transpose(1, 2)

    scores = scaling * segments(query) @ segments(key).transpose(2, 3)
    if not bool(is_there.all()):
        scores = scores.masked_fill(~is_there[:, None, None], torch.finfo(scores.dtype).min)
    attended = scores.softmax(-1) @ segments(value)
    return attended.transpose(1, 2)[is_there][None], None


AttentionInterface.register(PACKED_SEGMENTS, _packed_segments)
