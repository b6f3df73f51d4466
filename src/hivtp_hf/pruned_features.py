"""What every model family shares: from scores and packed features to kept features, and the checks around that."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .methods import pruning_method
from .pruning_config import VisualTokenPruningConfig
from .token_layout import TokenLayout


def check_pruning_fits_tower(pruning: VisualTokenPruningConfig, num_layers: int) -> None:
    """Refuses settings that this encoder, or a whole model, cannot follow.

    Args:
        pruning: the model's settings.
        num_layers: depth of the vision encoder.

    Raises:
        ValueError: for scored layers beyond the depth.
    """
    layers = pruning.scored_layers
    if layers and layers[-1] >= num_layers:
        raise ValueError(
            f"the method {pruning.method!r} reads the encoder layers {layers[0]} to {layers[-1]}, but the vision tower has "
            f"{num_layers} layers, 0 to {num_layers - 1}. Lower `importance_start_layer` (given: "
            f"{pruning.importance_start_layer}) or `importance_num_layers` (given: {pruning.importance_num_layers})."
        )


def has_cls_token(encoder: nn.Module) -> bool:
    """Whether the encoder puts a class token before the patches (CLIP does, SigLIP does not)."""
    return any(name.rpartition(".")[2] in ("class_embedding", "cls_token") for name, _ in encoder.named_parameters())


def check_feature_selection(strategy: str, has_cls: bool) -> None:
    """Refuses a `vision_feature_select_strategy` whose features are not one per cell of a tile.

    Raises:
        ValueError: for "full" where there is a class token, and for "default" (drop the first token) where there is none.
    """
    needed = "default" if has_cls else "full"
    if strategy != needed:
        token = "has a class token, which is no cell of the image" if has_cls else "has no class token to drop"
        raise ValueError(
            f"`vision_feature_select_strategy` is {strategy!r}, but the vision tower {token}. Pruning needs one feature per "
            f"cell: use {needed!r}, in the model's configuration and in the processor's."
        )


def prune_features(
    features: Sequence[Tensor], layouts: Sequence[TokenLayout], scores: Tensor, pruning: VisualTokenPruningConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Keeps of every image's packed features those that the method selects.

    Features are never recomputed, reordered or merged: the result is `features[i].index_select(0, kept_indices[i])`. With
    `exact_count=False` fewer may be kept than there are placeholders; zeros then fill up the front.

    Args:
        features: of every image the stock features, (num_stock, hidden).
        layouts: of every image its layout, under the same `pruning`.
        scores: (tiles of all images, tokens), a class token, if any, first.
        pruning: the settings.

    Returns:
        The features (num_retained, hidden) and the ascending indices of those kept, int64, a list each. There are
        `num_retained` indices, or fewer with `exact_count=False`.

    Raises:
        ValueError: where scores or features do not fit the layouts.
    """
    grid = layouts[0].grid
    tiles = [layout.num_tiles for layout in layouts]
    extra_tokens = scores.shape[1] - grid * grid
    if scores.shape[0] != sum(tiles) or extra_tokens not in (0, 1):
        raise ValueError(
            f"the vision tower scored {scores.shape[0]} tiles of {scores.shape[1]} tokens; the images need {sum(tiles)} tiles "
            f"of {grid * grid} cells, with or without a class token. Check `image_sizes` and the tower's image size."
        )
    valid = torch.cat([layout.valid for layout in layouts]).to(scores.device)
    select = pruning_method(pruning.method).load_selector().select
    kept_cells = select(scores[:, extra_tokens:].view(-1, grid, grid), valid, pruning)

    kept_features, kept_indices = [], []
    for feature, layout, cells in zip(features, layouts, kept_cells.split(tiles), strict=True):
        check_packed_length(feature, layout)
        kept = layout.kept_indices(cells.to(feature.device))
        surplus = feature.new_zeros(layout.num_retained - len(kept), feature.shape[1])
        kept_feature = feature.index_select(0, kept)
        kept_features.append(torch.cat((surplus, kept_feature)) if len(surplus) else kept_feature)
        kept_indices.append(kept)
    return kept_features, kept_indices


def keep_all_features(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
    """The indices of unpruned images: every position, as int64 (num_stock,) per image. ValueError as `prune_features`."""
    for feature, layout in zip(features, layouts, strict=True):
        check_packed_length(feature, layout)
    return [torch.arange(feature.shape[0], device=feature.device) for feature in features]


def check_packed_length(feature: Tensor, layout: TokenLayout) -> None:
    """A ValueError where transformers packs an image into another number of tokens than the layout counts."""
    if feature.shape[0] != layout.num_stock:
        raise ValueError(
            f"transformers packed an image of {layout.image_size[0]} x {layout.image_size[1]} pixels into {feature.shape[0]} "
            f"features; {layout.num_stock} were expected. Check that `image_grid_pinpoints`, `image_size` and `patch_size` of "
            "the configuration belong to this checkpoint."
        )


def check_placeholders(is_placeholder: Tensor, retained: Sequence[int], images: Sequence[str], pruning: Any) -> None:
    """Compares the placeholders of a prompt with the features that the model keeps.

    Args:
        is_placeholder: bool (batch, sequence).
        retained: features kept of each image, in the order of the prompt.
        images: how to call each image in the message.
        pruning: the model's settings.

    Raises:
        ValueError: on another number, with both numbers, per image where each has its own run of placeholders.
    """
    runs = _run_lengths(is_placeholder)
    found = sum(runs)
    # Equal sums do not do where each image has its own run: images in another order than the prompt's would be mixed up.
    if found == sum(retained) and (len(runs) != len(retained) or runs == list(retained)):
        return
    details = ""
    if len(runs) == len(retained):
        lines = [
            f"{image}: {run} placeholders, {kept} features"
            for image, run, kept in zip(images, runs, retained, strict=True)
            if run != kept
        ]
        details = f" ({'; '.join(lines)})"
    raise ValueError(
        f"the prompt has {found} image placeholders, but the model keeps {sum(retained)} visual tokens{details}. The model "
        f"prunes by {pruning!r}. Make the inputs with a processor of the same settings "
        "(`processor.pruning_config = model.config.pruning_config`), pass every image that the prompt names, in its order, "
        "and do not truncate placeholders (`truncation`, `max_length`)."
    )


def _run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the runs of True in every row, in order."""
    lengths = []
    for row in torch.nn.functional.pad(mask.cpu().int(), (1, 1)):
        change = row.diff()
        lengths += ((change == -1).nonzero() - (change == 1).nonzero()).flatten().tolist()
    return lengths
