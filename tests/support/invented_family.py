"""A family that nobody has: what the contracts must carry beyond the families that are there.

An image is one rectangle of any size. The tower packs all images of a call into one sequence; a layer attends within each
image, or within windows of two rows of it. It returns two streams: features, and those of an earlier layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hivtp_hf import Evidence, StitchedViews, TokenLayout
from hivtp_hf.families.base import Family, FamilyClasses
from hivtp_hf.pruning.configuration import PrunedConfigMixin
from hivtp_hf.pruning.model import PrunedModelMixin

PATCH = 4
WINDOW_ROWS = 2
DEPTH, WINDOW_LAYERS, STREAM_LAYER = 4, (0, 2), 1


class InventedConfig(PreTrainedConfig):
    model_type = "invented"
    hidden_size: int = 32
    num_heads: int = 4
    # Of a language model, which it has none of.
    num_hidden_layers: int = 8


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class InventedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.is_causal = config, False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, states: Tensor, ends: Tensor, **kwargs: Any) -> Tensor:
        query, key, value = self.qkv(states).view(len(states), 3, self.config.num_heads, -1).permute(1, 2, 0, 3)[:, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs["scaling"] = query.shape[-1] ** -0.5
        if "flash" in self.config._attn_implementation:
            attended = attend(self, query, key, value, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **kwargs)[0]
        else:
            parts = zip(*(tensor.split(ends.diff().tolist(), dim=2) for tensor in (query, key, value)), strict=True)
            attended = torch.cat([attend(self, *part, None, **kwargs)[0] for part in parts], dim=1)
        return attended.reshape(len(states), -1)


class InventedBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(config.hidden_size), InventedAttention(config)

    def forward(self, states: Tensor, ends: Tensor, **kwargs: Any) -> Tensor:
        return states + 3 * self.attention(self.norm(states), ends, **kwargs)


class InventedTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.patches = config, nn.Linear(PATCH * PATCH, config.hidden_size)
        self.blocks = nn.ModuleList(InventedBlock(config) for _ in range(DEPTH))

    def forward(self, pixel_values: Tensor, grids: Tensor, **kwargs: Any) -> list[Tensor]:
        windows = [
            min(WINDOW_ROWS, rows - first) * columns
            for rows, columns in grids.tolist()
            for first in range(0, rows, WINDOW_ROWS)
        ]
        states, of_layers = self.patches(pixel_values), []
        for layer, block in enumerate(self.blocks):
            lengths = torch.tensor(windows) if layer in WINDOW_LAYERS else grids.prod(1)
            states = block(states, nn.functional.pad(lengths.cumsum(0), (1, 0)), **kwargs)
            of_layers.append(states)
        return of_layers


@dataclass
class InventedOutput(BaseModelOutputWithPooling):
    deepstack_features: Any = None


class InventedModel(PreTrainedModel):
    config_class = InventedConfig
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.tower = InventedTower(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, grids: Tensor, **kwargs: Any) -> InventedOutput:
        kwargs.pop("return_dict", None)
        of_layers, lengths = self.tower(pixel_values, grids, **kwargs), grids.prod(1).tolist()
        return InventedOutput(
            pooler_output=of_layers[-1].split(lengths), deepstack_features=[of_layers[STREAM_LAYER].split(lengths)]
        )


class InventedFamily(Family):
    name = "invented"
    title = "Invented"
    provides = frozenset({Evidence.RECEIVED_ATTENTION, Evidence.ATTENTION_ROWS, Evidence.KEYS, Evidence.FEATURES})
    image_inputs = ("pixel_values", "grids")
    streams = ("pooler_output", "deepstack_features")

    @property
    def classes(self) -> FamilyClasses:
        return FamilyClasses(HIVTPInventedConfig, HIVTPInventedModel, None, None)

    @property
    def stock_classes(self) -> FamilyClasses:
        return FamilyClasses(InventedConfig, InventedModel, None, None)

    def encoder(self, model: Any) -> nn.Module:
        return model.tower

    def num_layers(self, config: Any) -> int:
        return DEPTH

    def feature_layer(self, config: Any, arguments: Mapping[str, Any]) -> int:
        return DEPTH - 1

    def default_layers(self, config: Any) -> Mapping[str, Any]:
        return {"importance_layers": (1, 3), "object_layer": 1}

    def comparable_layers(self, config: Any) -> list[int]:
        return [layer for layer in range(DEPTH) if layer not in WINDOW_LAYERS]

    def image_sizes(self, model: Any, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(rows * PATCH, columns * PATCH) for rows, columns in arguments["grids"].tolist()]

    def layout(self, model: Any, size: Any, pruning: Any, arguments: Mapping[str, Any]) -> TokenLayout:
        rows, columns = (max(1, side // PATCH) for side in size)
        return TokenLayout(size, pruning, [StitchedViews(rows, columns)])

    def check_pixels(self, arguments: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> None:
        assert len(arguments["pixel_values"]) == sum(layout.num_cells for layout in layouts)

    def cell_scores(self, model: Any, scores: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
        assert [of_image.shape[:2] for of_image in scores] == [(1, layout.num_cells) for layout in layouts]
        return torch.cat(list(scores), dim=1)[0]

    def processor_layout(self, processor: Any, height: int, width: int, pruning: Any) -> TokenLayout:
        return self.layout(None, (height, width), pruning, {})

    def layouts_of_inputs(self, processor: Any, inputs: Any, prunings: Any) -> list[TokenLayout]:
        raise NotImplementedError

    def tiny_config_values(self, tile_size: int) -> dict[str, Any]:
        return {}

    def tiny_image_processor(self, config: Any) -> dict[str, Any]:
        return {}


class HIVTPInventedConfig(PrunedConfigMixin, InventedConfig):
    model_type = "hivtp_invented"
    stock_model_type: ClassVar[str] = "invented"
    family: ClassVar[Family] = InventedFamily()

    pruning_config: Any = None
    base_model: Any = None


class HIVTPInventedModel(PrunedModelMixin, InventedModel):
    config_class = HIVTPInventedConfig
    family: ClassVar[Any] = HIVTPInventedConfig.family

    def __init__(self, config):
        super().__init__(config)
        self._start_pruning()

    def get_image_features(self, pixel_values: Tensor, grids: Tensor, retention_ratio: Any = None, **kwargs: Any) -> Any:
        arguments = {"pixel_values": pixel_values, "grids": grids}
        return self._prune_image_features(super().get_image_features, arguments, retention_ratio, **kwargs)
