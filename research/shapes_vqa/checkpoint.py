"""The trained model as files: a stock checkpoint in float16, with the pruning settings that fit its tower."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from examples.shapes_vqa.scenes import make_scene
from examples.shapes_vqa.splits import CALIBRATION
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration
from hivtp_hf.files import atomic_write

from .layer_table import LayerRow, layer_table, table_text

# As many successive layers as HIVTP scores by default.
_SCORED_LAYERS = 3


def write_checkpoint(model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, folder: Path) -> None:
    """Writes weights, configuration and processor. Stock classes load them, and so do pruned ones."""
    for part in (model, model.model.vision_tower, model.model.language_model):
        part.set_attn_implementation("sdpa")
    model.to("cpu", torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def choose_layers(folder: Path, num_scenes: int = 100) -> str:
    """Looks which layers of a written checkpoint's tower attend to shapes, and writes the best ones into its settings.

    The scenes are a split of their own, which no accuracy is measured on.

    Returns:
        The table, as Markdown.
    """
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaNextProcessor.from_pretrained(folder)
    rows = layer_table(model, processor, [make_scene((CALIBRATION, index)) for index in range(num_scenes)])
    start = best_start(rows, last=model.config.vision_config.num_hidden_layers - 2)
    pruning = {"method": "hivtp", "importance_start_layer": start, "importance_num_layers": _SCORED_LAYERS}
    for name in ("config.json", "processor_config.json"):
        file = folder / name
        text = json.dumps({**json.loads(file.read_text(encoding="utf-8")), "pruning_config": pruning}, indent=2) + "\n"
        atomic_write(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return table_text(rows)


def best_start(rows: Sequence[LayerRow], last: int) -> int:
    """Where the successive layers begin whose received attention finds most of the shapes; `last` is the feature's layer."""
    starts = range(last - _SCORED_LAYERS + 2)
    return max(starts, key=lambda start: sum(row.received for row in rows[start : start + _SCORED_LAYERS]))
