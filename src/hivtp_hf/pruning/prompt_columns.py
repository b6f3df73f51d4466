"""What the language model is told of kept tokens beside their features: where they stand, what they weigh, how long they stay.

Positions of the unpruned sequence are the packed ones plus a shift that never falls: within an image the number of tokens
dropped so far, behind it the number of all that it lost. So callers go on counting packed positions, as processors, generate()
and loops by hand do, and the shift of a column follows from its image alone.

A cache remembers all three for its columns, because later calls see neither the image nor its placeholders. The mark lives on
the cache object: one conversation, one cache. generate() is handed them as tensors instead, which it repeats with the prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_COLUMNS_ATTRIBUTE = "hivtp_prompt_columns"
# By these arguments of `forward` generate() hands on what `PromptColumns` holds.
COLUMN_ARGUMENTS = ("visual_position_shifts", "visual_log_weights", "visual_stages_survived")
# Of text and of what no stage drops; more stages than any model has layers.
SURVIVES_ALL = 2**15 - 1


class PromptColumns(NamedTuple):
    """Of the first columns of some sequences; those behind have the last shift, a weight of 1, and survive all stages.

    Attributes:
        shifts: int64 (rows, columns + 1), what is added to packed positions; the last one holds for all columns to come.
        log_weights: float32 (rows, columns), what is added to the logits of the column's key.
        stages_survived: int64 (rows, columns), after how many stages inside the language model the column is still there.
    """

    shifts: Tensor
    log_weights: Tensor
    stages_survived: Tensor

    @property
    def say_nothing(self) -> bool:
        """Whether these columns run as any others do, as those of images that are kept whole."""
        told = self.shifts.any() | self.log_weights.any() | (self.stages_survived < SURVIVES_ALL).any()
        return not bool(told)

    @property
    def is_empty(self) -> bool:
        """Whether no column is known to have a shift or a weight."""
        return self.log_weights.shape[1] == 0

    def of_columns(self, columns: int) -> "PromptColumns":
        """Of exactly so many first columns."""
        missing = columns - self.log_weights.shape[1]
        if missing <= 0:
            return PromptColumns(
                self.shifts[:, : columns + 1], self.log_weights[:, :columns], self.stages_survived[:, :columns]
            )
        behind = self.shifts[:, -1:].expand(-1, missing)
        return PromptColumns(
            torch.cat((self.shifts, behind), dim=1),
            torch.nn.functional.pad(self.log_weights, (0, missing)),
            torch.nn.functional.pad(self.stages_survived, (0, missing), value=SURVIVES_ALL),
        )

    def of_rows(self, rows: int) -> "PromptColumns":
        """With as many rows as a batch has: beams and several returns repeat every row of a prompt.

        Raises:
            ValueError: where one is no multiple of the other.
        """
        own = len(self.shifts)
        if rows % own:
            raise ValueError(
                f"the cache was filled with {own} rows, and the call has {rows}; with `token_weights`, `stages` or `positions` "
                f"of the unpruned sequence it must have {own}, or a multiple. Continue with the batch that filled the cache."
            )
        times = rows // own
        return self if times == 1 else PromptColumns(*(part.repeat_interleave(times, dim=0) for part in self))

    def followed_by(self, cached: int, new: "PromptColumns") -> "PromptColumns":
        """Those of `cached` columns, and of new ones behind them."""
        before = self.of_columns(cached).of_rows(len(new.shifts))
        shifts = torch.cat((before.shifts[:, :-1], before.shifts[:, -1:] + new.shifts), dim=1)
        return PromptColumns(
            shifts,
            torch.cat((before.log_weights, new.log_weights), dim=1),
            torch.cat((before.stages_survived, new.stages_survived), dim=1),
        )

    def shifts_from(self, first: Any, number: int) -> Tensor:
        """The shifts of `number` columns from `first` on, which may be a tensor: int64 (rows, number)."""
        columns = torch.arange(number, device=self.shifts.device) + first
        return self.shifts[:, columns.clamp(max=self.shifts.shape[1] - 1)]


def given_columns(arguments: Mapping[str, Any]) -> PromptColumns | None:
    """What a call says of its columns by the names of `COLUMN_ARGUMENTS`; None where it says nothing."""
    shifts, log_weights, survived = (arguments.get(name) for name in COLUMN_ARGUMENTS)
    if shifts is None or log_weights is None:
        return None
    if survived is None:
        survived = torch.full(log_weights.shape, SURVIVES_ALL, dtype=torch.int64, device=log_weights.device)
    return PromptColumns(shifts, log_weights, survived)


def unmarked_columns(device: Any) -> PromptColumns:
    """Of columns without images: no shift, no weight, no stage, for any number of rows and columns."""
    return PromptColumns(
        torch.zeros(1, 1, dtype=torch.int64, device=device),
        torch.zeros(1, 0, dtype=torch.float32, device=device),
        torch.zeros(1, 0, dtype=torch.int64, device=device),
    )


def columns_of_images(
    is_placeholder: Tensor,
    kept_indices: Sequence[Tensor],
    num_stock: Sequence[int] | None,
    log_weights: Sequence[Tensor] | None,
    stages_survived: Sequence[Tensor] | None = None,
) -> PromptColumns:
    """Those of prompts with images.

    Args:
        is_placeholder: bool (batch, sequence), images in order row by row.
        kept_indices: of each image its kept positions in the packed sequence, ascending, one a placeholder.
        num_stock: tokens of each image in the unpruned model, or None where positions stay packed.
        log_weights: of each image float (num_retained,), or None where none are wanted.
        stages_survived: of each image int64 (num_retained,), or None where no stage drops anything.

    Raises:
        ValueError: for an image of which nothing is kept: its place is known to nobody.
    """
    rows, length = is_placeholder.shape
    device = is_placeholder.device
    steps = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)
    logarithms = torch.zeros(rows, length, dtype=torch.float32, device=device)
    survived = torch.full((rows, length), SURVIVES_ALL, dtype=torch.int64, device=device)
    if not bool(is_placeholder.any()) and num_stock is None:
        return PromptColumns(steps, logarithms, survived)
    if log_weights is not None:
        logarithms[is_placeholder] = torch.cat([weights.to(device) for weights in log_weights])
    if stages_survived is not None:
        survived[is_placeholder] = torch.cat([of_image.to(device) for of_image in stages_survived])
    if num_stock is None:
        return PromptColumns(steps, logarithms, survived)
    kept = [indices.to(device) for indices in kept_indices]
    if not all(map(len, kept)):
        raise ValueError(
            "nothing is kept of an image, so its place in the prompt is lost, and `positions` cannot be 'original'. Raise "
            "`retention_ratio`, or set `positions='packed'`."
        )
    dropped_before = [indices - torch.arange(len(indices), device=device) for indices in kept]
    steps[:, :-1][is_placeholder] = torch.cat([torch.diff(before, prepend=before.new_zeros(1)) for before in dropped_before])
    lost = torch.tensor([stock - len(indices) for stock, indices in zip(num_stock, kept, strict=True)], device=device)
    last = torch.tensor([len(indices) for indices in kept], device=device).cumsum(0) - 1
    row, column = is_placeholder.nonzero()[last].unbind(1)
    steps.index_put_((row, column + 1), lost - torch.stack([before[-1] for before in dropped_before]), accumulate=True)
    return PromptColumns(steps.cumsum(1), logarithms, survived)


def columns_in_cache(cache: Any, cached: int) -> PromptColumns | None:
    """Those of the columns that a cache holds, or None where it does not know them. It may have been cropped since."""
    columns = getattr(cache, _COLUMNS_ATTRIBUTE, None)
    if columns is None or cached == 0:
        return None
    return columns.of_columns(min(cached, columns.log_weights.shape[1]))


def remember_columns(cache: Any, columns: PromptColumns) -> None:
    """Marks the columns of a cache."""
    if cache is not None:
        setattr(cache, _COLUMNS_ATTRIBUTE, columns)


def checked_columns_in_cache(cache: Any, cached: int) -> PromptColumns | None:
    """As `columns_in_cache`; None for an empty cache alone.

    Raises:
        ValueError: for a filled cache that does not say where its visual tokens stand and what they weigh.
    """
    columns = columns_in_cache(cache, cached)
    if cached and columns is None:
        raise ValueError(
            f"the cache holds {cached} positions, but not where their visual tokens stand, what they weigh and how long they "
            "stay (`token_weights`, `positions`, `stages`). Continue on the cache object that this model filled under these "
            "settings, without converting it, or start anew without a cache."
        )
    return columns


def refuse_columns_among(keywords: Mapping[str, Any]) -> None:
    """A ValueError for shifts, weights or stages that are given to a model whose settings use none of them."""
    for name in COLUMN_ARGUMENTS:
        if keywords.get(name) is not None:
            raise ValueError(
                f"`{name}` was given, but the settings have `token_weights='none'`, `positions='packed'` and no `stages`. "
                "Leave it out, or set one of them in the model's `pruning_config`."
            )


def check_rows_are_not_packed(arguments: Mapping[str, Any], cache: Any) -> None:
    """Refuses several sequences in one row, which stock knows by positions that start again.

    Raises:
        ValueError: for `position_ids` that do not go on by 1, where there is neither a mask nor a cache.
    """
    positions = arguments.get("position_ids")
    if positions is None or cache is not None or arguments.get("attention_mask") is not None:
        return
    if positions.ndim == 3:  # places in time, height and width have gaps; where there are four rows, the first is the text's
        if len(positions) != 4:
            return
        positions = positions[0]
    if bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError(
            "`position_ids` do not go on by 1, as where several sequences are packed into a row; `token_weights`, `stages` and "
            "original `positions` need rows of one sequence. Give an `attention_mask`, or pad instead of packing."
        )
