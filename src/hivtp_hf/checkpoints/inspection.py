"""`inspect_checkpoint`: tokens, prefill FLOPs and KV bytes of a checkpoint, stock against pruned, without its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..pruning.stages import stages_of_language_model, tokens_of_layers
from ..remote_code import read_bundle
from .checkpoint_source import CheckpointSource, open_source
from .language_model_cost import kv_cache_bytes, prefill_flops

# Heights and widths of images: a square, two photographs, and much padding. All of LLaVA-NeXT's shapes of crops occur.
EXAMPLE_SIZES = ((672, 672), (480, 640), (300, 451), (1000, 300), (100, 1000))


@dataclass(frozen=True)
class SizeReport:
    """Images of one size.

    Attributes:
        height, width: of the image in pixels.
        stock_tokens, retained_tokens: tokens of one image that enter the language model, newlines included.
        stages: where `stages` drop more, for each the decoder layer and the tokens that it and those behind it see.
        average_retention: tokens that a decoder layer sees over those that it sees in stock, the mean of all layers.
        newlines: of them newline tokens, retained.
        stock_prefill_flops, prefill_flops: of the language model on the image's tokens alone, without the vision tower, which
            does the same work either way.
        stock_kv_bytes, kv_bytes: of the cache, for the image's tokens alone.
    """

    height: int
    width: int
    stock_tokens: int
    retained_tokens: int
    stages: list[dict[str, int]]
    average_retention: float
    newlines: int
    stock_prefill_flops: int
    prefill_flops: int
    stock_kv_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint and what its settings mean.

    Attributes:
        checkpoint: its name.
        model_type: as its config.json says.
        base_model: the base of one without weights.
        remote_code: what its Python file says of itself, as `BundledCode`, and whether that is so; None where it has none, or
            one that no release since has written.
        pruning_config: the settings.
        cache_dtype: of the counted cache.
        sizes: of images.
    """

    checkpoint: str
    model_type: str
    base_model: dict[str, str | None] | None
    remote_code: dict[str, Any] | None
    pruning_config: dict[str, Any]
    cache_dtype: str
    sizes: list[SizeReport]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON types."""
        return asdict(self)


def inspect_checkpoint(
    checkpoint: str,
    sizes: Sequence[tuple[int, int]],
    pruning: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> CheckpointReport:
    """What a checkpoint keeps of images of some sizes, and what that saves. Reads its configuration alone.

    Args:
        checkpoint: a folder or `owner/name` on the Hub, stock or pruned.
        sizes: (height, width) in pixels.
        pruning: settings to change, as for `convert_checkpoint`.
        revision, token, cache_dir: for a checkpoint on the Hub, as for `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: for settings that are out of range or do not fit, and for what is no checkpoint of a supported family.
    """
    source = open_source(checkpoint, revision=revision, token=token, cache_dir=cache_dir)
    settings = source.settings().replace(**(pruning or {}))
    model = source.base_without_weights(settings)
    config = model.config
    text_config = config.get_text_config()
    dtype = next((given for given in (config.dtype, text_config.dtype) if isinstance(given, torch.dtype)), torch.bfloat16)

    reports = []
    for height, width in sizes:
        layout = model.token_layout(height, width, settings)
        num_layers = text_config.num_hidden_layers
        kept = tokens_of_layers(layout, num_layers)
        stages = [{"layer": layer, "tokens": kept[layer]} for layer, _ in stages_of_language_model(layout.pruning, num_layers)]
        flops = [prefill_flops(text_config, tokens) for tokens in (layout.num_stock, kept)]
        cache = [kv_cache_bytes(text_config, tokens, dtype) for tokens in (layout.num_stock, kept)]
        reports.append(
            SizeReport(
                height,
                width,
                layout.num_stock,
                layout.num_retained,
                stages,
                sum(kept) / num_layers / layout.num_stock,
                layout.num_newlines,
                *flops,
                *cache,
            )
        )
    dtype_name = str(dtype).removeprefix("torch.")
    base = None if source.base is None else source.base.to_dict()
    return CheckpointReport(
        source.name, source.config["model_type"], base, _remote_code(source), settings.to_dict(), dtype_name, reports
    )


def _remote_code(source: CheckpointSource) -> dict[str, Any] | None:
    path = source.folder / f"{source.family.classes.config.model_type}.py"
    code = read_bundle(path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if code is None else code._asdict()
