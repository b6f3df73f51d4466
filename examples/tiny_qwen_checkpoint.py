"""A small Qwen2.5-VL with random weights, made on the spot: for demos and tests that must work offline.

Its geometry is real: patches of 14 pixels, merged 2 x 2, windows of 112 pixels, 32 blocks of which four attend over the whole
image. Its width is not, so it answers nonsense. It is saved by our classes, as stock's processor needs torchvision.
"""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hivtp_hf import HIVTPQwen2_5_VLConfig, HIVTPQwen2_5_VLForConditionalGeneration, HIVTPQwen2_5_VLProcessor

from .tiny_checkpoint import video_part

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen's special tokens."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What is shown in this image?"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The special tokens of images and videos, as a configuration names them."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[2:])), strict=True))


def build_qwen_checkpoint(
    folder: str | Path, *, text_layers: int = 4, text_width: int = 256, pruning_config: Any = None
) -> Path:
    """Saves a tiny checkpoint, model and processor, that loads stock's weights as ours do."""
    tokenizer = qwen_tokenizer()
    config = HIVTPQwen2_5_VLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": text_width},
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 2 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_width // 32,
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        pruning_config=pruning_config,
        **token_ids(tokenizer),
    )
    torch.manual_seed(0)
    model = HIVTPQwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Default initialisation leaves attention almost uniform. Sharper queries give scores that differ between cells.
        for name, parameter in model.model.visual.named_parameters():
            if name.endswith("qkv.weight"):
                parameter.normal_(std=parameter.shape[1] ** -0.5 * 2)
    model.save_pretrained(folder)
    HIVTPQwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(patch_size=14, merge_size=2),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        pruning_config=pruning_config,
        **video_part(HIVTPQwen2_5_VLProcessor),
    ).save_pretrained(folder)
    return Path(folder)
