"""Which encoder layers look at shapes: measured, since it is a property of a training and not of an architecture."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LlavaNextProcessor

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration
from hivtp_hf.received_attention import ReceivedAttention

from .dense_targets import dense_targets, layout_of
from .scenes import Scene, draw

_MOST_ATTENDED = 0.2


class LayerRow(NamedTuple):
    """Of one encoder layer the share of shapes' cells that are among the fifth of its cells that get most attention.

    Attributes:
        layer: 0-based.
        received: by the attention that cells receive from all tokens.
        class_token: by what the class token attends to.
    """

    layer: int
    received: float
    class_token: float


@torch.no_grad()
def layer_table(
    model: HIVTPLlavaNextForConditionalGeneration, processor: LlavaNextProcessor, scenes: Sequence[Scene]
) -> list[LayerRow]:
    """A row for every encoder layer, over all tiles that show a shape; chance is 0.2."""
    base, layers = model.model, range(model.config.vision_config.num_hidden_layers)
    hits = {False: torch.zeros(len(layers)), True: torch.zeros(len(layers))}
    number = 0
    for scene in scenes:
        inputs = processor.image_processor(draw(scene), return_tensors="pt")
        layout, targets = layout_of(scene), dense_targets(scene)
        pixel_values = inputs["pixel_values"][0, : layout.num_tiles].to(model.device, model.dtype)
        on_shape = torch.zeros_like(layout.valid)
        on_shape[targets.tile, targets.row, targets.column] = targets.shape >= 0
        number += int(on_shape.sum())
        for from_class_token in (False, True):
            collector = ReceivedAttention(layers, from_class_token)
            base._received_attention_tap.call(base.vision_tower, collector, pixel_values)
            for layer, scores in collector.by_layer().items():
                of_cells = scores[:, 1:].cpu().view_as(layout.valid)
                hits[from_class_token][layer] += int((_most_attended(of_cells, layout.valid) & on_shape).sum())
    return [LayerRow(layer, float(hits[False][layer]) / number, float(hits[True][layer]) / number) for layer in layers]


def _most_attended(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The fifth of each tile's valid cells with the highest scores, bool (tiles, grid, grid)."""
    rank = scores.masked_fill(~valid, -1).flatten(1).argsort(1, descending=True).argsort(1)
    most = (_MOST_ATTENDED * valid.flatten(1).sum(1, keepdim=True)).round()
    return (rank < most).view_as(valid) & valid


def table_text(rows: Sequence[LayerRow]) -> str:
    """The table as Markdown, in percent."""
    lines = ["| layer | received attention | class token |", "|---|---|---|"]
    lines += [f"| {row.layer} | {100 * row.received:.0f} | {100 * row.class_token:.0f} |" for row in rows]
    return "\n".join(lines)
