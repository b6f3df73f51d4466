"""What every model family shares: from scores and packed features to kept features, and the checks around that."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .evidence import EncoderFacts, Evidence, VisualEvidence, evidence_to_read, methods_of
from .layout import TokenLayout
from .merging import MergedTokens, averages_of, with_averages
from .prompt_columns import SURVIVES_ALL
from .registry import pruning_method
from .settings import VisualTokenPruningConfig
from .stages import stages_of_language_model, stages_survived
from .token_weights import log_weights


def check_pruning_fits_encoder(
    pruning: VisualTokenPruningConfig, encoder: EncoderFacts, provided: Collection[Evidence]
) -> frozenset[Evidence]:
    """Refuses settings that an encoder cannot follow.

    Args:
        pruning: the model's settings.
        encoder: the vision encoder.
        provided: the kinds of evidence that the model has.

    Returns:
        The kinds that the method reads.

    Raises:
        ValueError: for layers beyond the depth or of no use to methods, and for a method that reads what the model does not
            have.
    """
    method = pruning_method(pruning.method)
    layers = pruning.scored_layers(encoder)
    given = ", ".join(
        f"`{setting.name}` (given: {getattr(pruning, setting.name)})" for setting in method.settings if setting.is_layer
    )
    if layers and not 0 <= layers[0] <= layers[-1] < encoder.num_layers:
        read = f"layer {layers[0]}" if layers[0] == layers[-1] else f"layers {layers[0]} to {layers[-1]}"
        raise ValueError(
            f"the method {pruning.method!r} reads the encoder {read}, but the vision tower has "
            f"{encoder.num_layers} layers, 0 to {encoder.num_layers - 1}. Change {given}."
        )
    within_windows = [layer for layer in layers if layer not in (encoder.comparable_layers or layers)]
    if within_windows:
        raise ValueError(
            f"the method {pruning.method!r} reads the encoder layers {within_windows}, which attend within windows: there "
            "every window's tokens receive as much together, whatever it shows, so that cells of two cannot be compared. "
            f"Layers over the whole image are {sorted(encoder.comparable_layers or ())}. Change {given}."
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
    features: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
    received: Mapping[int, Tensor],
    class_attention: Mapping[int, Tensor],
    encoder: EncoderFacts,
    attention_rows: Mapping[int, Tensor] | None = None,
    grey_levels: Tensor | None = None,
    encoded: Sequence[Tensor] | None = None,
    keys: Mapping[int, Tensor] | None = None,
    projector: Callable[[Tensor], Tensor] | None = None,
) -> VisualEvidence:
    """What a method may look at, brought together from one pass of the vision tower.

    Args:
        features: of every image the stock features, (num_stock, hidden).
        layouts: of every image its layout, each under its own settings.
        received, class_attention: of every layer read that of the cells, float32 (cells of all images,).
        encoder: the vision encoder.
        attention_rows: of every layer read what the method's tokens attend to, float32 (cells of all images,).
        grey_levels: uint8 (cells of all images, pixels of a cell), or None where pixels are not read.
        encoded: of every view what the encoder says of its cells before the projector, (cells, hidden), where that is read.
        keys: of every layer read the keys of cells, float32 (cells of all images, size).
        projector: makes features of what the encoder says, where that is read.

    Raises:
        ValueError: where features do not fit the layouts.
    """
    for feature, layout in zip(features, layouts, strict=True):
        check_packed_length(feature, layout)
    rows = attention_rows or {}
    scores = (*received.values(), *class_attention.values(), *rows.values())
    device = scores[0].device if scores else features[0].device
    return VisualEvidence(
        layouts=layouts,
        features=features,
        received={layer: of_layer.to(device) for layer, of_layer in received.items()},
        class_attention={layer: of_layer.to(device) for layer, of_layer in class_attention.items()},
        encoder=encoder,
        attention_rows={layer: of_layer.to(device) for layer, of_layer in rows.items()},
        grey_levels=None if grey_levels is None else grey_levels.to(device),
        encoded=encoded,
        keys={layer: of_layer.to(device) for layer, of_layer in (keys or {}).items()},
        projector=projector,
    )


def choose(evidence: VisualEvidence) -> list[Tensor]:
    """The packed positions that stay of every image, by the methods of their layouts: int64, ascending.

    There are `num_retained` of each image, or fewer with `exact_count=False`.
    """
    return choose_and_merge(evidence)[0]


def choose_and_merge(evidence: VisualEvidence) -> tuple[list[Tensor], list[MergedTokens | None]]:
    """As `choose`, and of every image what its tokens hold averages of; None where the method makes none."""
    kept: dict[int, Tensor] = {}
    merged: dict[int, MergedTokens] = {}
    for pruning, members in _images_by_pruning(evidence.layouts).items():
        seen, method = evidence.of_images(members), pruning_method(pruning.method)
        if method.merges:
            merged.update(zip(members, method.merge(seen, pruning), strict=True))
            kept.update((image, merged[image].kept_indices) for image in members)
            continue
        of_cells: Any = seen.ask(method, method.select, pruning)
        parts = of_cells.split([layout.num_cells for layout in seen.layouts])
        for image, of_image, layout in zip(members, parts, seen.layouts, strict=True):
            kept[image] = layout.kept_indices(of_image.to(evidence.features[image].device))
    images = range(len(evidence.layouts))
    return (
        [kept[image].to(evidence.features[image].device) for image in images],
        [merged.get(image) for image in images],
    )


def choose_by_layout(layouts: Sequence[TokenLayout], provided: Collection[Evidence]) -> list[Tensor] | None:
    """As `choose`, of images that nobody has encoded; None unless all methods look at nothing, such as "uniform" and "random".

    Args:
        layouts: of every image.
        provided: the kinds of evidence that the family provides.
    """
    if any(evidence_to_read(layout.pruning, provided) != frozenset() for layout in layouts):
        return None
    nothing = [torch.empty(layout.num_stock, 0) for layout in layouts]
    return choose(VisualEvidence(layouts, nothing, {}, {}, EncoderFacts(0, 0)))


def cut(stream: Sequence[Any], kept_indices: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Any]:
    """Of every image the rows of packed tokens that stay: the one way in which anything that tokens carry is cut.

    Rows are never recomputed, reordered or merged: the result is `stream[i].index_select(0, kept_indices[i])`. With
    `exact_count=False` fewer may be kept than there are placeholders; zeros then fill up the front.

    Args:
        stream: of every image (num_stock, ...), such as its features; or a list of such streams, which are cut alike.
        kept_indices: of every image the packed positions that stay, as `choose` returns them.
        layouts: of every image.

    Returns:
        Of every image (num_retained, ...); or a list of such lists.
    """
    if not all(isinstance(of_image, Tensor) for of_image in stream):
        return [cut(one, kept_indices, layouts) for one in stream]
    pieces = []
    for rows, kept, layout in zip(stream, kept_indices, layouts, strict=True):
        kept_rows = rows.index_select(0, kept.to(rows.device))
        surplus = layout.num_retained - len(kept)
        pieces.append(torch.cat((rows.new_zeros(surplus, *rows.shape[1:]), kept_rows)) if surplus else kept_rows)
    return pieces


def cut_and_merge_features(
    evidence: VisualEvidence, kept_indices: Sequence[Tensor], merged: Sequence[MergedTokens | None]
) -> list[Any]:
    """As `cut`, of the visual features, with averages in the rows that hold one, as `choose_and_merge` says them.

    Where a method reads what the encoder says before the projector, averages are of that, and then go through the projector.
    This is not linear, so that averages of features would be others.
    """
    averages = [
        None if of_image is None or evidence.projector is None else _projected_averages(evidence, image, of_image)
        for image, of_image in enumerate(merged)
    ]
    return with_averages(evidence.features, cut(evidence.features, kept_indices, evidence.layouts), merged, averages)


def _projected_averages(evidence: VisualEvidence, image: int, merged: MergedTokens) -> Tensor:
    """The averages of an image, (averages, hidden), of what the encoder says of its cells, projected."""
    layout, encoded, projector = evidence.layouts[image], torch.cat(list(evidence.encoded_of(image))), evidence.projector
    cell_of_token = torch.zeros(layout.num_stock, dtype=torch.int64, device=encoded.device)
    positions = layout.cell_positions.to(encoded.device)
    cell_of_token[positions] = layout.cell_numbers(positions)
    averages = averages_of(encoded, merged._replace(members=cell_of_token[merged.members.to(encoded.device)]))
    return averages if projector is None or not len(averages) else projector(averages.to(encoded.dtype))


# What `prune_features` says beside streams: a list with a value for each image, or None.
FIELDS_OF_IMAGES = ("kept_indices", "num_stock", "log_weights", "stages_survived", "is_average")


def prune_features(evidence: VisualEvidence, streams: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """What stays of some images: streams as they are cut, and `FIELDS_OF_IMAGES`, as `PrunedImageFeaturesOutput` has them.

    Args:
        evidence: of all images of a call, whose settings differ in ratios alone.
        streams: by name of every image (num_stock, ...), or lists of such streams; the visual features are the evidence's own.
        num_layers: of the language model.
    """
    layouts, pruning = evidence.layouts, evidence.layouts[0].pruning
    kept_indices, merged = choose_and_merge(evidence)
    return {
        "pooler_output": cut_and_merge_features(evidence, kept_indices, merged),
        **{
            name: with_averages(stream, cut(stream, kept_indices, layouts), merged)
            for name, stream in streams.items()
            if name != "pooler_output"
        },
        "kept_indices": kept_indices,
        "num_stock": None if pruning.positions == "packed" else [layout.num_stock for layout in layouts],
        "log_weights": weigh_features(evidence, kept_indices),
        "stages_survived": rank_features(evidence, kept_indices, num_layers),
        "is_average": [of_image.is_average for of_image in merged if of_image is not None]
        if pruning_method(pruning.method).merges
        else None,
    }


def keep_all_features(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> dict[str, Any]:
    """`FIELDS_OF_IMAGES` of unpruned images, of which every position is kept. ValueError as `gather_evidence`."""
    for feature, layout in zip(features, layouts, strict=True):
        check_packed_length(feature, layout)
    pruning = layouts[0].pruning
    kept = [torch.arange(feature.shape[0], device=feature.device) for feature in features]
    return {
        "kept_indices": kept,
        "num_stock": None if pruning.positions == "packed" else [layout.num_stock for layout in layouts],
        "log_weights": [torch.zeros_like(of_image, dtype=torch.float32) for of_image in kept]
        if pruning.weighs_tokens
        else None,
        "stages_survived": [torch.full_like(one, SURVIVES_ALL) for one in kept] if pruning.drops_in_stages else None,
        "is_average": [torch.zeros_like(of_image, dtype=torch.bool) for of_image in kept]
        if pruning_method(pruning.method).merges
        else None,
    }


def weigh_features(evidence: VisualEvidence, kept_indices: Sequence[Tensor]) -> list[Tensor] | None:
    """What is added to the logits of the kept tokens' keys, float32 (num_retained,) for each image; None where all are alike.

    Args:
        evidence: of all images of a call.
        kept_indices: of every image the packed positions that are kept, as `choose` returns them.
    """
    if not evidence.layouts[0].pruning.weighs_tokens:
        return None
    of_image: dict[int, Tensor] = {}
    for members in _images_by_pruning(evidence.layouts).values():
        of_image.update(zip(members, log_weights(evidence, kept_indices, members), strict=True))
    return [of_image[image] for image in range(len(evidence.layouts))]


def rank_features(evidence: VisualEvidence, kept_indices: Sequence[Tensor], num_layers: int) -> list[Tensor] | None:
    """After how many stages inside the language model kept tokens are still there, int64 (num_retained,) for each image.

    Newlines and class tokens stay, or go last where the method counts them. What an inexact count lacks goes first.

    Args:
        evidence: of all images of a call.
        kept_indices: of every image the packed positions that are kept, as `choose` returns them.
        num_layers: of the language model.

    Returns:
        None where the settings have no stages.
    """
    if not evidence.layouts[0].pruning.drops_in_stages:
        return None
    of_images = []
    for layout, kept_of_image, of_cells in zip(
        evidence.layouts, kept_indices, importance_of_images(evidence) or (), strict=True
    ):
        ratios = [ratio for _, ratio in stages_of_language_model(layout.pruning, num_layers)]
        packed, kept = layout.packed(of_cells, math.inf, math.inf), kept_of_image.to(of_cells.device)
        others = float(pruning_method(layout.pruning.method).counts_newlines)
        is_ranked = layout.packed(torch.ones_like(of_cells), others, others) > 0
        survived = stages_survived(packed[kept], is_ranked[kept], ratios)
        of_images.append(torch.nn.functional.pad(survived, (layout.num_retained - len(kept), 0)))
    return of_images


def importance_of_images(evidence: VisualEvidence) -> list[Tensor] | None:
    """Of every image the scores by which its method ranks at the image's ratio, float (cells,); None where it does not."""
    of_image: dict[int, Tensor] = {}
    for pruning, members in _images_by_pruning(evidence.layouts).items():
        seen, method = evidence.of_images(members), pruning_method(pruning.method)
        importance: Any = seen.ask(method, method.importance, pruning)
        if importance is None:
            return None
        of_image.update(zip(members, importance.split([layout.num_cells for layout in seen.layouts]), strict=True))
    return [of_image[image] for image in range(len(evidence.layouts))]


def _images_by_pruning(layouts: Sequence[TokenLayout]) -> dict[VisualTokenPruningConfig, list[int]]:
    """Images of equal settings, which can be chosen from together; ratios may differ from image to image."""
    groups: dict[VisualTokenPruningConfig, list[int]] = {}
    for image, layout in enumerate(layouts):
        groups.setdefault(layout.pruning, []).append(image)
    return groups


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
