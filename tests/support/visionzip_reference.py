"""VisionZip on one view in plain NumPy, one cell at a time: which cells stay, and which others each of them holds."""

import math

import numpy as np


def rounded(number, share):
    return min(number, math.floor(share * number + 0.5))


def holders(saliency, keys, valid, kept, share):
    """Of one view the cells that stay, each with those that it holds.

    Args:
        saliency: (cells,); keys: (cells, size); valid: bool (cells,).
        kept: how many cells stay.
        share: of these what is contextual.

    Returns:
        {cell: [others that it holds]}, and the contextual cells.
    """
    cells = [cell for cell in range(len(valid)) if valid[cell]]
    contextual = rounded(kept, share)
    by_saliency = sorted(cells, key=lambda cell: (-saliency[cell], cell))
    dominant = by_saliency[: kept - contextual]
    left = [cell for cell in cells if cell not in dominant]
    step = max(1, len(left) // contextual) if contextual else 1
    targets = left[::step][:contextual]
    directions = keys.astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.sqrt((directions**2).sum(1, keepdims=True))
        directions = np.where(np.isfinite(length) & (length > 0), directions / length, 0)
    held = {cell: [] for cell in sorted([*dominant, *targets])}
    for cell in left:
        if cell not in targets and targets:
            similarity = [float(directions[cell] @ directions[target]) for target in targets]
            held[targets[int(np.argmax(similarity))]].append(cell)
    return held, targets


def average(rows, cell, others, adds):
    """What a contextual cell holds, of rows (cells, ...) of tensors: its own row where there are no others."""
    if not others:
        return rows[cell]
    if adds:
        return rows[cell] + rows[others].mean(0)
    return rows[[cell, *others]].mean(0)
