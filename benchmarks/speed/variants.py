"""The models that stand side by side, and what each does with an image and a prompt.

stock: transformers' LLaVA-NeXT, sdpa attention, every visual token.
limit: what no choice of tokens can beat. Stock's vision pass (tower, projector, packing) as it is; then stock's language model
    on as many embeddings as the pruned prompt has, of which the image's are the first ones of stock's features. Nothing is
    scored or chosen.
ours: hivtp_hf, one method at one ratio. Its tower ends behind the last layer that is read, where stock runs one more.
weighted: the same method at the same ratio, with token weights by cluster size and original positions.
published: an eager tower that returns its attention maps (`output_attentions=True`), hivtp_hf's selection from the maps of
    the same layers, then stock's language model. So selections are equal, and what differs is how scores come about.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hivtp_hf import Evidence, VisualTokenPruningConfig
from hivtp_hf.pruning.compat import cache_of
from hivtp_hf.pruning.registry import pruning_method

from .images import Images, prompt_ids, token_layout
from .models import Models
from .published_way import published_features

# Of the weighted variants, beside method and ratio.
_WEIGHTS_AND_POSITIONS = {"token_weights": "cluster_size", "positions": "original"}


@dataclass(frozen=True)
class Variant:
    """One of the models, and how much it keeps.

    Attributes:
        kind: "stock", "limit", "ours", "weighted" or "published".
        image_tokens: placeholders in the prompt for one image.
        method, ratio: of ours, weighted or not, and of the published way. A limit has the ratio that its length came from, and
            no method.
    """

    kind: str
    image_tokens: int
    method: str = ""
    ratio: float = 1.0

    def __str__(self) -> str:
        return " ".join([self.kind, self.method] if self.method else [self.kind]) + f" {self.image_tokens}"


@dataclass(frozen=True)
class FirstToken:
    """What is there once the first new token is known: its ids (batch,), on the device and as numbers, and the cache."""

    token: Tensor
    ids: list[int]
    cache: Any


def stock_variant(models: Models, size: tuple[int, int]) -> Variant:
    return Variant("stock", token_layout(models.config, size).num_stock)


def ours_variant(models: Models, size: tuple[int, int], method: str, ratio: float) -> Variant:
    return Variant("ours", token_layout(models.config, size, method, ratio).num_retained, method, ratio)


def limit_of(variant: Variant) -> Variant:
    """The limit of one of ours: of the same prompt length."""
    return Variant("limit", variant.image_tokens, ratio=variant.ratio)


def weighted_of(variant: Variant) -> Variant:
    """One of ours with weights and original positions."""
    return Variant("weighted", variant.image_tokens, variant.method, variant.ratio)


def published_of(variant: Variant) -> Variant:
    """The published way to the same selection."""
    return Variant("published", variant.image_tokens, variant.method, variant.ratio)


def has_published_way(method: str) -> bool:
    """Whether a method reads attention, so that maps are what its publication reads."""
    reads = pruning_method(method).reads(VisualTokenPruningConfig(method=method))[0]
    return bool(reads & {Evidence.RECEIVED_ATTENTION, Evidence.CLASS_ATTENTION})


def model_of(models: Models, variant: Variant) -> Any:
    """The model that runs a variant, with its settings."""
    if variant.kind in ("ours", "weighted"):
        told = _WEIGHTS_AND_POSITIONS if variant.kind == "weighted" else {}
        models.pruned.config.pruning_config = {"method": variant.method, "retention_ratio": variant.ratio, **told}
        return models.pruned
    return models.published if variant.kind == "published" else models.stock


@torch.inference_mode()
def image_features(models: Models, images: Images, variant: Variant) -> list[Tensor]:
    """The features of every image that enter the language model."""
    model = model_of(models, variant)
    if variant.kind == "published":
        return published_features(model, images, variant.method, variant.ratio)[0]
    # As in `forward`, where stock runs every layer of its tower, and ours those that something is read from.
    only_features = {"features_only": True} if variant.kind in ("ours", "weighted") else {}
    packed = model.get_image_features(images.pixel_values, images.image_sizes, **only_features).pooler_output
    return [features[: variant.image_tokens] for features in packed] if variant.kind == "limit" else list(packed)


@torch.inference_mode()
def model_inputs(models: Models, images: Images, variant: Variant) -> dict[str, Any]:
    """The arguments of `forward` or `generate`. Where stock cannot prune by itself, the image is encoded here."""
    ids = prompt_ids(models.config, variant.image_tokens, images.batch, models.device)
    mask = torch.ones_like(ids)
    if variant.kind in ("stock", "ours", "weighted"):
        pixels = {"pixel_values": images.pixel_values, "image_sizes": images.image_sizes}
        return {"input_ids": ids, "attention_mask": mask, **pixels}
    features = torch.cat(image_features(models, images, variant))
    embeddings = models.stock.get_input_embeddings()(ids)
    is_image = (ids == models.config.image_token_id)[..., None]
    return {"inputs_embeds": embeddings.masked_scatter(is_image, features), "attention_mask": mask}


@torch.inference_mode()
def first_token(models: Models, images: Images, variant: Variant) -> FirstToken:
    """From pixel values on the device to the first new token's ids on the host."""
    model = model_of(models, variant)
    output = model(**model_inputs(models, images, variant), use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1)
    return FirstToken(token, token.tolist(), cache_of(output))


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
