"""HIVTP written a second time, plainly and slowly, from its description: what the vectorised selector is held against.

One view at a time, sets of cells, no tensors. Counts are plain Python float64 and integers.
"""

import math
from itertools import product

import numpy as np


def best(cells, scores, count):
    """The `count` highest-scoring cells; on equal scores the lower raster index."""
    width = scores.shape[1]
    return sorted(cells, key=lambda cell: (-scores[cell], cell[0] * width + cell[1]))[:count]


def regions_of(shape, regions):
    down, across = ([math.floor(i * side / regions) for i in range(regions + 1)] for side in shape)
    for i, j in product(range(regions), repeat=2):
        yield [(row, column) for row in range(down[i], down[i + 1]) for column in range(across[j], across[j + 1])]


def windows_of(shape, side):
    for top, left in product(range(0, shape[0], side), range(0, shape[1], side)):
        rows, columns = range(top, min(top + side, shape[0])), range(left, min(left + side, shape[1]))
        yield [(row, column) for row in rows for column in columns]


def counts(valid, pruning):
    """(quota of each region, window side or None, total of the view)."""
    num_valid = int(valid.sum())
    in_region = [sum(bool(valid[cell]) for cell in region) for region in regions_of(valid.shape, pruning.regions)]

    def windows(side):
        return sum(any(valid[cell] for cell in window) for window in windows_of(valid.shape, side))

    if pruning.retention_ratio is None:
        quotas = [math.floor(pruning.global_ratio * n) for n in in_region]
        return quotas, pruning.local_window, min(num_valid, sum(quotas) + windows(pruning.local_window))

    total = min(num_valid, math.floor(pruning.retention_ratio * num_valid + 0.5))
    side = next((side for side in range(2, max(valid.shape) + 1) if 2 * windows(side) <= total), None)
    rest = total - (windows(side) if side else 0)
    quotas = [rest * n // num_valid if num_valid else 0 for n in in_region]
    remainders = [rest * n % num_valid if num_valid else 0 for n in in_region]
    for region in sorted(range(len(quotas)), key=lambda region: (-remainders[region], region))[: rest - sum(quotas)]:
        quotas[region] += 1
    return quotas, side, total


def select_view(scores, valid, pruning):
    """Kept cells of one view, bool (rows, columns)."""
    if pruning.retention_ratio == 1:
        return valid.copy()
    quotas, side, total = counts(valid, pruning)
    kept = set()
    for region, quota in zip(regions_of(valid.shape, pruning.regions), quotas, strict=True):
        kept |= set(best([cell for cell in region if valid[cell]], scores, quota))
    after_global = set(kept)
    for window in windows_of(valid.shape, side) if side else []:
        kept |= set(best([cell for cell in window if valid[cell] and cell not in after_global], scores, 1))
    if pruning.exact_count:
        everything = list(product(*map(range, valid.shape)))
        left = [cell for cell in everything if valid[cell] and cell not in kept]
        kept |= set(best(left, scores, total - len(kept)))
    mask = np.zeros(valid.shape, dtype=bool)
    for cell in kept:
        mask[cell] = True
    return mask
