"""shapes-qwen2_5-vl before training: a small Qwen2.5-VL of stock transformers classes.

What matters to pruning is as in the published models: blocks that attend within windows of 4 x 4 tokens, and three over the
whole image; 2 x 2 patches merged into a token; positions of time, row and column, with sections in proportion (8, 12 and 12 of
32 frequencies, as 16, 24 and 24 of 64); no class token; as many tokens as an image's size asks for, from 4 to 600.

A published base of 1e6 leaves the frequencies of columns so low that a few columns of a small image are one place. So it is 100
here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.tiny_checkpoint import video_part
from hivtp_hf import HIVTPQwen2_5_VLConfig, HIVTPQwen2_5_VLProcessor, TokenLayout
from hivtp_hf.files import atomic_write

from .packed_segments import PACKED_SEGMENTS
from .reference_model import UNPRUNED, Encoded, Places, ReferenceModel
from .starting_point import set_qwen_starting_point
from .tokens import make_tokenizer, words

PATCH, MERGE = 7, 2
LEAST_TOKENS, MOST_TOKENS = 4, 600
_SPECIAL = (
    *("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "<unk>",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_IDS = {
    "vision_start_token_id": 2,
    "vision_end_token_id": 3,
    "image_token_id": 4,
    "video_token_id": 5,
}


class Qwen2_5_VLReference(ReferenceModel):
    """3.9 million parameters; heads of 32 in the tower and 64 in the language model, which serving kernels take."""

    name = "shapes-qwen2_5-vl"
    before, after = "USER: <|vision_start|>", "<|vision_end|>\n"
    middle_state = 6
    has_base_tile = False
    scales = (0.6, 1.4)

    def make_config(self) -> Qwen2_5_VLConfig:
        return Qwen2_5_VLConfig(
            vision_config={
                "depth": 9,
                "hidden_size": 128,
                "intermediate_size": 320,
                "num_heads": 4,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "window_size": 4 * MERGE * PATCH,
                "fullatt_block_indexes": [2, 5, 8],
                "out_hidden_size": 192,
            },
            text_config={
                "vocab_size": len(_SPECIAL) + len(words()),
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
            },
            tie_word_embeddings=True,
            **_IDS,
        )

    def make_processor(self, config: Qwen2_5_VLConfig) -> HIVTPQwen2_5_VLProcessor:
        tokenizer = make_tokenizer(
            _SPECIAL,
            "<unk>",
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens={
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "vision_start_token": "<|vision_start|>",
                "vision_end_token": "<|vision_end|>",
            },
        )
        pixels = (PATCH * MERGE) ** 2
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=MERGE,
            size={"shortest_edge": LEAST_TOKENS * pixels, "longest_edge": MOST_TOKENS * pixels},
        )
        return HIVTPQwen2_5_VLProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=_CHAT_TEMPLATE,
            pruning_config=UNPRUNED,
            **video_part(HIVTPQwen2_5_VLProcessor, patch_size=PATCH, merge_size=MERGE),
        )

    def make_model(self, config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)

    def set_starting_point(self, model: Any, inputs: Mapping[str, Tensor], random: np.random.Generator) -> None:
        patches = inputs["pixel_values"]
        set_qwen_starting_point(model, patches[torch.from_numpy(random.integers(0, len(patches), 40000))])

    def layout_of(self, processor: Any, height: int, width: int) -> TokenLayout:
        return HIVTPQwen2_5_VLConfig.family.processor_layout(processor, height, width, UNPRUNED)

    def tower_parts(self, model: Any) -> tuple[nn.Module, nn.Module]:
        return model.model.visual, model.model.visual.merger

    def encode(self, model: Any, inputs: Mapping[str, Tensor], hidden_states: bool = False) -> Encoded:
        output = model.model.get_image_features(
            inputs["pixel_values"].to(model.device, model.dtype),
            inputs["image_grid_thw"].to(model.device),
            output_hidden_states=hidden_states,
            return_dict=True,
        )
        return Encoded(output.pooler_output, output.hidden_states if hidden_states else ())

    def places(self, layout: TokenLayout) -> Places:
        _, row, column = layout.cells(layout.cell_positions).unbind(1)
        return Places(torch.stack((torch.zeros_like(row), row, column)), *layout.view_shapes[0])

    def train_faster(self, model: Any) -> None:
        # Stock runs a window at a time; here all windows of a batch are run at once.
        model.model.visual.config._attn_implementation = PACKED_SEGMENTS

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        for part in (model, model.model.visual, model.model.language_model):
            part.config._attn_implementation = "sdpa"
        model.to("cpu", torch.float16).save_pretrained(folder)
        processor.save_pretrained(folder)
        # Stock's processor needs torchvision to be made, not to be named.
        for name in ("processor_config.json", "tokenizer_config.json"):
            file = folder / name
            settings = json.loads(file.read_text(encoding="utf-8"))
            for of_ours in ("auto_map", "pruning_config"):
                settings.pop(of_ours, None)
            if "processor_class" in settings:
                settings["processor_class"] = "Qwen2_5_VLProcessor"
            text = json.dumps(settings, indent=2) + "\n"
            atomic_write(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
