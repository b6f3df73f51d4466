"""A small LLaVA-OneVision with random weights, made on the spot: for demos and tests that must work offline.

Its geometry is real: tiles of 384 pixels, of which 27 x 27 patches see 378, up to 36 crops that are resampled above 9. Its
width is not, so it answers nonsense. It is saved by our classes, as stock's processor needs torchvision.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hivtp_hf import HIVTPLlavaOnevisionConfig, HIVTPLlavaOnevisionForConditionalGeneration, HIVTPLlavaOnevisionProcessor

from .tiny_checkpoint import tiny_model, tiny_tokenizer, video_part

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IMAGE_TOKEN, VIDEO_TOKEN = 3, 4


def onevision_config(
    *,
    tile_size: int = 384,
    patch_size: int = 14,
    most_crops: int = 6,
    vision_aspect_ratio: str = "anyres_max_9",
    vision_type: str = "siglip_vision_model",
    vision_layers: int = 10,
    vision_width: int = 64,
    text_layers: int = 2,
    text_width: int = 64,
    **others: Any,
) -> Any:
    """A narrow, shallow stock configuration; its crops form grids of up to `most_crops` tiles a side."""
    vision = AutoConfig.for_model(
        vision_type,
        image_size=tile_size,
        patch_size=patch_size,
        num_hidden_layers=vision_layers,
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_attention_heads=vision_width // 32,
        **({"vision_use_head": False} if vision_type == "siglip_vision_model" else {}),
    )
    text = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=text_layers,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_attention_heads=text_width // 32,
        num_key_value_heads=1,
        vocab_size=400,
        max_position_embeddings=16384,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    sides = range(1, most_crops + 1)
    values = {
        "vision_config": vision.to_dict(),
        "text_config": text.to_dict(),
        "image_token_index": IMAGE_TOKEN,
        "video_token_index": VIDEO_TOKEN,
        "image_grid_pinpoints": [[rows * tile_size, columns * tile_size] for rows in sides for columns in sides],
        "vision_aspect_ratio": vision_aspect_ratio,
        "vision_feature_select_strategy": "full" if vision_type == "siglip_vision_model" else "default",
        **others,
    }
    return HIVTPLlavaOnevisionConfig.family.stock_classes.config(**values)


def onevision_parts(config: Any) -> dict[str, Any]:
    """The parts and settings of a processor, stock's or ours, for a configuration."""
    vision = config.vision_config
    has_class_token = config.vision_feature_select_strategy == "default"
    return {
        "image_processor": LlavaOnevisionImageProcessorPil(
            size={"height": vision.image_size, "width": vision.image_size}, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        "tokenizer": tiny_tokenizer(video_token="<video>"),
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2 + has_class_token,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "chat_template": CHAT_TEMPLATE,
        **video_part(HIVTPLlavaOnevisionProcessor, size={"height": vision.image_size, "width": vision.image_size}),
    }


def build_onevision_checkpoint(folder: str | Path, *, pruning_config: Any = None, **geometry: Any) -> Path:
    """Saves a tiny checkpoint, model and processor; `geometry` goes to `onevision_config`."""
    config = onevision_config(**geometry)
    stock = tiny_model(config)
    values = config.to_dict()
    values.pop("model_type")
    model = HIVTPLlavaOnevisionForConditionalGeneration(HIVTPLlavaOnevisionConfig(**values, pruning_config=pruning_config))
    model.load_state_dict(stock.state_dict())
    model.save_pretrained(folder)
    HIVTPLlavaOnevisionProcessor(**onevision_parts(config), pruning_config=pruning_config).save_pretrained(folder)
    return Path(folder)
