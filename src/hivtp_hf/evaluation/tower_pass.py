"""What `generate` is given of some images, under every variant: from one pass of the vision tower over the images.

Smaller images alone need passes of their own (`smaller_images`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.features import FIELDS_OF_IMAGES, prune_features
from ..pruning.layout import TokenLayout
from ..pruning.look import Look
from ..pruning.model import PrunedImageFeaturesOutput
from ..pruning.registry import pruning_method
from ..pruning.settings import VisualTokenPruningConfig
from ..pruning.stages import tokens_of_layers


def see(
    model: Any, inputs: Mapping[str, Any], prunings: Iterable[VisualTokenPruningConfig], layers: Sequence[int] = ()
) -> Look:
    """Runs the vision tower once over some images, and takes along what all methods look at.

    Args:
        model: a pruned model with a language modelling head. Its own settings play no part.
        inputs: of the processor for the images.
        prunings: the settings of all methods.
        layers: encoder layers whose attention is taken along besides.

    Raises:
        ValueError: for settings that do not fit the tower, and where features or scores are not finite.
    """
    look = model.look(inputs, prunings=list(prunings), layers=layers)
    check_finite("the vision tower's visual features", look.features)
    for scores in (look.received, look.class_attention):
        check_finite("the vision tower's attention scores", scores.values())
    return look


class KeptTokens(NamedTuple):
    """What enters the language model of one image.

    Attributes:
        encoded: the image alone, as the model's `get_image_features` returns it under the variant's settings.
        patches: how many of its tokens show a part of the image.
        newlines: how many are newlines. What is neither is a class token, or with `exact_count=False` a placeholder without a
            token.
        tokens_per_layer: how many of its tokens a layer of the language model sees, the mean of all layers.
        inputs: what the model is told of the image beside features, such as its grid of patches: a row each, by name.
    """

    encoded: PrunedImageFeaturesOutput
    patches: int
    newlines: int
    tokens_per_layer: float
    inputs: Mapping[str, Tensor]

    @property
    def features(self) -> Tensor:
        """(tokens, hidden), in order, one for each placeholder."""
        return self.encoded.pooler_output[0]


@torch.no_grad()
def pruned_tokens(seen: Look, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """What the method of the layouts keeps of every image.

    Args:
        seen: the images.
        layouts: of every image, under one method's settings.

    Raises:
        ValueError: where the method keeps other tokens than its settings say: what is broken must not pass for a bad method.
    """
    num_layers = seen.base.config.get_text_config().num_hidden_layers
    pruned = prune_features(seen.evidence(layouts[0].pruning, layouts), _streams(seen), num_layers)
    kept, encoded = pruned["kept_indices"], PrunedImageFeaturesOutput(**pruned)
    patches = [check_kept_indices(indices, layout) for indices, layout in zip(kept, layouts, strict=True)]
    return [
        KeptTokens(
            _of_image(encoded, image),
            patches[image],
            len(kept[image]) - patches[image] - layout.num_class_tokens,
            sum(tokens_of_layers(layout, num_layers)) / num_layers,
            _inputs_of_image(seen, image),
        )
        for image, layout in enumerate(layouts)
    ]


def _streams(seen: Look) -> dict[str, Any]:
    return {"pooler_output": seen.features, **(seen.further_streams or {})}


def _of_image(encoded: PrunedImageFeaturesOutput, image: int) -> PrunedImageFeaturesOutput:
    """One of several images."""
    own: dict[str, Any] = {"pooler_output": [encoded.pooler_output[image]]}
    if encoded.deepstack_features is not None:
        own["deepstack_features"] = [[layer[image]] for layer in encoded.deepstack_features]
    values = {name: getattr(encoded, name) for name in FIELDS_OF_IMAGES}
    return PrunedImageFeaturesOutput(**own, **{name: None if of is None else [of[image]] for name, of in values.items()})


def _inputs_of_image(seen: Look, image: int) -> dict[str, Tensor]:
    """What says how the image lies; its pixels are encoded."""
    names = seen.base.family.image_inputs[1:]
    return {name: seen.arguments[name][image : image + 1] for name in names if name in seen.arguments}


def together(images: Sequence[KeptTokens]) -> dict[str, Any]:
    """The arguments of `generate` that say what some images are, in the order of their placeholders.

    Args:
        images: under one variant, each with a placeholder at least; none is a prompt of text.
    """
    if not images:
        return {}
    parts = [image.encoded for image in images]
    values: dict[str, Any] = {}
    for name in ("pooler_output", *FIELDS_OF_IMAGES):
        of_parts = [getattr(part, name) for part in parts]
        values[name] = None if of_parts[0] is None else [value for of_part in of_parts for value in of_part]
    if parts[0].deepstack_features is not None:
        layers = zip(*(part.deepstack_features for part in parts), strict=True)
        values["deepstack_features"] = [[value for of_part in layer for value in of_part] for layer in layers]
    inputs = {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs}
    return {"mm_encoder_outputs": {"image": PrunedImageFeaturesOutput(**values)}, **inputs}


def base_tile_tokens(seen: Look, layouts: Sequence[TokenLayout]) -> list[KeptTokens]:
    """The base tile of every image of LLaVA-NeXT, which stock packs first: no crop, no newline."""
    return [
        KeptTokens(
            PrunedImageFeaturesOutput(pooler_output=[features[: layout.valid_per_view[0]]]),
            layout.valid_per_view[0],
            0,
            layout.valid_per_view[0],
            _inputs_of_image(seen, image),
        )
        for image, (features, layout) in enumerate(zip(seen.features, layouts, strict=True))
    ]


def check_kept_indices(kept: Tensor, layout: TokenLayout) -> int:
    """How many patch tokens are kept; a ValueError where the kept positions are not what the layout's settings say.

    Args:
        kept: int64 (n,), positions in the packed sequence.
        layout: of the image.
    """
    cells, wanted = len(layout.cells(kept)), sum(layout.group_totals)
    newlines = len(kept) - cells - layout.num_class_tokens
    fits = cells == wanted if layout.pruning.exact_count else cells <= wanted
    if pruning_method(layout.pruning.method).counts_newlines:  # which of them stay is for the method to say
        fits = len(kept) == layout.num_retained if layout.pruning.exact_count else len(kept) <= layout.num_retained
    elif newlines != layout.num_newlines:
        fits = False
    if not fits or not bool((kept.diff() > 0).all()):
        raise ValueError(
            f"the method {layout.pruning.method!r} keeps {cells} patch tokens and {newlines} newlines, or not in their order; "
            f"{wanted} and {layout.num_newlines} were to be kept, ascending. Its selector is broken."
        )
    return cells


def check_finite(what: str, values: Iterable[Tensor]) -> None:
    """A ValueError unless all values are numbers; `what` names them."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"{what} are not finite. Load the model in another dtype, such as float32 or bfloat16.")
