"""One set of random weights behind three models: stock, ours, and stock with a tower that returns its attention maps."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from hivtp_hf import HIVTPLlavaNextConfig, HIVTPLlavaNextForConditionalGeneration

_SEED = 0
# Attention of freshly made towers is almost uniform. Sharper queries and keys give scores that differ between cells.
_SHARPNESS = 2


@dataclass
class Models:
    """Models on the same parameters and buffers: no weight is stored twice.

    Attributes:
        stock: transformers' own, sdpa throughout.
        pruned: ours, sdpa throughout.
        published: transformers' own with an eager tower, as methods are published; its language model runs on sdpa.
        config: stock's configuration.
    """

    stock: Any
    pruned: Any
    published: Any
    config: LlavaNextConfig
    device: torch.device
    dtype: torch.dtype


def build_models(config: LlavaNextConfig, device: torch.device, dtype: torch.dtype) -> Models:
    """Random weights of a configuration, made on the device in the dtype."""
    stock = random_stock_model(config, device, dtype)
    with torch.device("meta"):
        values = stock.config.to_dict()
        values.pop("model_type")
        pruned = HIVTPLlavaNextForConditionalGeneration._from_config(
            HIVTPLlavaNextConfig(**values), dtype=dtype, attn_implementation="sdpa"
        )
        published = LlavaNextForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
        )
    for twin in (pruned, published):
        share_weights(stock, twin)
    return Models(stock, pruned.eval(), published.eval(), stock.config, device, dtype)


def random_stock_model(config: LlavaNextConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' LLaVA-NeXT with random weights."""
    torch.manual_seed(_SEED)
    with torch.device(device):
        model = LlavaNextForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        ).eval()
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(std=_SHARPNESS * parameter.shape[0] ** -0.5)
    return model.requires_grad_(False)


def share_weights(source: nn.Module, twin: nn.Module) -> None:
    """Puts the parameters and buffers of one model into another of the same modules, the unsaved buffers included."""
    modules = dict(source.named_modules())
    for name, module in twin.named_modules():
        module._parameters.update(modules[name]._parameters)
        module._buffers.update(modules[name]._buffers)
    strangers = [name for name, tensor in (*twin.named_parameters(), *twin.named_buffers()) if tensor.is_meta]
    if strangers:
        raise ValueError(f"{type(twin).__name__} has weights that {type(source).__name__} lacks: {', '.join(strangers)}.")
