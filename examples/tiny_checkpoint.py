"""A small LLaVA-NeXT or LLaVA-1.5 with random weights, made on the spot: for demos and tests that must work offline.

Its geometry is real (by default 336-pixel tiles of 24 x 24 cells and the five pinpoints), its width and depth are not: it
answers nonsense. Everything is built from stock transformers classes.
"""

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with LLaVA's special tokens, trained on three sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def five_pinpoints(tile_size: int) -> list[list[int]]:
    """LLaVA-NeXT's five pinpoints, for tiles of so many pixels."""
    return [[rows * tile_size, columns * tile_size] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def tiny_config(
    *,
    family: str = "llava_next",
    tile_size: int = 336,
    patch_size: int = 14,
    pinpoints: list[list[int]] | None = None,
    vision_layers: int = 10,
    vision_width: int = 64,
    vision_type: str = "clip_vision_model",
    text_layers: int = 2,
    text_width: int = 64,
    text_type: str = "llama",
    vocab_size: int = 400,
    image_token_index: int = 3,
    vision_feature_select_strategy: str | None = None,
) -> LlavaNextConfig | LlavaConfig:
    """A narrow, shallow configuration of the family "llava_next" or "llava".

    Pinpoints are LLaVA-NeXT's five, in tiles, unless given; the feature strategy is what fits the tower.
    """
    if vision_feature_select_strategy is None:
        vision_feature_select_strategy = "default" if vision_type == "clip_vision_model" else "full"
    if pinpoints is None:
        pinpoints = five_pinpoints(tile_size)
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
    shared = {
        "vision_config": vision_config.to_dict(),
        "text_config": text_config.to_dict(),
        "image_token_index": image_token_index,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "image_seq_length": (tile_size // patch_size) ** 2,
    }
    if family == "llava":
        return LlavaConfig(**shared)
    return LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)


def tiny_processor(
    config: LlavaNextConfig | LlavaConfig, tokenizer: PreTrainedTokenizerFast | None = None
) -> LlavaNextProcessor | LlavaProcessor:
    """The stock processor for a configuration."""
    tile_size, has_class_token = config.vision_config.image_size, config.vision_config.model_type == "clip_vision_model"
    square = {"height": tile_size, "width": tile_size}
    cropped = {"size": {"shortest_edge": tile_size}, "crop_size": square}
    # Read through the Auto class, which picks the implementation that this environment has.
    if isinstance(config, LlavaNextConfig):
        kind, settings = "LlavaNextImageProcessor", {**cropped, "image_grid_pinpoints": config.image_grid_pinpoints}
    elif has_class_token:
        kind, settings = "CLIPImageProcessor", cropped
    else:
        kind, settings = "SiglipImageProcessor", {"size": square}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **settings}))
        image_processor = AutoImageProcessor.from_pretrained(folder)
    processor_class = LlavaNextProcessor if isinstance(config, LlavaNextConfig) else LlavaProcessor
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer or tiny_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    config: LlavaNextConfig | LlavaConfig, seed: int = 0
) -> LlavaNextForConditionalGeneration | LlavaForConditionalGeneration:
    """A stock model with random weights."""
    torch.manual_seed(seed)
    is_next = isinstance(config, LlavaNextConfig)
    model = (LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration)(config).eval()
    with torch.no_grad():
        # Default initialisation leaves attention almost uniform. Sharper queries give scores that differ between cells.
        for name, parameter in model.model.vision_tower.named_parameters():
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
