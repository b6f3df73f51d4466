"""Tiny LLaVA-OneVision models, stock and pruned with the same weights, and stock's processor without its video part."""

import json
from typing import Any

import torch
from transformers import LlavaOnevisionProcessor

from examples.tiny_onevision_checkpoint import onevision_config, onevision_parts
from families import Family
from hivtp_hf.families import family_of_model_type
from kept_rows import kept_rows
from tiny_checkpoint import tiny_model
from tiny_models import Twins

# 8 x 8 cells a tile, of whose 58 pixels they see 56; resampled above 4 tiles of 9.
SMALL = {"tile_size": 58, "patch_size": 7, "most_crops": 3, "vision_aspect_ratio": "anyres_max_4", "text_layers": 3}
ENTRY = family_of_model_type("llava_onevision", "the tests")
FAMILY = Family(ENTRY.name, *ENTRY.stock_classes, *ENTRY.classes)


class StockWithoutVideos(LlavaOnevisionProcessor):
    """Stock's processor, which builds without torchvision, as its video part is left out."""

    @classmethod
    def get_attributes(cls):
        return [part for part in super().get_attributes() if part != "video_processor"]


def onevision_twins(pruning: Any = None, **geometry: Any) -> Twins:
    """A stock model and its pruned twin; `geometry` goes to `onevision_config`, with `SMALL`."""
    config = onevision_config(**{**SMALL, **geometry})
    stock = tiny_model(config)
    values = config.to_dict()
    values.pop("model_type")
    pruned = FAMILY.model(FAMILY.config(**values, pruning_config=pruning)).eval()
    pruned.load_state_dict(stock.state_dict())
    for model in (stock, pruned):
        model.generation_config.suppress_tokens = [config.image_token_index, config.video_token_index]
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    parts = onevision_parts(config)
    stock_processor = StockWithoutVideos(**{**parts, "video_processor": None})
    return Twins(FAMILY, stock, stock_processor, pruned, FAMILY.processor(**parts, pruning_config=pruning))


def save_stock_onevision_checkpoint(folder: Any) -> Any:
    """A stock checkpoint in files as the Hub has them, without settings of a video processor; returns its models."""
    pair = onevision_twins()
    pair.stock.save_pretrained(folder)
    StockWithoutVideos(**{**onevision_parts(pair.stock.config), "video_processor": None}).save_pretrained(folder)
    file = folder / "processor_config.json"
    stored = {**json.loads(file.read_text()), "processor_class": "LlavaOnevisionProcessor"}
    file.write_text(json.dumps(stored))
    return pair


@torch.no_grad()
def video_oracle(pair: Twins, inputs: Any) -> dict[str, Any]:
    """What a stock model is given in place of a pruned processor's `inputs` with videos: embeddings and the attention mask."""
    pixels = inputs["pixel_values_videos"]
    ratio = {"retention_ratio": inputs["retention_ratio"][-len(pixels) :]} if "retention_ratio" in inputs else {}
    output = pair.pruned.get_video_features(pixels, **ratio)
    packed = pair.stock.get_video_features(pixels).pooler_output
    features = torch.cat(kept_rows(packed, output.pooler_output, output))
    embeddings = pair.stock.get_input_embeddings()(inputs["input_ids"])
    placeholders = (inputs["input_ids"] == pair.stock.config.video_token_id)[..., None]
    return {
        "inputs_embeds": embeddings.masked_scatter(placeholders, features),
        "attention_mask": inputs["attention_mask"],
    }
