"""Which encoder layers look at shapes: measured, since it is a property of a training and not of an architecture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from examples.shapes_vqa.scenes import Scene, draw
from hivtp_hf.figures.dispersion import most_attended_cells

from .dense_targets import dense_targets
from .reference_model import ReferenceModel

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
def layer_table(reference: ReferenceModel, model: Any, processor: Any, scenes: Sequence[Scene]) -> list[LayerRow]:
    """A row for every encoder layer whose attention can be compared, over all tiles that show something; chance is 0.2."""
    family = model.config.family
    comparable = family.comparable_layers(model.config)
    layers = list(range(family.num_layers(model.config)) if comparable is None else comparable)
    hits = torch.zeros(2, len(layers))
    number = 0
    for scene in scenes:
        inputs = processor.image_processor(draw(scene), return_tensors="pt").to(model.device, model.dtype)
        targets = dense_targets(scene, reference.layout_of(processor, scene.height, scene.width))
        look = model.look(inputs, layers=layers)
        (layout,) = look.layouts({"method": "none"})
        valid = torch.stack(layout.by_view(layout.valid)).to(model.device)
        on_shape = torch.zeros_like(valid)
        on_shape[targets.tile, targets.row, targets.column] = targets.is_shown.to(on_shape.device)
        for scores_of_layers, found in zip((look.received, look.class_attention), hits, strict=True):
            for index, scores in enumerate((scores_of_layers or {}).values()):
                most_attended = most_attended_cells(scores.view_as(valid), valid, _MOST_ATTENDED)
                found[index] += int((most_attended & on_shape).sum())
        number += int(on_shape.sum())
    return [LayerRow(layer, *share) for layer, share in zip(layers, (hits / number).T.tolist(), strict=True)]


def table_text(rows: Sequence[LayerRow]) -> str:
    """The table as Markdown, in percent."""
    lines = ["| layer | received attention | class token |", "|---|---|---|"]
    lines += [f"| {row.layer} | {100 * row.received:.0f} | {100 * row.class_token:.0f} |" for row in rows]
    return "\n".join(lines)
