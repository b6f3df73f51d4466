"""How tests ask about layouts."""

import torch

# Arguments of `TokenLayout.single_tile` by how many tokens more than cells stock packs.
FIRST_TOKENS = {-1: {"skips_first_cell": True}, 0: {}, 1: {"has_class_token": True}}


def views(layout, of_cells=None):
    """Values of all cells, those that stock uses unless given, as (views, rows, columns): of an image whose views are alike."""
    return torch.stack(layout.by_view(layout.valid if of_cells is None else of_cells))


def counts_of_groups(layout, kept):
    """How many of the kept cells lie in each group of cells among which the layout's method chooses."""
    of_views = layout.cells(kept)[:, 0].bincount(minlength=layout.num_views).tolist()
    if layout.pruning.method in ("vflowopt", "divprune"):
        return (sum(of_views),)
    if layout.pruning.method != "gprune":
        return tuple(of_views)
    numbers = iter(of_views)
    return tuple(sum(next(numbers) for _ in range(part.num_views)) for part in layout.parts)
