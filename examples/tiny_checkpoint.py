"""A small model of any family with random weights, made on the spot: for demos and tests that must work offline.

Its geometry is real (by default 336-pixel tiles of 24 x 24 cells and the five pinpoints), its width and depth are not: it
answers nonsense. Everything is built from stock transformers classes.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from hivtp_hf.families import family_of_model_type

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_CORPUS = [
    "USER: What is shown in this image? ASSISTANT: The image shows a cat on a table, next to a cup of coffee.",
    "USER: Describe the photograph in one sentence. ASSISTANT: An astronaut smiles in front of a flag and a rocket.",
    "How many people are there? What colour is the background? Is there a dog to the left of the chair? Yes. No.",
]


def tiny_tokenizer(**extra_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with LLaVA's special tokens, and further ones by their names, trained on three sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>", *extra_tokens.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", **extra_tokens},
        padding_side="left",
    )


def tiny_config(
    *,
    family: str = "llava_next",
    tile_size: int = 336,
    patch_size: int = 14,
    pinpoints: list[list[int]] | None = None,
    vision_layers: int = 10,
    vision_width: int = 64,
    vision_type: str = "clip_vision_model",
    text_layers: int = 3,
    text_width: int = 64,
    text_type: str = "llama",
    vocab_size: int = 400,
    image_token_index: int = 3,
    vision_feature_select_strategy: str | None = None,
) -> Any:
    """A narrow, shallow stock configuration of a family.

    Pinpoints are LLaVA-NeXT's five, in tiles, unless given; the feature strategy is what fits the tower.
    """
    if vision_feature_select_strategy is None:
        vision_feature_select_strategy = "default" if vision_type == "clip_vision_model" else "full"
    vision_config = AutoConfig.for_model(
        vision_type,
        image_size=tile_size,
        patch_size=patch_size,
        num_hidden_layers=vision_layers,
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_attention_heads=vision_width // 32,
    )
    text_config = AutoConfig.for_model(
        text_type,
        num_hidden_layers=text_layers,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_attention_heads=text_width // 32,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    entry = family_of_model_type(family, "the tiny checkpoint")
    values = {
        "vision_config": vision_config.to_dict(),
        "text_config": text_config.to_dict(),
        "image_token_index": image_token_index,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "image_seq_length": (tile_size // patch_size) ** 2,
    }
    values |= entry.tiny_config_values(tile_size)
    if pinpoints is not None:
        values["image_grid_pinpoints"] = pinpoints
    return entry.stock_classes.config(**values)


def tiny_processor(config: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """The stock processor for a stock configuration."""
    family = family_of_model_type(config.model_type, "the configuration")
    # Read through the Auto class, which picks the implementation that this environment has.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(family.tiny_image_processor(config)))
        image_processor = AutoImageProcessor.from_pretrained(folder)
    return family.stock_classes.processor(
        image_processor=image_processor,
        tokenizer=tokenizer or tiny_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A stock model with random weights, for a stock configuration."""
    family = family_of_model_type(config.model_type, "the configuration")
    torch.manual_seed(seed)
    model = family.stock_classes.model(config).eval()
    with torch.no_grad():
        # Default initialisation leaves attention almost uniform. Sharper queries give scores that differ between cells.
        for name, parameter in family.encoder(model.model).named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(std=parameter.shape[0] ** -0.5 * 2)
        # Without this the language model repeats one token, and equal answers would prove nothing.
        for _, parameter in model.model.language_model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
        model.lm_head.weight.normal_(std=0.2)
    return model


def build_stock_checkpoint(folder: str | Path, seed: int = 0, **geometry) -> Path:
    """Saves a tiny stock checkpoint, model and processor; `geometry` goes to `tiny_config`."""
    config = tiny_config(**geometry)
    tiny_model(config, seed).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return Path(folder)


def video_part(processor_class: Any, **settings: Any) -> dict[str, Any]:
    """The video processor that a processor must have where torchvision is installed, as its argument; else nothing."""
    if not is_torchvision_available():
        return {}
    return {"video_processor": getattr(transformers, processor_class.video_processor_type)(**settings)}
