"""shapes-llava-next before training: a small LLaVA-NeXT of stock transformers classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from examples.shapes_vqa.scenes import TILE
from examples.tiny_checkpoint import tiny_processor
from hivtp_hf import TokenLayout
from hivtp_hf.families.llava_next import LlavaNextFamily

from .reference_model import UNPRUNED, Encoded, ReferenceModel
from .starting_point import patches_of, set_starting_point
from .tokens import make_tokenizer, words

PATCH = 8
PINPOINTS = LlavaNextFamily().tiny_config_values(TILE)["image_grid_pinpoints"]
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")


class LlavaNextReference(ReferenceModel):
    """3.6 million parameters; heads of 32 in the tower and 64 in the language model, which serving kernels take."""

    name = "shapes-llava-next"
    before, after = "USER: ", "\n"
    middle_state = 7
    has_base_tile = True

    def make_config(self) -> LlavaNextConfig:
        vision = CLIPVisionConfig(
            image_size=TILE,
            patch_size=PATCH,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=10,
            num_attention_heads=4,
            projection_dim=128,
        )
        text = LlamaConfig(
            vocab_size=len(_SPECIAL) + len(words()),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlavaNextConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_index=_SPECIAL.index("<image>"),
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=(TILE // PATCH) ** 2,
            tie_word_embeddings=True,
        )

    def make_processor(self, config: LlavaNextConfig) -> LlavaNextProcessor:
        tokenizer = make_tokenizer(
            _SPECIAL,
            "<unk>",
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        )
        return tiny_processor(config, tokenizer)

    def make_model(self, config: LlavaNextConfig, seed: int) -> LlavaNextForConditionalGeneration:
        torch.manual_seed(seed)
        return LlavaNextForConditionalGeneration(config)

    def set_starting_point(self, model: Any, inputs: Mapping[str, Tensor], random: np.random.Generator) -> None:
        set_starting_point(model, patches_of(inputs["pixel_values"], PATCH, 40000, random))

    def layout_of(self, processor: Any, height: int, width: int) -> TokenLayout:
        return TokenLayout.from_image_size(height, width, UNPRUNED, tile_size=TILE, patch_size=PATCH, pinpoints=PINPOINTS)

    def tower_parts(self, model: Any) -> tuple[nn.Module, nn.Module]:
        return model.model.vision_tower, model.model.multi_modal_projector

    def encode(self, model: Any, inputs: Mapping[str, Tensor], hidden_states: bool = False) -> Encoded:
        output = model.model.get_image_features(
            inputs["pixel_values"].to(model.device, model.dtype),
            inputs["image_sizes"],
            output_hidden_states=hidden_states,
            return_dict=True,
        )
        return Encoded(output.pooler_output, output.hidden_states if hidden_states else ())

    def places(self, layout: TokenLayout) -> None:
        return None

    def train_faster(self, model: Any) -> None:
        # On CPUs the fused attention's backward pass takes longer than all else at so few tokens a tile.
        model.model.vision_tower.set_attn_implementation("eager")

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        for part in (model, model.model.vision_tower, model.model.language_model):
            part.set_attn_implementation("sdpa")
        model.to("cpu", torch.float16).save_pretrained(folder)
        processor.save_pretrained(folder)
