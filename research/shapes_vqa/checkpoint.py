"""The trained model as files: a stock checkpoint in float16, with the pruning settings that fit its tower."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from examples.shapes_vqa.scenes import make_scene, make_sign_scene
from examples.shapes_vqa.splits import CALIBRATION
from hivtp_hf.families import family_of_model_type
from hivtp_hf.files import atomic_write

from .layer_table import LayerRow, layer_table, table_text
from .reference_model import ReferenceModel

# As many successive layers as HIVTP scores by default.
_SCORED_LAYERS = 3


def choose_layers(reference: ReferenceModel, folder: Path, num_scenes: int = 100) -> str:
    """Looks which layers of a written checkpoint's tower attend to shapes and signs, and, where all of its layers compare cells
    of a whole image, writes the best ones into its settings. Elsewhere the family's own choice stays.

    The scenes are of a split of their own, which no accuracy is measured on.

    Returns:
        The table, as Markdown.
    """
    family = family_of_model_type(AutoConfig.from_pretrained(folder).model_type, str(folder))
    model = family.classes.model.from_pretrained(folder, dtype=torch.float32).eval()
    processor = reference.make_processor(reference.make_config())
    scenes = [(make_scene, make_sign_scene)[index % 2]((CALIBRATION, index)) for index in range(num_scenes)]
    rows = layer_table(reference, model, processor, scenes)
    pruning: dict[str, Any] = {"method": "hivtp"}
    if family.comparable_layers(model.config) is None:
        start = best_start(rows, last=model.config.vision_config.num_hidden_layers - 2)
        pruning |= {"importance_start_layer": start, "importance_num_layers": _SCORED_LAYERS}
    for name in ("config.json", "processor_config.json"):
        file = folder / name
        text = json.dumps({**json.loads(file.read_text(encoding="utf-8")), "pruning_config": pruning}, indent=2) + "\n"
        atomic_write(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return table_text(rows)


def best_start(rows: Sequence[LayerRow], last: int) -> int:
    """Where the successive layers begin whose received attention finds most of the shapes; `last` is the feature's layer."""
    starts = range(last - _SCORED_LAYERS + 2)
    return max(starts, key=lambda start: sum(row.received for row in rows[start : start + _SCORED_LAYERS]))
