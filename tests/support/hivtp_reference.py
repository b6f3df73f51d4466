"""HIVTP written a second time, plainly and slowly, from its description: what the vectorised selector is held against.

One tile at a time, sets of cells, no tensors. Counts are plain Python float64 and integers.
"""

import math
from itertools import product

import numpy as np


def best(cells, scores, count):
    """The `count` highest-scoring cells; on equal scores the lower raster index."""
    width = scores.shape[1]
    return sorted(cells, key=lambda cell: (-scores[cell], cell[0] * width + cell[1]))[:count]


def regions_of(grid, regions):
    edges = [math.floor(i * grid / regions) for i in range(regions + 1)]
    for i, j in product(range(regions), repeat=2):
        yield [(row, column) for row in range(edges[i], edges[i + 1]) for column in range(edges[j], edges[j + 1])]


def windows_of(grid, side):
    for top, left in product(range(0, grid, side), repeat=2):
        rows, columns = range(top, min(top + side, grid)), range(left, min(left + side, grid))
        yield [(row, column) for row in rows for column in columns]


def counts(valid, pruning):
    """(quota of each region, window side or None, total of the tile)."""
    grid = len(valid)
    num_valid = int(valid.sum())
    in_region = [sum(bool(valid[cell]) for cell in region) for region in regions_of(grid, pruning.regions)]

    def windows(side):
        return sum(any(valid[cell] for cell in window) for window in windows_of(grid, side))

    if pruning.retention_ratio is None:
        quotas = [math.floor(pruning.global_ratio * n) for n in in_region]
        return quotas, pruning.local_window, min(num_valid, sum(quotas) + windows(pruning.local_window))

    total = min(num_valid, math.floor(pruning.retention_ratio * num_valid + 0.5))
    side = next((side for side in range(2, grid + 1) if 2 * windows(side) <= total), None)
    rest = total - (windows(side) if side else 0)
    quotas = [rest * n // num_valid if num_valid else 0 for n in in_region]
    remainders = [rest * n % num_valid if num_valid else 0 for n in in_region]
    for region in sorted(range(len(quotas)), key=lambda region: (-remainders[region], region))[: rest - sum(quotas)]:
        quotas[region] += 1
    return quotas, side, total


def select_tile(scores, valid, pruning):
    """Kept cells of one tile, bool (grid, grid)."""
    if pruning.retention_ratio == 1:
        return valid.copy()
    grid = len(valid)
    quotas, side, total = counts(valid, pruning)
    kept = set()
    for region, quota in zip(regions_of(grid, pruning.regions), quotas, strict=True):
        kept |= set(best([cell for cell in region if valid[cell]], scores, quota))
    after_global = set(kept)
    for window in windows_of(grid, side) if side else []:
        kept |= set(best([cell for cell in window if valid[cell] and cell not in after_global], scores, 1))
    if pruning.exact_count:
        everything = [(row, column) for row in range(grid) for column in range(grid)]
        left = [cell for cell in everything if valid[cell] and cell not in kept]
        kept |= set(best(left, scores, total - len(kept)))
    mask = np.zeros((grid, grid), dtype=bool)
    for cell in kept:
        mask[cell] = True
    return mask
