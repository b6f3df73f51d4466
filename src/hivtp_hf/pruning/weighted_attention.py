"""Attention in which some keys weigh more than others, without a mask of (queries x keys) where that can be avoided.

A key's weight w adds log w to its logits under every query: one number a key. The language model gets it as its attention
mask, which transformers hands on to the layers as it is once it has four dimensions:

* (batch, 1, 1, keys) for a single query, as in every step of a generation: any implementation adds it.
* (batch, keys, 1, 1) for a prefill under sdpa: a shape of ours, at which stock would stop. The attention modules find our
  function, which adds it by key and leaves the causal part to sdpa.
* stock's own mask of blocks under flex_attention, which our function finds the weights beside, and adds them by key.
* (batch, keys, 1, 1 or 2) under flash attention, again a shape of ours: flash takes no numbers that are added to logits, so
  our function writes them into further dimensions of queries and keys. The second plane, where there is padding, says so.
* (batch, 1, queries, keys) in all else: eager, which holds as many scores anyway; several queries behind a filled cache;
  compiled prefills; and dropout, under which sdpa has no kernel for both.

Source: ours.
"""

import threading
import uuid
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .attention_interface import eager_attention_of
from .compat import cache_argument
from .config_views import ConfigView, ModuleView

_WEIGHTED_NAME = f"hivtp_weighted_attention_{uuid.uuid4().hex}"
# With others it was not tried, or it is known to read positions in another way.
WEIGHTED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
# Language models whose `forward` does nothing before and behind its layers that depends on which layers these are.
STAGED_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
# The width of a head that flash attention takes at most, and what it must be a multiple of.
_WIDEST_FLASH_HEAD, _FLASH_HEAD_STEP = 256, 8
# Two further dimensions hold the weights: what bfloat16 keeps of them, and the rest.
_WEIGHT_DIMENSIONS = 2
_attaching = threading.Lock()


def check_language_model_can_mark(text_config: Any, pruning: Any) -> None:
    """Refuses language models that token weights, original positions and stages were not proven right for.

    Args:
        text_config: the language model's configuration.
        pruning: settings with weights, places or stages.

    Raises:
        ValueError: for attention implementations other than eager, sdpa, flex_attention and flash attention 2 and 3; under
            flash attention for heads that have no room for weights, and for capped logits; and for layers that see a window
            alone, whose edge would be counted among kept tokens.
    """
    wanted = f"`token_weights` is {pruning.token_weights!r}, `positions` {pruning.positions!r} and `stages` {pruning.stages!r}"
    back = "or set `token_weights='none'`, `positions='packed'` and no `stages`"
    if pruning.drops_in_stages and text_config.model_type not in STAGED_LANGUAGE_MODELS:
        raise ValueError(
            f"`stages` is {pruning.stages!r}, and the language model's type {text_config.model_type!r}. Its layers were not "
            f"tried in segments; those of {', '.join(STAGED_LANGUAGE_MODELS)} were. Use one of these, or set no `stages`."
        )
    # Continuous batching wraps the implementation, and takes no images.
    implementation = str(text_config._attn_implementation).removeprefix("paged|")
    is_flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    # Version 4 has kernels for some widths alone.
    is_newer = is_flash_attention_requested(requested_attention_implementation=implementation, version=4)
    if implementation not in WEIGHTED_IMPLEMENTATIONS and (not is_flash or is_newer):
        raise ValueError(
            f"{wanted}, and the language model's attention implementation {text_config._attn_implementation!r}, which takes "
            f"neither a weight for each key nor positions with gaps. Call `model.set_attn_implementation('sdpa')` (allowed: "
            f"{', '.join(WEIGHTED_IMPLEMENTATIONS)}, flash_attention_2, flash_attention_3), {back}."
        )
    if is_flash:
        _check_flash_can_weigh(text_config, f"{wanted} under {implementation!r}", back)
    for name in ("sliding_window", "attention_chunk_size"):
        size = getattr(text_config, name, None)
        kinds = getattr(text_config, "layer_types", None)
        if size is not None and (kinds is None or any(kind != "full_attention" for kind in kinds)):
            raise ValueError(
                f"{wanted}, and the language model has a `{name}` of {size}, which would be counted in kept tokens. Use a "
                f"checkpoint whose layers see everything, {back}."
            )


def _check_flash_can_weigh(text_config: Any, wanted: str, back: str) -> None:
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if _weighted_width(head) > _WIDEST_FLASH_HEAD:
        raise ValueError(
            f"{wanted}, and heads of {head} dimensions. With those for weights they have {_weighted_width(head)}, and flash "
            f"attention takes {_WIDEST_FLASH_HEAD}. Call `model.set_attn_implementation('sdpa')`, {back}."
        )
    cap = getattr(text_config, "attn_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{wanted}, and logits that are capped at {cap}: flash attention would cap them with their weights. Call "
            f"`model.set_attn_implementation('eager')`, {back}."
        )


def _weighted_width(head: int) -> int:
    """The width of a head of so many dimensions with those for weights."""
    return -(-(head + _WEIGHT_DIMENSIONS) // _FLASH_HEAD_STEP) * _FLASH_HEAD_STEP


def needs_own_mask(text_config: Any, pruning: Any) -> bool:
    """Whether a call under these settings takes the mask of `mask_with_weights`.

    Flash attention would take gaps in positions by themselves for the ends of sequences packed into a row. Our function, which
    that mask leads to, does not hand them on.
    """
    has_gaps = pruning.positions != "packed" or pruning.drops_in_stages
    return pruning.weighs_tokens or (has_gaps and is_flash_attention_requested(config=text_config))


class _WeightedConfigView(ConfigView):
    """The configuration of an attention module of the language model, naming `_attention_by_key`.

    Besides: `_hivtp_eager`, what runs where the configuration names "eager".
    """

    _attn_implementation = _WEIGHTED_NAME


def let_keys_weigh(language_model: nn.Module, num_layers: int) -> None:
    """Lets the attention modules of a language model read weights by key; without them they compute what they did. Idempotent.

    Raises:
        ValueError: if there is not one attention module a layer that is recognised.
    """
    with _attaching:
        found = _attention_modules(language_model)
        if len(found) != num_layers:
            raise ValueError(
                f"{type(language_model).__name__} has {len(found)} attention modules that are recognised, and {num_layers} "
                "layers. Token weights need one a layer, as Llama, Mistral and Qwen2 have; set `token_weights='none'`."
            )
        for module in found:
            if not isinstance(module.config, _WeightedConfigView):
                module.config = _WeightedConfigView(module.config, eager=eager_attention_of(module))


def _attention_modules(language_model: nn.Module) -> list[Any]:
    """Its attention modules. Every step of a generation asks, so what lies inside of them is not looked at."""
    found: list[Any] = []
    ahead: list[Any] = [language_model]
    while ahead:
        module = ahead.pop()
        if "config" in vars(module) and hasattr(module, "is_causal"):
            found.append(module)
        else:
            ahead += [child for child in module._modules.values() if child is not None]  # `children` takes twice as long
    return found


def mask_with_weights(
    mask: Any,
    log_weights: Tensor,
    cache: Any,
    cached: int,
    new: int,
    dtype: torch.dtype,
    text_config: Any,
    is_compiled: bool,
) -> Any:
    """The attention mask of a call of the language model in which keys weigh.

    Args:
        mask: of the call: None, (batch, cached + new) with 0 for padding, or one of four dimensions, or such by kind of layer.
        log_weights: float (batch, columns) of the first columns; those behind weigh 1.
        cache: of the call, or None.
        cached: positions that it holds.
        new: positions that enter the language model.
        dtype: of what enters it.
        text_config: the language model's configuration.
        is_compiled: whether a compiler traces what comes behind.

    Raises:
        ValueError: for masks of another kind or size.
    """
    keys = new if cache is None else cache.get_mask_sizes(new, 0)[0]
    by_key = torch.nn.functional.pad(log_weights, (0, max(0, keys - log_weights.shape[1])))[:, :keys].to(dtype)
    if is_flash_attention_requested(config=text_config):
        return _planes_of_keys(mask, log_weights, cached + new)
    if text_config._attn_implementation == "flex_attention":
        return _blocks_with_weights(mask, by_key, cache, new, text_config)
    if isinstance(mask, dict):
        return {kind: _added(of_kind, by_key) for kind, of_kind in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _added(mask, by_key)
    lowest = torch.finfo(dtype).min
    if isinstance(mask, Tensor) and mask.ndim == 2:
        seen = mask.shape[1]
        _check_columns(seen, cached + new)
        is_padding = torch.nn.functional.pad(mask == 0, (0, max(0, keys - seen)))[:, :keys].to(by_key.device)
        # Half of it, so that nothing overflows where a logit is added.
        by_key = by_key.masked_fill(is_padding, lowest / 2)
    elif mask is not None:
        raise ValueError(
            f"`attention_mask` is a {type(mask).__name__}; with `token_weights` it must be None or a tensor of 2 or 4 axes."
        )
    is_prefill = new > 1 and cached == 0
    if is_prefill and text_config._attn_implementation == "sdpa" and not is_compiled:
        return by_key[:, :new, None, None]
    places = torch.arange(keys, device=by_key.device)
    last_seen = torch.arange(new, device=by_key.device)[:, None] + cached
    return torch.where(places <= last_seen, by_key[:, None, None], lowest)


def _check_columns(given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(
            f"`attention_mask` has {given} columns; with `token_weights` or original `positions` it must have {wanted}, one "
            "for each position that is cached or new."
        )


def _planes_of_keys(mask: Any, log_weights: Tensor, keys: int) -> Tensor:
    """What `_flash_attention` reads: float32 (batch, keys, 1, 1 or 2), log weights and, where there is padding, 0 at it."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        found = f"{mask.ndim} axes" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        raise ValueError(
            f"`attention_mask` has {found}; with `token_weights` or original `positions` under flash attention give one of 2, "
            "(batch, positions), None, or call `model.set_attn_implementation('sdpa')`."
        )
    planes = [torch.nn.functional.pad(log_weights, (0, max(0, keys - log_weights.shape[1])))[:, :keys].float()]
    if mask is not None:
        _check_columns(mask.shape[1], keys)
        if not bool(mask.all()):
            planes.append(mask.to(planes[0]))
    return torch.stack(planes, dim=-1)[:, :, None]


def _blocks_with_weights(mask: Any, by_key: Tensor, cache: Any, new: int, text_config: Any) -> Any:
    """Stock's mask of blocks for flex_attention, with the weights as its attribute."""
    if isinstance(mask, dict):
        return {kind: _blocks_with_weights(of_kind, by_key, cache, new, text_config) for kind, of_kind in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        raise ValueError(
            "`attention_mask` has 4 axes; with `token_weights` under flex_attention give one of 2, (batch, positions), None, "
            "or call `model.set_attn_implementation('sdpa')`."
        )
    if mask is None or isinstance(mask, Tensor):
        embeddings = by_key.new_empty(len(by_key), new, 0)
        taken = {cache_argument(create_causal_mask): cache}
        mask = create_causal_mask(config=text_config, inputs_embeds=embeddings, attention_mask=mask, **taken)
    mask.hivtp_by_key = by_key
    return mask


def _added(mask: Any, by_key: Tensor) -> Any:
    if not isinstance(mask, Tensor):
        raise ValueError(f"an attention mask is a {type(mask).__name__}; `token_weights` cannot be added to it. Give a tensor.")
    if mask.dtype == torch.bool:
        return torch.where(mask, by_key[:, None, None], torch.finfo(by_key.dtype).min)
    return mask + by_key[:, None, None]


def _attention_by_key(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Registered with transformers' attention interface; query, key and value are (batch, heads, tokens, head_dim)."""
    view = module.config
    config = view._hivtp_config
    name = config._attn_implementation  # looked up once: every layer of every step comes here
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(name, view._hivtp_eager)
    if is_flash_attention_requested(requested_attention_implementation=name):
        shown = ModuleView(module, config)
        return _flash_attention(implementation, shown, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)  # which autocast may have changed
    beside = getattr(attention_mask, "hivtp_by_key", None)
    if beside is not None:
        # A view that takes no memory: one row, under every head and query.
        beside = beside.to(query.dtype)[:, None, None].expand(-1, *query.shape[1:3], -1)
        return implementation(
            ModuleView(module, config), query, key, value, attention_mask, *args, **kwargs, position_bias=beside
        )
    if not _is_by_key(attention_mask, query):
        return implementation(ModuleView(module, config), query, key, value, attention_mask, *args, **kwargs)
    new = query.shape[2]
    by_key = attention_mask.view(-1, 1, 1, new)
    key, value = key[:, :, :new], value[:, :, :new]  # a static cache has room behind
    scaling, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    groups = query.shape[1] // key.shape[1]
    try:
        output = nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1) if groups > 1 else key,
            value.repeat_interleave(groups, dim=1) if groups > 1 else value,
            attn_mask=by_key,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
    except RuntimeError as error:
        # Its plain kernel, which runs with dropout for one, takes either a mask or a causal flag.
        if "is_causal" not in str(error):
            raise
        is_seen = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()
        dense = torch.where(is_seen, by_key, torch.finfo(query.dtype).min)
        return implementation(ModuleView(module, config), query, key, value, dense, *args, **kwargs)
    return output.transpose(1, 2).contiguous(), None


def _flash_attention(
    implementation: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, planes: Any, *args: Any, **kwargs: Any
) -> Any:
    """Flash attention with the weights in further dimensions: 1 in queries, the weight over `scaling` in keys, 0 in values."""
    if not (isinstance(planes, Tensor) and planes.ndim == 4):
        return implementation(module, query, key, value, planes, *args, **kwargs)
    keys, head = planes.shape[1], query.shape[-1]
    key, value = key[:, :, :keys], value[:, :, :keys]  # a static cache has room behind
    scaling = kwargs.get("scaling")
    kwargs["scaling"] = scaling = head**-0.5 if scaling is None else scaling
    # At batch 1 it would take gaps in positions for the ends of sequences packed into a row.
    kwargs.pop("position_ids", None)
    bonus = planes[:, :, 0, 0].to(key.device)[:, None].expand(-1, key.shape[1], -1) / scaling
    # In two parts, as one number in bfloat16 would be off by up to 0.2 %. Queries may be cast to it behind this, too.
    coarse = bonus.bfloat16().float()
    empty = _weighted_width(head) - head - _WEIGHT_DIMENSIONS
    weights = nn.functional.pad(torch.stack((coarse, bonus - coarse), dim=-1), (0, empty))
    ones = nn.functional.pad(query.new_ones(*query.shape[:-1], _WEIGHT_DIMENSIONS), (0, empty))
    mask = planes[:, :, 0, 1].bool() if planes.shape[-1] > 1 else None
    output, _ = implementation(
        module,
        torch.cat((query, ones), dim=-1),
        torch.cat((key, weights.to(key.dtype)), dim=-1),
        nn.functional.pad(value, (0, _weighted_width(head) - head)),
        mask,
        *args,
        **kwargs,
    )
    return output[..., :head].contiguous(), None


def _is_by_key(attention_mask: Any, query: Tensor) -> bool:
    """Whether a mask has the shape of ours, (batch, keys, 1, 1), which as a mask of stock's would say nothing."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 4
        and query.shape[2] > 1
        and attention_mask.shape[1:] == (query.shape[2], 1, 1)
    )


AttentionInterface.register(_WEIGHTED_NAME, _attention_by_key)
