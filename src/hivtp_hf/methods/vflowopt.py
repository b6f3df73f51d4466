"""VFlowOpt: tokens ranked by what the vision encoder's sinks attend to, with averages of what is dropped, and two later stages.

Source: arXiv 2508.05211 (ICCV 2025), and the strategies published with it for LLaVA-OneVision-7B. No code of theirs is here.
Two things are ours: the count is exact (`exact_count=False` gives the published rule), and a view without a sink takes the
token that receives most.

`retention_ratio` means what is left of an image's tokens, newlines included, on average over the language model's layers. From
it follow how many tokens enter (stage 1, here) and what share of these is left from two later layers on (`stages`).

Reference compatibility: under `exact_count=False` stage 1 returns what the authors' released functions return
(tests/data/vflowopt.npz).
"""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pruning.checked_values import shown
from ..pruning.evidence import EncoderFacts, Evidence, VisualEvidence
from ..pruning.layout import TokenLayout
from ..pruning.merging import MergedTokens
from ..pruning.settings import Setting, VisualTokenPruningConfig
from .base import PruningMethod, settings_of

# Averages weigh their members by importance, which a negative `entropy_weight` may bring below 0.
_LEAST_WEIGHT = 1e-12
# Cells whose histograms are held at once: 4096 x 256 numbers.
_CELLS_AT_ONCE = 4096


class VFlowOptStrategy(NamedTuple):
    """What a retention ratio, the average over all layers, comes to.

    Attributes:
        sink_threshold: how many times the mean attention a sink receives at least.
        recycling_cell_side: side of recycling cells, in tokens.
        first_stage_ratio: what enters the language model.
        second_stage_ratio: what is left of that from the second stage on.
    """

    sink_threshold: float
    recycling_cell_side: float
    first_stage_ratio: float
    second_stage_ratio: float


# By retention ratio. The last one does nothing; its threshold and side are held from the one before.
_PUBLISHED_STRATEGIES = {
    0.10: VFlowOptStrategy(39.26492840997221, 17.386981849158786, 0.11661529508161146, 1.0),
    0.25: VFlowOptStrategy(34.759552803070484, 15.580797034937687, 0.2651026358526424, 0.9833433139039235),
    0.50: VFlowOptStrategy(28.683047941520474, 11.756787150848968, 0.7233201448753168, 0.748747637472693),
    1.00: VFlowOptStrategy(28.683047941520474, 11.756787150848968, 1.0, 1.0),
}
# Where the stages begin, of 28 layers.
_PUBLISHED_LAYERS, _PUBLISHED_DEPTH = (9, 18), 28


def _published_first_stages(ratio: float) -> tuple[float, float]:
    """Where the authors looked for what enters the language model, for a retention ratio."""
    return ratio, min(1.0, 1.5 * ratio)


class VFlowOpt(PruningMethod):
    """VFlowOpt: by what attention sinks attend to, with recycling and two stages inside the language model."""

    name = "vflowopt"
    rule = (
        "what the vision encoder's attention sinks attend to most, with averages of what is dropped, and less from two later "
        "layers on (arXiv 2508.05211)"
    )
    settings = (
        Setting(
            "sink_threshold",
            float,
            None,
            search=(0, 50),
            meaning="tokens that receive more than so many times the mean attention are sinks; None: published for the ratio",
        ),
        Setting(
            "entropy_weight",
            float,
            0.0,
            -1,
            1,
            meaning="how much the entropy of a cell's grey levels adds to its importance; 0 does not look at pixels",
        ),
        Setting(
            "recycling_cell_side",
            float,
            None,
            1,
            search=(3, 24),
            meaning="side in tokens of the cells that make one average each of what they lose; None: published for the ratio",
        ),
        Setting(
            "first_stage_ratio",
            float,
            None,
            0,
            1,
            above_minimum=True,
            search=_published_first_stages,
            meaning="share of the tokens, newlines included, that enters the language model; None: published for the ratio",
        ),
        Setting(
            "second_stage_ratio",
            float,
            None,
            0,
            1,
            above_minimum=True,
            search=(0.533, 1),
            meaning=(
                "share of these left from the second stage on; None: published for the ratio. The third stage's follows, so "
                "that `retention_ratio` is the average over layers"
            ),
        ),
        Setting(
            "second_stage_layer",
            int,
            None,
            1,
            search=(),
            meaning="layer of the language model, from 0, before which the second stage drops; None: 9/28 of its depth",
        ),
        Setting("third_stage_layer", int, None, 2, meaning="the same of the third stage; None: 18/28 of its depth", search=()),
    )
    colour = "#D55E00"
    citation = r"""
@misc{yang2025vflowopt,
  title = {{VFlowOpt}: A Token Pruning Framework for {LMMs} with Visual Information Flow-Guided Optimization},
  author = {Yang, Sihan and Xu, Runsen and Cui, Chenhang and Wang, Tai and Lin, Dahua and Pang, Jiangmiao},
  year = {2025},
  eprint = {2508.05211},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2508.05211},
  note = {ICCV 2025},
}
"""
    group = "image"
    content_dependent_count = True
    counts_newlines = True
    merges = True

    def check_settings(self, pruning: VisualTokenPruningConfig) -> None:
        second, third = pruning.second_stage_layer, pruning.third_stage_layer
        if second is not None and third is not None and second >= third:
            raise ValueError(
                f"`second_stage_layer` is {second} and `third_stage_layer` {third}; the first of them must be the smaller one."
            )
        if pruning.stages:
            raise ValueError(
                f"`stages` is {shown(pruning.stages)}; the method 'vflowopt' has stages of its own, so it must be empty. Set "
                "`second_stage_layer`, `third_stage_layer` and `second_stage_ratio`."
            )
        if pruning.token_budget is None:
            return
        for name, is_at_odds in (
            ("first_stage_ratio", pruning.first_stage_ratio is not None),
            ("exact_count", not pruning.exact_count),
        ):
            if is_at_odds:
                raise ValueError(
                    f"`token_budget` is {pruning.token_budget} and `{name}` {getattr(pruning, name)!r}; a budget finds the "
                    "ratio whose strategy lets an exact number of tokens into the language model, so that must be the default. "
                    f"Give `retention_ratio` in place of the budget, or leave `{name}` out."
                )

    def reads(self, pruning: VisualTokenPruningConfig) -> Sequence[frozenset[Evidence]]:
        if getattr(pruning, "entropy_weight", 0):
            return (frozenset({Evidence.ATTENTION_ROWS, Evidence.PIXELS}),)
        return (frozenset({Evidence.ATTENTION_ROWS}),)

    def layers(self, pruning: VisualTokenPruningConfig, encoder: EncoderFacts) -> Sequence[int]:
        return (_scored_layer(encoder),)

    def rows(self, received: Tensor, prunings: Sequence[VisualTokenPruningConfig]) -> tuple[Tensor, Tensor]:
        return attention_sinks(received, [strategy_vflowopt(pruning).sink_threshold for pruning in prunings])

    def count(self, layout: TokenLayout, pruning: VisualTokenPruningConfig) -> Sequence[int]:
        return count_vflowopt(layout, pruning)

    def drops_in_stages(self, pruning: VisualTokenPruningConfig) -> bool:
        return True

    def stages(self, pruning: VisualTokenPruningConfig, num_layers: int) -> Sequence[tuple[int, float]]:
        # Of a budget the ratio is known once an image is, and the layers do not depend on it.
        return stages_vflowopt(pruning if pruning.token_budget is None else pruning.replace(retention_ratio=1.0), num_layers)

    def importance(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        weight, rows = pruning.entropy_weight, evidence.attention_rows[_scored_layer(evidence.encoder)]
        if not weight:
            return rows
        grey_levels: Any = evidence.grey_levels
        entropy = grey_level_entropy(grey_levels).to(rows.device)
        cells = [math.prod(shape) for layout in evidence.layouts for shape in layout.view_shapes]
        return torch.cat(
            [
                of_view + weight * of_pixels.softmax(0)
                for of_view, of_pixels in zip(rows.split(cells), entropy.split(cells), strict=True)
            ]
        )

    def merge(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Sequence[MergedTokens]:
        of_images = self.importance(evidence, pruning).split([layout.num_cells for layout in evidence.layouts])
        return [
            merge_vflowopt(importance, layout, pruning) for importance, layout in zip(of_images, evidence.layouts, strict=True)
        ]

    def select(self, evidence: VisualEvidence, pruning: VisualTokenPruningConfig) -> Tensor:
        return select_vflowopt(self.importance(evidence, pruning), evidence.layouts, pruning)


def _scored_layer(encoder: EncoderFacts) -> int:
    """The layer whose output is the visual feature, or the last one before it that sees whole images."""
    comparable = [layer for layer in encoder.comparable_layers or () if layer <= encoder.feature_layer]
    return max(comparable, default=encoder.feature_layer)


def strategy_vflowopt(pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> VFlowOptStrategy:
    """The strategy of some settings: what they name, and else the published one for their retention ratio.

    Between published ratios it is interpolated linearly; below the smallest, what enters shrinks in proportion. At a ratio of 1
    both stages keep everything, whatever the settings name.

    Raises:
        ValueError: on another method's config, and a token budget in place of a ratio.
    """
    pruning = settings_of("vflowopt", pruning)
    ratio: Any = pruning.retention_ratio
    published = list(_PUBLISHED_STRATEGIES)
    below = bisect.bisect_right(published, ratio) - 1
    if below < 0:
        first = _PUBLISHED_STRATEGIES[published[0]]
        strategy = first._replace(first_stage_ratio=first.first_stage_ratio * (ratio / published[0]))
    elif ratio == 1:
        return _PUBLISHED_STRATEGIES[1.0]
    else:
        low, high = published[below : below + 2]
        share = (ratio - low) / (high - low)
        ends = zip(_PUBLISHED_STRATEGIES[low], _PUBLISHED_STRATEGIES[high], strict=True)
        strategy = VFlowOptStrategy(*(start + (end - start) * share for start, end in ends))
    given = {name: getattr(pruning, name) for name in strategy._fields}
    return strategy._replace(**{name: value for name, value in given.items() if value is not None})


def stages_vflowopt(pruning: VisualTokenPruningConfig | Mapping[str, Any], num_layers: int) -> tuple[tuple[int, float], ...]:
    """Before which layers of the language model tokens are dropped again, and what share of those left is kept each time.

    Args:
        pruning: a config of the method "vflowopt" with a retention ratio, or its settings as a dict.
        num_layers: the depth of the language model.

    Returns:
        (layer, ratio) of the second and the third stage; at a ratio of 1 both keep everything.

    Raises:
        ValueError: where the stages do not fit the depth, and where no ratio of the third stage gives `retention_ratio` as the
            average over all layers.
    """
    pruning = settings_of("vflowopt", pruning)
    ratio: Any = pruning.retention_ratio
    second, third = pruning.second_stage_layer, pruning.third_stage_layer
    published = [num_layers * layer // _PUBLISHED_DEPTH for layer in _PUBLISHED_LAYERS]
    if second is None:
        second = max(1, published[0])
        second = second if third is None else min(second, third - 1)
    if third is None:
        third = max(second + 1, published[1])
    if not 1 <= second < third < num_layers:
        raise ValueError(
            f"the stages of 'vflowopt' would begin at the layers {second} and {third}, but the language model has {num_layers} "
            f"layers, 0 to {num_layers - 1}. Set `second_stage_layer` and `third_stage_layer` so that 1 <= second < third < "
            f"{max(num_layers, 3)}, which takes at least 3 layers."
        )
    strategy = strategy_vflowopt(pruning)
    last = third_stage_ratio(ratio, strategy.first_stage_ratio, strategy.second_stage_ratio, second, third, num_layers)
    if 1 < last < 1 + 1e-9:  # by rounding, near a ratio of 1
        last = 1.0
    if not 0 < last <= 1:
        advice = "Raise the first two" if last > 1 else "Lower the first two"
        raise ValueError(
            f"`retention_ratio` is {ratio:g}, the average over {num_layers} layers. With `first_stage_ratio` "
            f"{strategy.first_stage_ratio:g} up to layer {second} and `second_stage_ratio` {strategy.second_stage_ratio:g} up "
            f"to layer {third} the third stage would have to keep {last:g} of what is left; it must be above 0 and at most 1. "
            f"{advice}, or leave them out, which takes the published ones."
        )
    return (second, strategy.second_stage_ratio), (third, last)


def third_stage_ratio(
    retention_ratio: float, first: float, second: float, second_layer: int, third_layer: int, num_layers: int
) -> float:
    """The third stage's ratio by which `retention_ratio` is the average over all layers; outside (0, 1] there is none."""
    before = first * second_layer + first * second * (third_layer - second_layer)
    return (retention_ratio * num_layers - before) / (first * second * (num_layers - third_layer))


def count_vflowopt(layout: TokenLayout, pruning: VisualTokenPruningConfig | Mapping[str, Any]) -> tuple[int]:
    """How many tokens of an image enter the language model, newlines included: N - round(N (1 - R1)), halves to even.

    With `exact_count=False` the most that may enter: the published number depends on the content.

    Args:
        layout: of the image.
        pruning: a config of the method "vflowopt" with a retention ratio, or its settings as a dict. The ratio is taken from
            here, not from the layout.

    Raises:
        ValueError: on another method's config, and a token budget in place of a ratio.
    """
    pruning = settings_of("vflowopt", pruning)
    strategy, tokens = strategy_vflowopt(pruning), layout.num_offered
    kept = tokens - round(tokens * (1 - strategy.first_stage_ratio))
    if pruning.exact_count or kept == tokens:
        return (kept,)
    averages = _num_averages(tokens, kept, strategy.recycling_cell_side)
    groups = _recycling_cells(layout, strategy.recycling_cell_side)[2]
    return (kept - averages + min(groups, tokens - kept + averages),)


def _num_averages(tokens: int, kept: int, side: float) -> int:
    """How many of the tokens that stay are set aside for averages."""
    return min(int(tokens / side / side), kept)


def attention_sinks(received: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The attention sinks of every sequence of an encoder, and the weights by which their rows are averaged.

    Args:
        received: the attention that tokens receive, float32 (sequences, tokens).
        thresholds: of every sequence how many times the mean a sink receives more than.

    Returns:
        int64 (sequences, n) and float32 (sequences, n). The first have equal weights of sum 1, one for every sink; the others
        are no sinks, and have 0. Where nothing is above the threshold, the token that receives most is the sink.
    """
    tokens = received.shape[1]
    limits = torch.tensor([float(threshold) for threshold in thresholds], device=received.device, dtype=received.dtype)
    # More than N / t tokens cannot each receive more than t times the mean. One more, as means are rounded.
    least = min(thresholds, default=0.0)
    most = min(tokens, int(tokens / least) + 1) if least > 0 else tokens
    highest, order = torch.sort(received, dim=1, descending=True, stable=True)
    is_sink = highest[:, :most] > limits[:, None] * received.mean(1, keepdim=True)
    has_none = ~is_sink.any(1)
    weights = torch.cat(((is_sink[:, 0] | has_none)[:, None], is_sink[:, 1:]), dim=1).to(torch.float32)
    return order[:, :most], weights / weights.sum(1, keepdim=True)


def grey_level_entropy(grey_levels: Tensor) -> Tensor:
    """The entropy in bits of the histogram of every cell's grey levels.

    Args:
        grey_levels: uint8 (cells, pixels of a cell).

    Returns:
        float32 (cells,).
    """
    found = []
    for part in grey_levels.split(_CELLS_AT_ONCE):
        shares = torch.zeros(len(part), 256, dtype=torch.float32, device=part.device)
        shares.scatter_add_(1, part.long(), shares.new_ones(1, 1).expand(part.shape))
        shares = shares / part.shape[1]
        found.append(-(shares * (shares + 1e-10).log2()).sum(1))
    return torch.cat(found)


def select_vflowopt(
    importance: Tensor, layouts: Sequence[TokenLayout], pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> Tensor:
    """The cells in whose place something enters the language model: themselves, or an average that they stand for.

    Args:
        importance: of the cells of all images, float (cells,), in the order of views.
        layouts: of every image.
        pruning: a config of the method "vflowopt" with the layouts' retention ratio, or its settings as a dict.

    Returns:
        bool (cells of all images,). Newlines are kept beside them, and count: `merge_vflowopt` says which.
    """
    kept = []
    for of_image, layout in zip(importance.split([layout.num_cells for layout in layouts]), layouts, strict=True):
        cells = layout.cell_numbers(merge_vflowopt(of_image, layout, pruning).kept_indices)
        is_kept = torch.zeros(layout.num_cells, dtype=torch.bool, device=cells.device)
        kept.append(is_kept.index_fill(0, cells, True))
    return torch.cat(kept)


def merge_vflowopt(
    importance: Tensor, layout: TokenLayout, pruning: VisualTokenPruningConfig | Mapping[str, Any]
) -> MergedTokens:
    """What stage 1 makes of one image: which tokens stay, and which of them hold averages of dropped ones.

    Newlines (and LLaVA-1.5's class token) have an importance of 1, rank before all cells, and count like them.

    Args:
        importance: of all cells, float (cells,), in the order of views.
        layout: of the image.
        pruning: a config of the method "vflowopt" with the layout's retention ratio, or its settings as a dict.

    Returns:
        `layout.num_retained` tokens with an exact count, else at most as many.
    """
    pruning = settings_of("vflowopt", pruning)
    strategy = strategy_vflowopt(pruning)
    offered = layout.offered_positions.to(importance.device)
    tokens = len(offered)
    packed = layout.packed(importance.float(), 1.0, 1.0)[offered]
    group, slot, num_groups, most = _recycling_cells(layout, strategy.recycling_cell_side)
    is_first = layout.is_no_cell.to(importance.device)[offered]
    # An exact count is the layout's, which keeps a token where nothing would be left.
    kept = layout.num_retained if pruning.exact_count else tokens - round(tokens * (1 - strategy.first_stage_ratio))
    merged = recycle_tokens(
        packed,
        (group.to(importance.device), slot.to(importance.device), num_groups, most),
        kept,
        _num_averages(tokens, kept, strategy.recycling_cell_side) if kept < tokens else 0,
        exact_count=pruning.exact_count or kept == tokens,
        is_first=is_first,
    )
    return merged._replace(kept_indices=offered[merged.kept_indices], members=offered[merged.members])


def recycle_tokens(
    importance: Tensor,
    groups: tuple[Tensor, Tensor, int, int],
    kept: int,
    averages: int,
    *,
    exact_count: bool = True,
    is_first: Tensor | None = None,
) -> MergedTokens:
    """Keeps the most important tokens, and averages what is dropped in groups.

    The `kept - averages` most important tokens stay as they are. The others of a group make one average, weighted by
    importance, in place of the most important one of them.

    Args:
        importance: float (tokens,); equal ones rank by index.
        groups: as `groups_of_tokens` returns them.
        kept: how many tokens stay.
        averages: how many of them are set aside for averages; at most `kept`.
        exact_count: True: the groups with the largest summed importance make averages, `averages` of them; where there are
            fewer, the most important of the other tokens stay as they are, and leave their group's average. False: every group
            makes one, however many there are.
        is_first: bool (tokens,), what ranks before all others; None for nothing.

    Returns:
        With `kept_indices` counted among these tokens. An average of one token is that token as it is.
    """
    tokens, device = len(importance), importance.device
    importance = importance.float()
    order = torch.sort(importance, descending=True, stable=True).indices
    if is_first is not None:
        order = order[torch.sort((~is_first[order]).to(torch.uint8), stable=True).indices]
    places = torch.arange(tokens, device=device)
    rank = torch.empty_like(order).scatter_(0, order, places)
    if exact_count and (averages == 0 or kept == tokens):
        return _without_averages(torch.sort((rank >= kept).to(torch.uint8), stable=True).indices[:kept])
    group, slot, num_groups, most = groups
    whole = kept - averages
    is_low = rank >= whole

    # Of every group a row: what of it is not kept whole.
    at = group * most + slot

    def by_group(of_tokens: Tensor, fill: Any) -> Tensor:
        flat = of_tokens.new_full((num_groups * most,), fill)
        return flat.scatter_(0, at, torch.where(is_low, of_tokens, fill)).view(num_groups, most)

    best = by_group(rank, tokens).min(1).values
    is_filled = best < tokens
    chosen = torch.arange(num_groups, device=device)
    if exact_count:
        by_sum = torch.sort(by_group(importance, 0.0).double().sum(1), descending=True, stable=True).indices
        chosen = by_sum[torch.sort((~is_filled[by_sum]).to(torch.uint8), stable=True).indices][:averages]
    making, best = len(chosen), best[chosen]
    # One place more takes what is said of groups that are empty.
    in_order = torch.zeros(tokens + 1, dtype=torch.bool, device=device).index_fill(0, best, True)[:tokens]
    is_candidate = (places >= whole) & ~in_order
    missing = averages - in_order.sum() if exact_count else 0
    is_extra = is_candidate & (is_candidate.cumsum(0) <= missing)
    stays = (places < whole) | in_order | is_extra
    is_kept = torch.zeros_like(stays).scatter_(0, order, stays)
    kept_indices = (
        torch.sort((~is_kept).to(torch.uint8), stable=True).indices[:kept] if exact_count else is_kept.nonzero()[:, 0]
    )

    is_member = is_low & ~torch.zeros_like(is_extra).scatter_(0, order, is_extra)
    weights = by_group(torch.where(is_member, importance.nan_to_num(_LEAST_WEIGHT).clamp(_LEAST_WEIGHT, 1e12), 0.0), 0.0)[
        chosen
    ]
    num_members = (weights > 0).sum(1)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=_LEAST_WEIGHT)
    holder = torch.nn.functional.pad(order, (0, 1))[best]
    members = by_group(places, tokens)[chosen]
    # What is no member has no weight; its feature, which need not be finite, is not touched.
    members = torch.where(weights > 0, members, holder[:, None])
    place_of_token = is_kept.cumsum(0) - 1
    held = torch.where(num_members > 1, place_of_token[holder], len(kept_indices))
    source = torch.full((len(kept_indices) + 1,), making, device=device)
    source = source.scatter_(0, held, torch.arange(making, device=device))[: len(kept_indices)]
    return MergedTokens(
        kept_indices, source, members.flatten(), weights.flatten(), torch.arange(making + 1, device=device) * most
    )


def _without_averages(kept_indices: Tensor) -> MergedTokens:
    nothing = kept_indices.new_zeros(0)
    return MergedTokens(kept_indices, torch.zeros_like(kept_indices), nothing, nothing.float(), kept_indices.new_zeros(1))


def groups_of_tokens(places: Tensor, side: float) -> tuple[Tensor, Tensor, int, int]:
    """The recycling cells of tokens.

    Args:
        places: int64 (tokens, 3): the grid in which a token lies, its row and its column there. Grids never mix.
        side: of recycling cells in tokens; any number from 1.

    Returns:
        Of every token its group and its place in the group, int64 (tokens,) each; the number of groups, and the size of the
        largest. Groups count by grid, row and column.
    """
    cells = torch.cat((places[:, :1], (places[:, 1:].double() / side).floor().long()), dim=1)
    _, group, sizes = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    starts = sizes.cumsum(0) - sizes
    slot = torch.empty_like(group)
    slot[order] = torch.arange(len(group), device=group.device) - starts[group[order]]
    return group, slot, len(sizes), int(sizes.max()) if len(sizes) else 0


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _recycling_cells(layout: TokenLayout, side: float) -> tuple[Tensor, Tensor, int, int]:
    return groups_of_tokens(layout.token_places[layout.offered_positions], side)
