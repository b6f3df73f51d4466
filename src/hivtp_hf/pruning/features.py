"""What every model family shares: from scores and packed features to kept features, and the checks around that."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .evidence import Evidence, VisualEvidence, evidence_to_read, methods_of
from .layout import TokenLayout
from .registry import pruning_method
from .settings import VisualTokenPruningConfig
from .token_weights import log_weights


def check_pruning_fits_encoder(
    pruning: VisualTokenPruningConfig, num_layers: int, feature_layer: int, provided: Collection[Evidence]
) -> frozenset[Evidence]:
    """Refuses settings that an encoder cannot follow.

    Args:
        pruning: the model's settings.
        num_layers: depth of the vision encoder.
        feature_layer: the layer whose output is the visual feature.
        provided: the kinds of evidence that the model has.

    Returns:
        The kinds that the method reads.

    Raises:
        ValueError: for scored layers beyond the depth, and for a method that reads what the model does not have.
    """
    method = pruning_method(pruning.method)
    layers = pruning.scored_layers(feature_layer)
    if layers and not 0 <= layers[0] <= layers[-1] < num_layers:
        given = ", ".join(
            f"`{setting.name}` (given: {getattr(pruning, setting.name)})" for setting in method.settings if setting.is_layer
        )
        read = f"layer {layers[0]}" if layers[0] == layers[-1] else f"layers {layers[0]} to {layers[-1]}"
        raise ValueError(
            f"the method {pruning.method!r} reads the encoder {read}, but the vision tower has {num_layers} layers, 0 to "
            f"{num_layers - 1}. Change {given}."
        )
    kinds = evidence_to_read(pruning, provided)
    if kinds is None:
        missing = sorted(method.reads(pruning)[0] - set(provided), key=lambda kind: kind.name)
        others = ", ".join(map(repr, methods_of(provided)))
        raise ValueError(
            f"the method {pruning.method!r} reads {' and '.join(kind.words for kind in missing)}, but the vision tower has no "
            f"{' and no '.join(kind.source for kind in missing)}. Choose one of {others}."
        )
    return kinds


def gather_evidence(
    features: Sequence[Tensor], layouts: Sequence[TokenLayout], scores: Mapping[int, Tensor], feature_layer: int
) -> VisualEvidence:
    """What a method may look at, brought together from one pass of the vision tower.

    Args:
        features: of every image the stock features, (num_stock, hidden).
        layouts: of every image its layout, each under its own settings.
        scores: of every scored layer that of the cells, float32 (tiles of all images, grid, grid).
        feature_layer: the layer whose output is the visual feature.

    Raises:
        ValueError: where features do not fit the layouts.
    """
    for feature, layout in zip(features, layouts, strict=True):
        check_packed_length(feature, layout)
    device = next(iter(scores.values()), features[0]).device
    return VisualEvidence(
        layouts=layouts,
        valid=torch.cat([layout.valid for layout in layouts]).to(device),
        features=features,
        scores={layer: of_layer.to(device) for layer, of_layer in scores.items()},
        feature_layer=feature_layer,
    )


def prune_features(evidence: VisualEvidence) -> tuple[list[Tensor], list[Tensor]]:
    """Keeps of every image's packed features those that the method selects.

    Features are never recomputed, reordered or merged: the result is `features[i].index_select(0, kept_indices[i])`. With
    `exact_count=False` fewer may be kept than there are placeholders; zeros then fill up the front.

    Args:
        evidence: of all images of a call.

    Returns:
        The features (num_retained, hidden) and the ascending indices of those kept, int64, a list each. There are
        `num_retained` indices, or fewer with `exact_count=False`.
    """
    kept_cells: dict[int, Tensor] = {}
    for pruning, members in _images_by_pruning(evidence.layouts).items():
        seen = evidence.of_images(members)
        of_tiles = pruning_method(pruning.method).select(seen, pruning)
        kept_cells.update(zip(members, of_tiles.split([layout.num_tiles for layout in seen.layouts]), strict=True))

    kept_features, kept_indices = [], []
    for image, (feature, layout) in enumerate(zip(evidence.features, evidence.layouts, strict=True)):
        kept = layout.kept_indices(kept_cells[image].to(feature.device))
        surplus = feature.new_zeros(layout.num_retained - len(kept), feature.shape[1])
        kept_feature = feature.index_select(0, kept)
        kept_features.append(torch.cat((surplus, kept_feature)) if len(surplus) else kept_feature)
        kept_indices.append(kept)
    return kept_features, kept_indices


def weigh_features(evidence: VisualEvidence, kept_indices: Sequence[Tensor]) -> list[Tensor] | None:
    """What is added to the logits of the kept tokens' keys, float32 (num_retained,) for each image; None where all are alike.

    Args:
        evidence: of all images of a call.
        kept_indices: of every image the packed positions that are kept, as `prune_features` returns them.
    """
    if not evidence.layouts[0].pruning.weighs_tokens:
        return None
    of_image: dict[int, Tensor] = {}
    for members in _images_by_pruning(evidence.layouts).values():
        of_image.update(zip(members, log_weights(evidence, kept_indices, members), strict=True))
    return [of_image[image] for image in range(len(evidence.layouts))]


def _images_by_pruning(layouts: Sequence[TokenLayout]) -> dict[VisualTokenPruningConfig, list[int]]:
    """Images of equal settings, which can be chosen from together; ratios may differ from image to image."""
    groups: dict[VisualTokenPruningConfig, list[int]] = {}
    for image, layout in enumerate(layouts):
        groups.setdefault(layout.pruning, []).append(image)
    return groups


def keep_all_features(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
    """The indices of unpruned images: every position, as int64 (num_stock,) per image. ValueError as `gather_evidence`."""
    for feature, layout in zip(features, layouts, strict=True):
        check_packed_length(feature, layout)
    return [torch.arange(feature.shape[0], device=feature.device) for feature in features]


def check_packed_length(feature: Tensor, layout: TokenLayout) -> None:
    """A ValueError where transformers packs an image into another number of tokens than the layout counts."""
    if feature.shape[0] != layout.num_stock:
        size = "" if layout.image_size is None else " of {} x {} pixels".format(*layout.image_size)
        raise ValueError(
            f"transformers packed an image{size} into {feature.shape[0]} features; {layout.num_stock} were expected. Check "
            "that `image_grid_pinpoints`, `image_size` and `patch_size` of the configuration belong to this checkpoint."
        )


def check_placeholders(
    is_placeholder: Tensor, retained: Sequence[int], layouts: Sequence[TokenLayout] | None, pruning: Any
) -> None:
    """Compares the placeholders of a prompt with the features that the model keeps.

    Args:
        is_placeholder: bool (batch, sequence).
        retained: features kept of each image, in the order of the prompt.
        layouts: of each image, or None where images came encoded.
        pruning: the model's settings.

    Raises:
        ValueError: on another number, with both numbers, per image where each has its own run of placeholders.
    """
    found = int(is_placeholder.sum())
    if found == sum(retained) and len(retained) < 2:
        return
    runs = _run_lengths(is_placeholder)
    # Equal sums do not do where each image has its own run: images in another order than the prompt's would be mixed up.
    if found == sum(retained) and (len(runs) != len(retained) or runs == list(retained)):
        return
    details = ""
    if len(runs) == len(retained):
        names = [f"image {i}" for i in range(len(retained))]
        if layouts is not None:
            names = [f"{name}{_described(layout, pruning)}" for name, layout in zip(names, layouts, strict=True)]
        lines = [
            f"{name}: {run} placeholders, {kept} features"
            for name, run, kept in zip(names, runs, retained, strict=True)
            if run != kept
        ]
        details = f" ({'; '.join(lines)})"
    advice = (
        "Make the inputs with a processor of the same settings (`processor.pruning_config = model.config.pruning_config`), "
        "pass the model all that the processor returned and every image that the prompt names, in its order, and do not "
        "truncate placeholders (`truncation`, `max_length`)."
    )
    if layouts is not None and found == sum(layout.num_stock for layout in layouts):
        advice = (
            "That is as many placeholders as the unpruned model takes: the inputs come from a stock processor, or from one "
            "that keeps everything. Use the pruned processor of this model's family (`HIVTPLlavaNextProcessor` or "
            "`HIVTPLlavaProcessor`), with `pruning_config=model.config.pruning_config`."
        )
    # By these words of stock's own error TRL tells that a prompt was cut, and names the argument that cuts it.
    cut = "Image features and image tokens do not match: " if found < sum(retained) else ""
    raise ValueError(
        f"{cut}the prompt has {found} image placeholders, but the model keeps {sum(retained)} visual tokens{details}. "
        f"The model prunes by {pruning!r}. {advice}"
    )


def _described(layout: TokenLayout, pruning: VisualTokenPruningConfig) -> str:
    """An image's size, and its ratio where that is not the model's own."""
    words = [] if layout.image_size is None else ["{} x {}".format(*layout.image_size)]
    if layout.pruning.retention_ratio != pruning.retention_ratio:
        words.append(f"retention_ratio {layout.pruning.retention_ratio:g}")
    return f" ({', '.join(words)})" if words else ""


def _run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the runs of True in every row, in order."""
    lengths = []
    for row in torch.nn.functional.pad(mask.cpu().int(), (1, 1)):
        change = row.diff()
        lengths += ((change == -1).nonzero() - (change == 1).nonzero()).flatten().tolist()
    return lengths
