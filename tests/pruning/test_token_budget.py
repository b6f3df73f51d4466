"""`token_budget`: at most so many tokens an image, and of the numbers that a ratio can reach the largest."""

import math
import random

import numpy as np
import pytest

from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.pruning.registry import METHODS
from layouts import FIRST_TOKENS

pytestmark = pytest.mark.once

# What counts newlines in is tested with its method.
PRUNING = [name for name, method in METHODS.items() if name != "none" and not method.counts_newlines]
SIZES = [(672, 672), (480, 640), (300, 451), (1000, 300), (100, 1000), (64, 64), (1, 5000), (5000, 1), (37, 300), (1201, 1733)]
SMALL = {"tile_size": 56, "pinpoints": [(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)]}  # tiles of 4 x 4 cells


def ratios_to_try(groups):
    """All ratios at which a count may change, the floats next to them, and ratios between them."""
    edges = {m / n for n in groups for m in range(1, n + 1)} | {(m - 0.5) / n for n in groups for m in range(1, n + 1)}
    edges = np.array(sorted(edges))
    near = [edges]
    for direction in (0.0, 2.0):
        neighbours = edges
        for _ in range(3):
            neighbours = np.nextafter(neighbours, direction)
            near.append(neighbours)
    between = (edges[1:] + edges[:-1]) / 2
    ratios = np.unique(np.concatenate([*near, between, [2.0**-64, 1.0]]))
    return ratios[(ratios > 0) & (ratios <= 1)]


def totals_of_ratios(method, layout, ratios):
    """Cells that every ratio keeps, counted apart from the package: (ratios,)."""
    tiles = [int(view.sum()) for view in layout.by_view(layout.valid)]
    if method == "gprune":
        crops = [np.floor(ratios * len(part.used_rows) * len(part.used_columns)) for part in layout.parts[1:]]
        return np.floor(ratios * tiles[0]) + sum(crops)
    if method == "divprune":
        tiles = [sum(tiles)]
    return sum(np.minimum(n, np.floor(ratios * n + 0.5)) for n in tiles)


def hold_budgets_against_all_ratios(method, layout_of, budgets):
    """`layout_of(pruning)` for every one of `budgets(layout)`, against the best that any ratio gives."""
    whole = layout_of(VisualTokenPruningConfig(method=method, retention_ratio=1))
    fixed = whole.num_newlines + whole.num_class_tokens
    crops = sum(whole.valid_per_view[1:])
    ratios = ratios_to_try({n for n in (*whole.valid_per_view, crops, sum(whole.valid_per_view)) if n})
    reachable = np.unique(totals_of_ratios(method, whole, ratios)).astype(int) + fixed
    for budget in budgets(whole):
        layout = layout_of(VisualTokenPruningConfig(method=method, token_budget=budget))
        assert layout.num_retained == reachable[reachable <= budget].max()
        ratio = layout.pruning.retention_ratio
        assert layout.pruning.token_budget is None
        # The ratio is the largest that fits, and gives the same layout where it is given itself.
        same = layout_of(VisualTokenPruningConfig(method=method, retention_ratio=ratio))
        assert same.group_totals == layout.group_totals
        if ratio < 1:
            above = VisualTokenPruningConfig(method=method, retention_ratio=math.nextafter(ratio, 1))
            assert layout_of(above).num_retained > budget


def some_budgets(layout):
    generator = random.Random(layout.num_stock)
    fixed = layout.num_newlines + layout.num_class_tokens
    some = {generator.randint(max(fixed, 1), layout.num_stock) for _ in range(6)}
    return sorted(some | {max(fixed, 1), fixed + 1, layout.num_stock - 1, layout.num_stock, layout.num_stock + 7})


def all_budgets(layout):
    return range(max(layout.num_newlines + layout.num_class_tokens, 1), layout.num_stock + 3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", PRUNING)
def test_the_largest_number_within_the_budget(method, size):
    hold_budgets_against_all_ratios(method, lambda pruning: TokenLayout.from_image_size(*size, pruning), some_budgets)


@pytest.mark.parametrize("size", [(112, 112), (60, 100), (200, 50), (37, 300), (20, 20)], ids=str)
@pytest.mark.parametrize("method", PRUNING)
def test_every_budget_of_small_tiles(method, size):
    hold_budgets_against_all_ratios(method, lambda pruning: TokenLayout.from_image_size(*size, pruning, **SMALL), all_budgets)


@pytest.mark.parametrize("extra_tokens", [-1, 0, 1])
@pytest.mark.parametrize("grid", [1, 3, 8])
@pytest.mark.parametrize("method", PRUNING)
def test_every_budget_of_a_single_tile(method, grid, extra_tokens):
    hold_budgets_against_all_ratios(
        method, lambda pruning: TokenLayout.single_tile(grid, pruning, **FIRST_TOKENS[extra_tokens]), all_budgets
    )


@pytest.mark.parametrize("method", PRUNING)
def test_a_budget_for_all_tokens_keeps_everything(method):
    stock = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig()).num_stock
    for budget in (stock, 10**50):
        layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(method=method, token_budget=budget))
        assert layout.pruning.retention_ratio == 1
        assert layout.keeps_everything
        assert layout.num_retained == stock
    short = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(method=method, token_budget=stock - 1))
    assert not short.keeps_everything


@pytest.mark.parametrize("method", PRUNING)
def test_newlines_come_out_of_the_budget(method):
    # 480 x 640 has 36 rows of crops, and as many newlines.
    just_newlines = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(method=method, token_budget=36))
    assert (just_newlines.num_retained, just_newlines.num_newlines, sum(just_newlines.group_totals)) == (36, 36, 0)
    too_small = VisualTokenPruningConfig(method=method, token_budget=35)
    with pytest.raises(ValueError, match=r"`token_budget` is 35.* 36 newline tokens.*`keep_newlines` to False"):
        TokenLayout.from_image_size(480, 640, too_small)
    without = TokenLayout.from_image_size(480, 640, too_small.replace(keep_newlines=False))
    assert without.num_newlines == 0
    assert 0 < without.num_retained <= 35


def test_a_budget_may_go_without_exact_counts():
    layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(token_budget=600, exact_count=False))
    assert layout.num_retained <= 600
    assert not layout.pruning.exact_count


def test_ratio_and_budget_together_are_an_error():
    both = {"retention_ratio": 0.25, "token_budget": 640}
    budget = VisualTokenPruningConfig(token_budget=5)
    for call in (lambda **given: VisualTokenPruningConfig(**given), budget.for_call, budget.replace):
        with pytest.raises(ValueError, match=r"`retention_ratio` is 0.25.*`token_budget` 640.*give one"):
            call(**both)


def test_one_takes_the_place_of_the_other():
    ratio = VisualTokenPruningConfig(method="gprune", retention_ratio=0.25, keep_newlines=False)
    budget = VisualTokenPruningConfig(method="gprune", token_budget=640, keep_newlines=False)
    assert ratio.replace(token_budget=640) == ratio.for_call(token_budget=640) == budget
    assert budget.replace(retention_ratio=0.25) == budget.for_call(retention_ratio=0.25) == ratio
    assert budget.for_call(token_budget=64) == budget.replace(token_budget=64)
    assert (budget.retention_ratio, ratio.token_budget) == (None, None)
    for pruning in (ratio, budget):
        assert pruning.for_call() is pruning
    # Taken away, it leaves what the method reads by default.
    assert budget.replace(token_budget=None) == VisualTokenPruningConfig(method="gprune", keep_newlines=False)


def test_a_budget_stays_with_another_method():
    budget = VisualTokenPruningConfig(token_budget=640, local_window=3)
    assert budget.replace(method="gprune") == VisualTokenPruningConfig(method="gprune", token_budget=640)
    ratio = VisualTokenPruningConfig(method="hiprune")
    assert ratio.replace(method="uniform", token_budget=64) == VisualTokenPruningConfig(method="uniform", token_budget=64)


def test_layouts_of_a_budget_are_remembered():
    first = TokenLayout.from_image_size(234, 567, VisualTokenPruningConfig(token_budget=500))
    assert TokenLayout.from_image_size(234, 567, VisualTokenPruningConfig(token_budget=500)) is first
    assert TokenLayout.from_image_size(234, 567, VisualTokenPruningConfig(token_budget=501)) is not first
