"""Tiny stock models and their pruned twins, with the same weights, in memory."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from hivtp_hf import HIVTPLlavaNextConfig, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor
from tiny_checkpoint import tiny_config, tiny_model, tiny_processor

# 8 x 8 cells a tile: quick, and small enough for every pinpoint shape to occur.
SMALL = {"tile_size": 56, "patch_size": 7}
LOW_RATIO = {"retention_ratio": 0.25}


@dataclass
class Twins:
    """A stock model and a pruned one with equal weights, and their processors."""

    stock: LlavaNextForConditionalGeneration
    stock_processor: LlavaNextProcessor
    pruned: HIVTPLlavaNextForConditionalGeneration
    processor: HIVTPLlavaNextProcessor


def pruned_processor(stock_processor, pruning_config=None) -> HIVTPLlavaNextProcessor:
    """A pruned processor made of a stock one's parts."""
    return HIVTPLlavaNextProcessor(
        image_processor=stock_processor.image_processor,
        tokenizer=stock_processor.tokenizer,
        patch_size=stock_processor.patch_size,
        vision_feature_select_strategy=stock_processor.vision_feature_select_strategy,
        chat_template=stock_processor.chat_template,
        num_additional_image_tokens=stock_processor.num_additional_image_tokens,
        pruning_config=pruning_config,
    )


def pruned_config(stock_config, pruning_config=None) -> HIVTPLlavaNextConfig:
    """A stock configuration's values in ours."""
    values = stock_config.to_dict()
    values.pop("model_type")
    return HIVTPLlavaNextConfig(**values, pruning_config=pruning_config)


def twins(pruning_config=None, vision_feature_layer=None, **geometry) -> Twins:
    """A stock model and its pruned twin; `geometry` goes to `tiny_config`, 8 x 8 cells unless given."""
    config = tiny_config(**{**SMALL, **geometry})
    if vision_feature_layer is not None:
        config.vision_feature_layer = vision_feature_layer
    stock = tiny_model(config)
    pruned = HIVTPLlavaNextForConditionalGeneration(pruned_config(config, pruning_config)).eval()
    pruned.load_state_dict(stock.state_dict())
    stock_processor = tiny_processor(config)
    return Twins(stock, stock_processor, pruned, pruned_processor(stock_processor, pruning_config))


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
