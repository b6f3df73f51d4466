"""Tiny stock models and their pruned twins, with the same weights, in memory."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from families import FAMILIES, Family, family_of
from hivtp_hf.pruning.compat import cache_argument
from tiny_checkpoint import tiny_config, tiny_model, tiny_processor

# 8 x 8 cells a tile: quick, and small enough for every pinpoint shape to occur.
SMALL = {"tile_size": 56, "patch_size": 7}
IMAGE_TOKEN = 3
# The name by which the installed release's own models take a cache; ours take it by each of these.
CACHE = cache_argument(LlamaForCausalLM.forward)
CACHE_NAMES = ("cache", "past_key_values")
NEW_TOKENS = 6
# A model that answers with an image token asks for an image that is not there: stock raises on it without a cache.
COMMON = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "suppress_tokens": [IMAGE_TOKEN],
    "do_sample": False,
}
LOW_RATIO = {"retention_ratio": 0.25}

# Every kind of tower and feature strategy that pruning takes, as `geometry` for `twins`. LLaVA-NeXT needs a feature per cell;
# LLaVA-1.5 follows stock, which may keep the class token, and drops SigLIP's first cell under "default".
SIGLIP = {"vision_type": "siglip_vision_model"}
TOWERS: dict[str, dict[str, Any]] = {
    "LLaVA-NeXT, CLIP": {"family": "llava_next"},
    "LLaVA-NeXT, SigLIP": {"family": "llava_next", **SIGLIP},
    "LLaVA-1.5, CLIP": {"family": "llava"},
    "LLaVA-1.5, CLIP, full": {"family": "llava", "vision_feature_select_strategy": "full"},
    "LLaVA-1.5, SigLIP": {"family": "llava", **SIGLIP},
    "LLaVA-1.5, SigLIP, default": {"family": "llava", **SIGLIP, "vision_feature_select_strategy": "default"},
}


@dataclass
class Twins:
    """A stock model and a pruned one with equal weights, and their processors."""

    family: Family
    stock: Any
    stock_processor: Any
    pruned: Any
    processor: Any


def pruned_processor(stock_processor, pruning_config=None) -> Any:
    """A pruned processor made of a stock one's parts."""
    family = next(family for family in FAMILIES.values() if type(stock_processor) is family.stock_processor)
    return family.processor(
        image_processor=stock_processor.image_processor,
        tokenizer=stock_processor.tokenizer,
        patch_size=stock_processor.patch_size,
        vision_feature_select_strategy=stock_processor.vision_feature_select_strategy,
        chat_template=stock_processor.chat_template,
        num_additional_image_tokens=stock_processor.num_additional_image_tokens,
        pruning_config=pruning_config,
    )


def pruned_config(stock_config, pruning_config=None) -> Any:
    """A stock configuration's values in ours."""
    values = stock_config.to_dict()
    family = family_of(stock_config)
    values.pop("model_type")
    return family.config(**values, pruning_config=pruning_config)


def twins(pruning_config=None, vision_feature_layer=None, **geometry) -> Twins:
    """A stock model and its pruned twin; `geometry`, with the family, goes to `tiny_config`, 8 x 8 cells unless given."""
    config = tiny_config(**{**SMALL, **geometry})
    family = family_of(config)
    if vision_feature_layer is not None:
        config.vision_feature_layer = vision_feature_layer
    stock = tiny_model(config)
    pruned = family.model(pruned_config(config, pruning_config)).eval()
    pruned.load_state_dict(stock.state_dict())
    stock_processor = tiny_processor(config)
    return Twins(family, stock, stock_processor, pruned, pruned_processor(stock_processor, pruning_config))


@contextlib.contextmanager
def settings(pair: Twins, pruning):
    """Processor and model with other pruning settings."""
    before = pair.processor.pruning_config
    pair.processor.pruning_config = pair.pruned.config.pruning_config = pruning
    try:
        yield
    finally:
        pair.processor.pruning_config = pair.pruned.config.pruning_config = before


def image_inputs(inputs) -> dict[str, Any]:
    """The inputs of a call that say what its images are, without a ratio, which stock does not know."""
    return {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if inputs.get(name) is not None}


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with structure at several scales."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = random.integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def greedy(model, inputs, tokens=6) -> torch.Tensor:
    """The new token ids of greedy decoding, (batch, tokens)."""
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :]


def image_features_of(output) -> list[torch.Tensor]:
    """What entered the language model, as a model's output says: one (tokens, hidden) tensor or more, by release."""
    if hasattr(output, "image_outputs"):
        return list(output.image_outputs.pooler_output)
    return [output.image_hidden_states]  # before transformers 5.24
