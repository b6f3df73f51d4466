"""What differs between transformers releases, asked of the installed one.

Everything that a release may call otherwise is asked for here: arguments, fields of outputs, private names, where rules for
checkpoint keys are registered. What is asked is whether the installed release has a name or an ability, never which version
it is, so that a patched release counts as what it can do. The one version here is the oldest that is accepted.

Names that are imported fail loudly once they are gone, so they stand where they are used. Modeling code of transformers is
imported where it is needed: configurations and processors load without it.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .prompt_columns import COLUMN_ARGUMENTS

OLDEST_TRANSFORMERS = (5, 19)

# What transformers calls itself, by these names, and our classes override. A release that renames one would no longer call
# ours, without a word, so a test holds each to the installed release.
OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    "GenerationMixin": ("_get_candidate_generator",),
    "PreTrainedModel": ("_from_config", "initialize_weights"),
    "PreTrainedConfig": ("_upload_modified_files",),
    "ProcessorMixin": ("_get_arguments_from_pretrained", "_load_tokenizer_from_pretrained", "_upload_modified_files"),
    "LlavaNextProcessor": ("_get_num_multimodal_tokens", "_get_number_of_features"),
    "LlavaOnevisionProcessor": ("_get_num_multimodal_tokens", "replace_image_token", "replace_video_token"),
    "LlavaProcessor": ("_get_num_multimodal_tokens", "replace_image_token"),
}

# How models call their cache, as an argument of `forward` and as a field of outputs. The newest name comes first.
_CACHE_NAMES = ("cache", "past_key_values")


def check_transformers_version(version: str) -> None:
    """ImportError for releases before the oldest that is accepted, naming the installed one and that one.

    Remote code meets whatever release is installed, and an older one would load these classes wrongly without an error.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"HIVTP checkpoints need transformers {oldest} or later; {version} is installed. "
            f'Run `pip install --upgrade "transformers>={oldest},<6"`.'
        )


check_transformers_version(transformers.__version__)


@functools.cache
def parameters_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function, read once."""
    return inspect.signature(function)


@torch.compiler.disable
def named_arguments(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, whatever the release's order of parameters."""
    arguments = dict(parameters_of(function).bind(model, *args, **kwargs).arguments)
    arguments.pop("self")
    return {**arguments, **arguments.pop("kwargs", {})}


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name by which a stock `forward` takes a cache.

    Raises:
        RuntimeError: where it has none of the names that are known. To go on would lose the cache without a word.
    """
    known = [name for name in _CACHE_NAMES if name in parameters_of(forward).parameters]
    if not known:
        raise RuntimeError(_unknown_cache(f"`{forward.__qualname__}` takes", parameters_of(forward).parameters))
    return known[0]


def with_cache_named(name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call with the cache, under whichever name it was given, as `name`. Two are left for stock to refuse."""
    given = [known for known in _CACHE_NAMES if known in keywords]
    if given in ([], [name]) or len(given) > 1:
        return keywords
    # Before 5.24 continuous batching hands its own cache, of another class, through models to attention, and calls it `cache`.
    if name != _CACHE_NAMES[0] and not isinstance(keywords[given[0]], transformers.Cache | None):
        return keywords
    return {name if keyword == given[0] else keyword: value for keyword, value in keywords.items()}


def cache_among(keywords: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or None. That of continuous batching, which has no one length, is none."""
    return next((keywords[name] for name in _CACHE_NAMES if hasattr(keywords.get(name), "get_seq_length")), None)


def cache_of(output: Any) -> Any:
    """The cache of an output of `forward` or `generate`, or None where it holds none.

    Raises:
        RuntimeError: where the output has none of the fields that are known.
    """
    fields = [field.name for field in dataclasses.fields(output)]
    known = [name for name in _CACHE_NAMES if name in fields]
    if not known:
        raise RuntimeError(_unknown_cache(f"`{type(output).__name__}` has", fields))
    return getattr(output, known[0])


def put_cache(output: Any, cache: Any) -> None:
    """Sets the cache of an output of `forward`; RuntimeError as `cache_of`."""
    cache_of(output)
    name = next(name for name in _CACHE_NAMES if name in (field.name for field in dataclasses.fields(output)))
    setattr(output, name, cache)


def install_recording_hooks(model: Any) -> None:
    """Lets the modules of a model record hidden states and attention, as stock does at the first call that asks for them.

    Asked of a copy that shares modules, stock would put further hooks on them at every call.
    """
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    maybe_install_capturing_hooks(model)


def _unknown_cache(holder: str, names: Any) -> str:
    return (
        f"{holder} no {' or '.join(map(repr, _CACHE_NAMES))}, only {', '.join(names)}: transformers {transformers.__version__} "
        "calls caches otherwise. Install a release that this package was tested with, see its pyproject.toml."
    )


def with_stock_signature(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a `forward` that stands for a stock one: its signature and documentation, and our arguments in addition.

    The signature tells others what they may pass: generate() and Trainer drop or refuse what it does not name. A cache may be
    given under any name that a supported release has for it, and arrives under the installed release's.
    """
    cache = cache_argument(stock)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **with_cache_named(cache, kwargs))

        parameters = list(inspect.signature(stock).parameters.values())
        names = ("retention_ratio", *COLUMN_ARGUMENTS)
        ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        behind = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        forward.__signature__ = inspect.Signature([*parameters[: len(parameters) - len(behind)], *ours, *behind])  # type: ignore[attr-defined]
        return forward

    return decorate


def prefills_images_in_chunks() -> bool:
    """Whether a prefill in chunks hands every chunk the features of its placeholders, as from 5.23.0.

    Older releases drop all images without a word.
    """
    prefill = getattr(transformers.GenerationMixin, "_prefill", None)
    code = getattr(inspect.unwrap(prefill), "__code__", None) if prefill is not None else None
    # Nothing to look into means a release newer than those that were tried, and newer ones can.
    return code is None or "mm_encoder_outputs" in code.co_consts


def side_of(size: Any, name: str) -> Any:
    """A side in pixels of an image processor's `size` or `crop_size`, which are dicts or objects; None where it has none."""
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def found_file(name: Any, filename: str, where: Mapping[str, Any]) -> str | None:
    """The path of a file of a checkpoint; None where there is none, also for reasons that loading will report better.

    Args:
        name: a folder, or a repository on the Hub.
        filename: its path there.
        where: arguments of from_pretrained that say where and how to look.
    """
    quietly = ("gated_repo", "missing_entries", "connection_errors")
    try:
        return cached_file(name, filename, **{f"_raise_exceptions_for_{reason}": False for reason in quietly}, **where)
    except OSError:
        return None


def commit_of(path: str | os.PathLike) -> str | None:
    """The commit of a file in the cache of the Hub, 40 hexadecimal digits; None for a file that lies elsewhere."""
    return extract_commit_hash(str(path), None)


def encoder_layer_class() -> type:
    """The class of which every layer of transformers' vision encoders is."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def take_stock_keys_of_classes(classes: Mapping[str, str]) -> None:
    """Lets checkpoints of our classes rename their keys as those of the stock classes that they are named with.

    A class without rules of its own in this release goes by those of no one: stock reads its keys as they are.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

    for ours, stock in classes.items():
        rules = get_checkpoint_conversion_mapping(stock)
        if rules:
            register_checkpoint_conversion_mapping(ours, rules, overwrite=True)


@functools.cache
def take_stock_keys(model_type: str, stock_type: str) -> None:
    """Lets checkpoints of `model_type` rename their keys as those of the stock `stock_type`.

    transformers renames by model type and by class, and knows only its own. Ours takes stock's rules, preceded by two: one
    carries the Hub's vision keys into the base model as well, one says of the language model what some releases say of
    stock's class.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightRenaming(r"^vision_tower\.vision_model\.", "model.vision_tower."),
            WeightRenaming(r"^language_model\.model\.", "model.language_model."),
            *(get_checkpoint_conversion_mapping(stock_type) or []),
        ],
        overwrite=True,
    )
