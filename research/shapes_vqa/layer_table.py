"""Which encoder layers look at shapes: measured, since it is a property of a training and not of an architecture."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LlavaNextProcessor

from examples.shapes_vqa.scenes import Scene, draw
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration
from hivtp_hf.figures.dispersion import most_attended_cells

from .dense_targets import dense_targets

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
    layers = range(model.config.family.num_layers(model.config))
    hits = torch.zeros(2, len(layers))
    number = 0
    for scene in scenes:
        inputs = processor.image_processor(draw(scene), return_tensors="pt").to(model.device, model.dtype)
        targets = dense_targets(scene)
        look = model.look(inputs, layers=layers)
        (layout,) = look.layouts({"method": "none"})
        valid = torch.stack(layout.by_view(layout.valid)).to(model.device)
        on_shape = torch.zeros_like(valid)
        on_shape[targets.tile, targets.row, targets.column] = targets.shape.to(on_shape.device) >= 0
        for scores_of_layers, found in zip((look.received, look.class_attention), hits, strict=True):
            for layer, scores in scores_of_layers.items():
                most_attended = most_attended_cells(scores.view_as(valid), valid, _MOST_ATTENDED)
                found[layer] += int((most_attended & on_shape).sum())
        number += int(on_shape.sum())
    return [LayerRow(layer, *share) for layer, share in enumerate((hits / number).T.tolist())]


def table_text(rows: Sequence[LayerRow]) -> str:
    """The table as Markdown, in percent."""
    lines = ["| layer | received attention | class token |", "|---|---|---|"]
    lines += [f"| {row.layer} | {100 * row.received:.0f} | {100 * row.class_token:.0f} |" for row in rows]
    return "\n".join(lines)
