"""Refuses ways of generating in which the installed transformers release itself goes wrong with images.

Some releases answer wrongly without a word, others stop with an error that names no way out. Each limit says which
release first does it right. It applies where the installed one lacks the ability: that is looked for, and no version
number is compared, so that a patched release counts as well.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .call_arguments import takes_encoded_images

# The first releases that do it right, found by trying each release from 5.6.0 to 5.23.0.
SEVERAL_IMAGES_REPEATED = "5.19.0"
CHUNKED_PREFILL = "5.23.0"
TEXT_ONLY_ASSISTANT = "5.18.0"


def repeats_images_by_prompt(model: Any) -> bool:
    """Whether a prompt that is repeated, for beams or several returns, takes its images along in their order.

    Asked of two images A and B: repeated twice they must come as A B A B, and come as A A B B in older releases.

    Args:
        model: a model with a language modelling head; its weights are not used.
    """
    placeholder = model.config.image_token_id
    features = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    # Releases that do not know encoded images leave them as they are: two of them, which is wrong as well.
    _, repeated = model._expand_inputs_for_generation(
        expand_size=2, input_ids=torch.tensor([[placeholder, placeholder]]), mm_encoder_outputs=encoded
    )
    return [feature.item() for feature in repeated["mm_encoder_outputs"]["image"].pooler_output] == [0, 1, 0, 1]


def prefills_images_in_chunks() -> bool:
    """Whether a prefill in chunks hands every chunk the features of its placeholders; older releases drop all images."""
    prefill = getattr(GenerationMixin, "_prefill", None)
    code = getattr(inspect.unwrap(prefill), "__code__", None) if prefill is not None else None
    # Nothing to look into means a release newer than those that were tried, and newer ones can.
    return code is None or "mm_encoder_outputs" in code.co_consts


def encodes_images_before_generating(model: Any) -> bool:
    """Whether generation encodes images first, and so need not hand pixels to an assistant that cannot take them."""
    return takes_encoded_images(type(model).forward)


def check_generation(model: Any, arguments: Mapping[str, Any], is_placeholder: Tensor | None) -> None:
    """Raises where the installed transformers release is known to go wrong. Prompts without an image are never refused.

    Args:
        model: the model that is to generate.
        arguments: those of its `generate` by name; under "kwargs" those that are not in its signature.
        is_placeholder: bool (batch, sequence), the image placeholders of the prompts; None where they are not known.

    Raises:
        ValueError: for beams or several returns with several images in a prompt, for a prefill in chunks with images, for
            an assistant that takes no images, or no ratio per call; each only where the installed release cannot do it.
            Names what was given, what works, and the first release that can.
    """
    images = _number_of_images(arguments["kwargs"])
    if images == 0:
        return

    repeats = {name: _setting(model, arguments, name) or 1 for name in ("num_beams", "num_return_sequences")}
    if max(repeats.values()) > 1 and _several_in_a_prompt(images, is_placeholder) and not repeats_images_by_prompt(model):
        given = " and ".join(f"`{name}` is {value}" for name, value in repeats.items() if value > 1)
        raise _refusal(
            f"{given}, with several images in a prompt",
            "gives the repeated prompts each other's images",
            SEVERAL_IMAGES_REPEATED,
            "give every prompt one image at most, or set `num_beams` and `num_return_sequences` to 1",
        )

    chunk = _setting(model, arguments, "prefill_chunk_size")
    if chunk is not None and not prefills_images_in_chunks():
        raise _refusal(
            f"`prefill_chunk_size` is {chunk}, with images",
            "drops the images from a prefill in chunks",
            CHUNKED_PREFILL,
            "set `prefill_chunk_size` to None",
        )

    assistant = arguments.get("assistant_model")
    if assistant is not None and not encodes_images_before_generating(model):
        lacking = None if _takes(assistant, "pixel_values") else "no images"
        if lacking is None and arguments["kwargs"].get("retention_ratio") is not None:
            lacking = None if _takes(assistant, "retention_ratio") else "no `retention_ratio`"
        if lacking is not None:
            raise _refusal(
                f"`assistant_model` is a {type(assistant).__name__}, which takes {lacking}",
                "hands it the images' inputs all the same",
                TEXT_ONLY_ASSISTANT,
                "use a pruned assistant of the same family, or none",
            )


def _refusal(given: str, fault: str, first_release: str, instead: str) -> ValueError:
    return ValueError(
        f"{given}: transformers {transformers.__version__} {fault}. The first release that works is {first_release} "
        f'(`pip install --upgrade "transformers>={first_release},<6"`). With the installed one, {instead}.'
    )


def _number_of_images(inputs: Mapping[str, Any]) -> int:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return len(encoded.pooler_output)
    pixel_values: Any = inputs.get("pixel_values")
    image_sizes: Any = inputs.get("image_sizes")
    if pixel_values is None:
        return 0
    # Sizes of another shape are refused by the model, with a better word than could be found here.
    names_images = isinstance(image_sizes, (list, tuple)) or getattr(image_sizes, "ndim", 0) == 2
    return len(image_sizes if names_images else pixel_values)


def _several_in_a_prompt(images: int, is_placeholder: Tensor | None) -> bool:
    # A prompt with placeholders holds at least one image, so more images than such prompts are several in one of them.
    return is_placeholder is not None and images > int(is_placeholder.any(1).sum())


def _setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """What `generate` will go by: its keyword, else the given configuration, else the model's own."""
    if name in arguments["kwargs"]:
        return arguments["kwargs"][name]
    given = getattr(arguments.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _takes(model: Any, name: str) -> bool:
    functions = (model.forward, model.prepare_inputs_for_generation)
    return any(name in inspect.signature(function).parameters for function in functions)
