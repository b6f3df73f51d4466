"""Tiny Qwen-VL models of true geometry, prompts made by hand, and what stock makes of a pruned prompt."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.tiny_checkpoint import video_part
from examples.tiny_qwen_checkpoint import CHAT_TEMPLATE, qwen_tokenizer, token_ids
from hivtp_hf.families.qwen2_5_vl import HIVTPQwen2_5_VLConfig, HIVTPQwen2_5_VLForConditionalGeneration
from hivtp_hf.families.qwen2_vl import HIVTPQwen2VLConfig, HIVTPQwen2VLForConditionalGeneration
from hivtp_hf.families.qwen3_vl import HIVTPQwen3VLConfig, HIVTPQwen3VLForConditionalGeneration
from kept_rows import kept_rows

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
# Ids from here on are no text, and are not generated.
TEXT_TOKENS = 80
_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "max_position_embeddings": 2048,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 2, 3],
        },
        **_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 4, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
        **_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        **_TOKENS,
    },
}
STOCK = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
}
OURS = {
    "qwen2_5_vl": (HIVTPQwen2_5_VLConfig, HIVTPQwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (HIVTPQwen3VLConfig, HIVTPQwen3VLForConditionalGeneration),
    "qwen2_vl": (HIVTPQwen2VLConfig, HIVTPQwen2VLForConditionalGeneration),
}


class Twins(NamedTuple):
    """A stock model and ours with its weights."""

    family: str
    stock: Any
    pruned: Any


def qwen_twins(family: str, pruning: Any = None) -> Twins:
    """The tiny models of a family, random but far from zero, so that what is wrong shows."""
    torch.manual_seed(0)
    config, model = STOCK[family]
    stock = model(config(**CONFIGS[family])).eval()
    _sharpen(stock)
    config, model = OURS[family]
    pruned = model(config(**CONFIGS[family], pruning_config=pruning)).eval()
    pruned.load_state_dict(stock.state_dict())
    for one in (stock, pruned):
        one.generation_config.eos_token_id = one.generation_config.pad_token_id = None
        one.generation_config.pad_token_id = PAD
        one.generation_config.suppress_tokens = list(range(TEXT_TOKENS, _TEXT["vocab_size"]))
    return Twins(family, stock, pruned)


def _sharpen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2 if "embed" not in name else 1.0)


def images_of(grids: list[tuple[int, int]], model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random images of (height, width) patches."""
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    patches = sum(height * width for height, width in grids)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(patches, width, generator=generator),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def prompt_of(rows: list[list[Any]], side: str = "left") -> dict[str, Tensor]:
    """Ids, mask and token types of some rows: a number is so many text tokens, a list [n] an image of n placeholders."""
    generator = torch.Generator().manual_seed(1)
    ids = []
    for row in rows:
        of_row: list[int] = []
        for part in row:
            if isinstance(part, list):
                of_row += [START, *[IMAGE] * part[0], END]
            else:
                of_row += torch.randint(3, TEXT_TOKENS, (part,), generator=generator).tolist()
        ids.append(of_row)
    longest = max(map(len, ids))
    padding = [[PAD] * (longest - len(row)) for row in ids]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(ids, padding, strict=True)]
    ones = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(ids, padding, strict=True)
    ]
    input_ids = torch.tensor(padded)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.tensor(ones),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
    }


def inputs_of(
    twins: Twins, rows: list[list[Any]], side: str = "left", ratio: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of both models for rows of text lengths and image grids (height, width): of stock, and of ours."""
    grids = [part for row in rows for part in row if isinstance(part, tuple)]
    images = images_of(grids, twins.stock)
    merged = iter([height * width // 4 for height, width in grids])
    kept = iter([layout.num_retained for layout in twins.pruned.model._layouts(images, ratio)])
    stock_rows = [[[next(merged)] if isinstance(part, tuple) else part for part in row] for row in rows]
    pruned_rows = [[[next(kept)] if isinstance(part, tuple) else part for part in row] for row in rows]
    given = {} if ratio is None else {"retention_ratio": ratio}
    return {**prompt_of(stock_rows, side), **images}, {**prompt_of(pruned_rows, side), **images, **given}


@torch.no_grad()
def oracle(twins: Twins, stock_inputs: dict[str, Any], pruned_inputs: dict[str, Any]) -> dict[str, Any]:
    """What stock's language model is given of the pruned prompt: embeddings, positions and DeepStack rows of tokens that stay.

    Stock encodes all images and computes positions of the whole prompt; then everything is indexed by what is kept.
    """
    model = twins.stock.model
    names = ("pixel_values", "image_grid_thw", "retention_ratio")
    output = twins.pruned.get_image_features(**{name: pruned_inputs[name] for name in names if name in pruned_inputs})
    encoded = model.get_image_features(stock_inputs["pixel_values"], stock_inputs["image_grid_thw"], return_dict=True)
    positions, _ = model.get_rope_index(
        stock_inputs["input_ids"],
        mm_token_type_ids=stock_inputs["mm_token_type_ids"],
        image_grid_thw=stock_inputs["image_grid_thw"],
        attention_mask=stock_inputs["attention_mask"],
    )
    stays = (stock_inputs["input_ids"] != IMAGE) & stock_inputs["attention_mask"].bool()
    where = (stock_inputs["input_ids"] == IMAGE).nonzero()
    of_images = where.split([len(features) for features in encoded.pooler_output])
    for of_image, indices in zip(of_images, output.kept_indices, strict=True):
        row, column = of_image[indices].unbind(1)
        stays[row, column] = True
    is_token = pruned_inputs["attention_mask"].bool()
    of_rows = positions.new_zeros(3, *is_token.shape)
    for row in range(len(is_token)):
        of_rows[:, row, is_token[row]] = positions[:, row, stays[row]]
    embeddings = model.get_input_embeddings()(pruned_inputs["input_ids"])
    features = torch.cat(kept_rows(encoded.pooler_output, output.pooler_output, output))
    embeddings[pruned_inputs["input_ids"] == IMAGE] = features.to(embeddings.dtype)
    given = {"inputs_embeds": embeddings, "attention_mask": pruned_inputs["attention_mask"], "position_ids": of_rows}
    if twins.family == "qwen3_vl":
        given["visual_pos_masks"] = pruned_inputs["input_ids"] == IMAGE
        given["deepstack_visual_embeds"] = [
            torch.cat(kept_rows(layer, own, output))
            for layer, own in zip(encoded.deepstack_features, output.deepstack_features, strict=True)
        ]
    return given


@torch.no_grad()
def oracle_logits(twins: Twins, stock_inputs: dict[str, Any], pruned_inputs: dict[str, Any]) -> Tensor:
    """The logits of stock's language model of the pruned prompt."""
    given = oracle(twins, stock_inputs, pruned_inputs)
    return twins.stock.lm_head(twins.stock.model.language_model(**given).last_hidden_state)


@torch.no_grad()
def oracle_greedy(twins: Twins, stock_inputs: dict[str, Any], pruned_inputs: dict[str, Any], number: int) -> list[list[int]]:
    """So many greedy tokens of every row, each from the whole sequence anew, without a cache. Rows are padded on the left."""
    given = oracle(twins, stock_inputs, pruned_inputs)
    answers: list[list[int]] = [[] for _ in pruned_inputs["input_ids"]]
    for _ in range(number):
        states = twins.stock.model.language_model(**given).last_hidden_state
        new = twins.stock.lm_head(states[:, -1])[:, :TEXT_TOKENS].argmax(-1)
        for answer, token in zip(answers, new.tolist(), strict=True):
            answer.append(token)
        rows = len(new)
        embedded = twins.stock.model.get_input_embeddings()(new)[:, None]
        given["inputs_embeds"] = torch.cat((given["inputs_embeds"], embedded), dim=1)
        given["attention_mask"] = torch.cat((given["attention_mask"], torch.ones(rows, 1, dtype=torch.int64)), dim=1)
        given["position_ids"] = torch.cat((given["position_ids"], given["position_ids"][..., -1:] + 1), dim=2)
        if "visual_pos_masks" in given:
            is_text = torch.zeros(rows, 1, dtype=torch.bool)
            given["visual_pos_masks"] = torch.cat((given["visual_pos_masks"], is_text), dim=1)
    return answers


def qwen_processor(family: str, pruning: Any = None, **image_processing: Any) -> Any:
    """Our processor of a family, of the geometry of the tiny models; images have 4 to 400 tokens unless `size` is given."""
    patch = CONFIGS[family]["vision_config"].get("patch_size", 16 if family == "qwen3_vl" else 14)
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 400 * (2 * patch) ** 2}
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch, **{"size": size, **image_processing})
    processor = OURS[family][0].family.classes.processor
    return processor(
        image_processor=image_processor,
        tokenizer=qwen_tokenizer(),
        chat_template=CHAT_TEMPLATE,
        pruning_config=pruning,
        **video_part(processor, patch_size=patch),
    )


def save_qwen_checkpoint(
    folder: Any,
    family: str,
    pruning: Any = None,
    sharp: bool = False,
    text_config: Mapping[str, Any] | None = None,
    **image_processing: Any,
) -> tuple[Any, Any]:
    """A pruned checkpoint, model and processor, whose tokens are those of the tokenizer; returns both.

    With `sharp` weights are far from zero, so that answers differ between images and methods. `text_config` is of the language
    model, on top of the small one's.
    """
    processor = qwen_processor(family, pruning, **image_processing)
    config, model = OURS[family]
    ids = token_ids(processor.tokenizer)
    values = {**CONFIGS[family], **ids}
    end = processor.tokenizer.eos_token_id
    values["text_config"] = {
        **values["text_config"],
        "vocab_size": len(processor.tokenizer),
        "bos_token_id": None,
        "eos_token_id": end,
        **(text_config or {}),
    }
    torch.manual_seed(0)
    model = model(config(**values, pruning_config=pruning)).eval()
    if sharp:
        _sharpen(model)
    model.generation_config.suppress_tokens = list(ids.values())
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_stock_qwen_checkpoint(folder: Any, family: str, sharp: bool = False, **image_processing: Any) -> Any:
    """A stock checkpoint in files as the Hub has them; returns its folder."""
    model, _ = save_qwen_checkpoint(folder, family, sharp=sharp, **image_processing)
    stock_config, stock_model = STOCK[family]
    values = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "auto_map")}
    stock = stock_model(stock_config(**{name: value for name, value in values.items() if name != "pruning_config"}))
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    for file in folder.iterdir():
        file.unlink()
    stock.save_pretrained(folder)
    # Parts that no processor of ours has put its name into.
    parts = qwen_processor(family, **image_processing)
    for name in parts.get_attributes():
        getattr(parts, name).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder
