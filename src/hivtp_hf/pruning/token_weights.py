"""How much every kept token weighs: how many cells of its image it stands for.

A dropped cell leaves its share of attention to nobody. If a kept token's key gets a bonus of log w, where w says how many cells
it stands for, sums over the kept tokens estimate those over all cells. `"cluster_size"` counts the dropped cells that resemble
it most; `"inclusion"` takes 1 / its chance to be kept. Newlines and class tokens stand for themselves alone.

Source: ours. Related: proportional attention of ToMe, arXiv 2210.09461.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .evidence import VisualEvidence
from .registry import pruning_method
from .settings import VisualTokenPruningConfig

# Similarities that are held at once, (dropped cells x kept ones): 16 MiB in float32.
_MOST_SIMILARITIES = 2**22


@torch.no_grad()
def cluster_sizes(features: Tensor, kept: Tensor) -> Tensor:
    """How many cells every kept cell stands for: itself, and the dropped ones whose most similar kept cell it is.

    Args:
        features: of all cells of one image, its views together: (cells, hidden). Compared by their cosine in float32; ties go
            to the lower index, and a feature of zeros resembles the first kept cell.
        kept: int64 (n,), the kept cells, ascending.

    Returns:
        float32 (n,), of sum `cells` where there is a kept cell.
    """
    sizes = torch.ones(len(kept), dtype=torch.float32, device=features.device)
    is_dropped = torch.ones(len(features), dtype=torch.bool, device=features.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero()[:, 0]
    if not len(kept) or not len(dropped):
        return sizes
    directions = torch.nn.functional.normalize(features.float(), dim=1)
    of_kept = directions[kept].T
    for part in dropped.split(max(1, _MOST_SIMILARITIES // len(kept))):
        nearest = (directions[part] @ of_kept).argmax(1)
        sizes += torch.bincount(nearest, minlength=len(kept))
    return sizes


@torch.no_grad()
def log_weights(evidence: VisualEvidence, kept_indices: Sequence[Tensor], images: Sequence[int]) -> list[Tensor]:
    """What is added to the attention logits of the kept tokens' keys: `weight_strength` times the logarithm of their weights.

    Args:
        evidence: of all images of a call.
        kept_indices: of every image the packed positions that are kept, ascending.
        images: indices of the images that are wanted, all under equal settings that weigh tokens.

    Returns:
        Of each of them float32 (num_retained,).
    """
    pruning = evidence.layouts[images[0]].pruning
    seen = evidence.of_images(images)
    chances: Sequence[Tensor | None] = [None] * len(images)
    if pruning.token_weights == "inclusion":
        method = pruning_method(pruning.method)
        of_cells: Any = seen.ask(method, method.inclusion, pruning)
        chances = of_cells.split([layout.num_cells for layout in seen.layouts])
    return [_of_image(seen, member, kept_indices[image], chances[member], pruning) for member, image in enumerate(images)]


def _of_image(
    seen: VisualEvidence, member: int, kept: Tensor, chance: Tensor | None, pruning: VisualTokenPruningConfig
) -> Tensor:
    layout, features = seen.layouts[member], seen.features[member]
    cells = layout.cell_positions.to(kept.device)
    cell_of_position = torch.full((layout.num_stock,), -1, device=kept.device)
    cell_of_position[cells] = torch.arange(len(cells), device=kept.device)
    of_kept = cell_of_position[kept]
    is_cell = of_kept >= 0
    if chance is None:
        weights = cluster_sizes(features[cells], of_kept[is_cell])
    else:
        weights = 1 / chance.to(kept.device)[layout.cell_numbers(kept)]
    logarithms = torch.zeros(len(kept), dtype=torch.float32, device=kept.device)
    logarithms[is_cell] = pruning.weight_strength * weights.log()
    return logarithms
