"""DivPrune's selection: of a whole image repeatedly the token that is farthest from all that are picked.

Source: arXiv 2503.02175, from its formulas. Newlines are kept on top; in the paper they are among the candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.evidence import CellFeatures, Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.settings import VisualTokenPruningConfig
from .base import PruningMethod, settings_of
from .greedy import NEVER_PICKED, Picks, distances, importance_of_order, is_picked, max_min_order, order_in_groups
from .ranking import check_packed_features, rounded_share


class DivPrune(PruningMethod):
    """DivPrune: by the distance to what is kept already."""

    name = "divprune"
    rule = "what is farthest from all that is kept already (DivPrune, arXiv 2503.02175)"
    colour = "#D55E00"
    citation = r"""
@misc{alvar2025divprune,
  title = {{DivPrune}: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author = {Alvar, Saeed Ranjbar and Singh, Gursimran and Akbari, Mohammad and Zhang, Yong},
  year = {2025},
  eprint = {2503.02175},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2503.02175},
  note = {CVPR 2025},
}
"""

    group = "image"

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        return (frozenset({Evidence.FEATURES}),)

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        ratio: Any = pruning.retention_ratio
        return (rounded_share(sum(layout.valid_per_view), ratio),)

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_divprune(evidence.features, evidence.layouts, pruning)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        orders = _divprune_orders(evidence.features, evidence.layouts, pruning)
        return torch.cat(
            [
                importance_of_order(order[None], layout.valid[None].to(order.device))[0]
                for order, layout in zip(orders, evidence.layouts, strict=True)
            ]
        )


def select_divprune(
    features: Sequence[Tensor], layouts: Sequence[TokenLayout], pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells that DivPrune keeps, of all images of a batch.

    With the distance of two tokens 1 less their cosine, it picks first the token that is farthest from its nearest neighbour,
    and then repeatedly the one that is farthest from the nearest of those picked. All cells of an image are one group.

    Args:
        features: of every image the packed stock features (num_stock, hidden), any float dtype, all on one device.
        layouts: of every image its layout.
        pruning: a config of the method "divprune" with a retention ratio, or its settings as a dict.

    Returns:
        bool (cells of all images,), on the features' device. Each image keeps `rounded_share(valid cells, retention_ratio)`
        cells; equal distances go to the earlier token. Features that are zero or not finite resemble nothing.

    Raises:
        ValueError: on features that do not fit their layouts, another method's config, and a token budget in place of a ratio.

    Source: arXiv 2503.02175.
    """
    check_packed_features(features, layouts)
    return torch.cat([is_picked(order) for order in _divprune_orders(features, layouts, settings_of("divprune", pruning))])


def _divprune_orders(
    features: Sequence[Tensor], layouts: Sequence[TokenLayout], pruning: VisualTokenPruningConfig
) -> list[Tensor]:
    """Of every image when its cells are picked, int64 (cells,)."""
    orders: list[Any] = [None] * len(layouts)
    ratio: Any = pruning.retention_ratio
    # Images of one layout, and so of one size, are chosen from together.
    images_of_layout: dict[TokenLayout, list[int]] = {}
    for image, layout in enumerate(layouts):
        images_of_layout.setdefault(layout, []).append(image)
    for layout, images in images_of_layout.items():
        device, positions = features[images[0]].device, layout.cell_positions
        cells = layout.cell_numbers(positions).to(device)
        rows = [len(part.used_columns) for part in layout.parts for _ in part.used_rows]
        rows[0] -= layout.skips_first_cell
        number = rounded_share(len(positions), ratio)
        picks = Picks(torch.full((len(images),), number, dtype=torch.int64, device=device), number)

        of_images = CellFeatures([(features[image], positions) for image in images], device)
        order = order_in_groups(
            of_images.of_views,
            of_images.width,
            torch.ones(len(images), len(positions), dtype=torch.bool, device=device),
            picks,
            lambda similarity, valid, of_band, groups, band: max_min_order(distances(similarity), valid, of_band),
            rows,
        )
        of_cells = torch.full((len(images), layout.num_cells), NEVER_PICKED, dtype=torch.int64, device=device)
        of_cells[:, cells] = order
        for image, of_image in zip(images, of_cells, strict=True):
            orders[image] = of_image
    return orders
