"""Answers to the questions about a few images under every variant, from one pass of the vision tower; errors name the row."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ..pruning.layout import TokenLayout
from ..pruning.look import Look
from ..pruning.settings import VisualTokenPruningConfig
from .data import EvaluationData, ImageGroup
from .prompts import Prompt
from .smaller_images import (
    shrunken_and_pruned_tokens,
    shrunken_tokens,
    smaller_images_pruned_tokens,
    smaller_images_tokens,
)
from .tower_pass import KeptTokens, base_tile_tokens, check_finite, pruned_tokens, see, together
from .variants import BASE_ONLY, Variant

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Encoded(NamedTuple):
    """Images, as the processor and the vision tower return them."""

    inputs: Any
    seen: Look


class PartWork:
    """Works through the parts of a run.

    Args:
        model, processor: with settings that prune nothing; those of the variants count.
        plan: all variants.
        data: that is asked.
        prompts: of every row.
        batch_size: questions at once in the language model.
        max_new_tokens: per answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        plan: Sequence[Variant],
        data: EvaluationData,
        prompts: Sequence[Prompt],
        batch_size: int,
        max_new_tokens: int,
    ):
        self._model, self._processor = model, processor
        self._plan, self._data, self._prompts = plan, data, prompts
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        # Of those that look at images as they are.
        self._prunings = [one.settings for one in plan if one.settings is not None and not one.is_of_smaller_images]
        self._warm: set[Variant] = set()

    def results(self, part: Sequence[ImageGroup], advance: Callable[[int], object]) -> list[dict[str, Any]]:
        """What comes out for some images, for every variant of the plan, as JSON types.

        Args:
            part: the images and their rows.
            advance: told how many questions were answered, time and again.

        Returns:
            For every variant `answers` of the rows, image by image; `patches`, `newlines` and `tokens_per_layer` of every
            image; and `prefill_seconds` of every batch, per question in it.

        Raises:
            RuntimeError: where anything goes wrong; names the row, the method and the ratio.
        """
        encoded = _naming_the_row(part, self._encode, self._named_image, "encoding the image for all methods")
        return [self._of_variant(variant, part, encoded, advance) for variant in self._plan]

    def _encode(self, groups: Sequence[ImageGroup]) -> _Encoded:
        inputs = self._processor.image_processor(self._images(groups), return_tensors="pt").to(self._model.device)
        return _Encoded(inputs, see(self._model, inputs, self._prunings))

    def _images(self, groups: Sequence[ImageGroup]) -> list[Any]:
        return [self._data.rows[group.rows[0]].open_image() for group in groups]

    def _of_variant(
        self, variant: Variant, part: Sequence[ImageGroup], encoded: _Encoded, advance: Callable[[int], object]
    ) -> dict[str, Any]:
        def shorten(groups: Sequence[ImageGroup]) -> list[KeptTokens]:
            # A row that is looked for by itself is encoded by itself.
            return self._shortened(variant, groups, encoded if groups is part else self._encode(groups))

        kept = _naming_the_row(part, shorten, self._named_image, f"choosing visual tokens ({variant})")
        tokens_of_row = {row: tokens for group, tokens in zip(part, kept, strict=True) for row in group.rows}

        def answer(chosen: Sequence[int], new_tokens: int = self._max_new_tokens) -> tuple[list[str], float]:
            prompts = [self._prompts[row].ids(len(tokens_of_row[row].features)) for row in chosen]
            images = [tokens_of_row[row] for row in chosen if len(tokens_of_row[row].features)]
            with pruning_by(self._model, variant.settings or self._model.config.pruning_config):
                return greedy_answers(self._model, self._processor, prompts, images, new_tokens)

        # Prompts of about one length together, for the least padding.
        rows = sorted(tokens_of_row, key=lambda row: len(self._prompts[row].ids(len(tokens_of_row[row].features))))
        answers: dict[int, str] = {}
        prefill_seconds = []
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            if variant not in self._warm:  # what runs for the first time is slower, and its time counts for nothing
                _naming_the_row(batch, lambda chosen: answer(chosen, 1), self._data.named, f"answering ({variant})")
                self._warm.add(variant)
            texts, seconds = _naming_the_row(batch, answer, self._data.named, f"answering ({variant})")
            answers.update(zip(batch, texts, strict=True))
            prefill_seconds.append(seconds / len(batch))
            advance(len(batch))
        return {
            "answers": [answers[row] for group in part for row in group.rows],
            "patches": [tokens.patches for tokens in kept],
            "newlines": [tokens.newlines for tokens in kept],
            "tokens_per_layer": [tokens.tokens_per_layer for tokens in kept],
            "prefill_seconds": prefill_seconds,
        }

    def _shortened(self, variant: Variant, groups: Sequence[ImageGroup], encoded: _Encoded) -> list[KeptTokens]:
        if variant.settings is not None and not variant.is_of_smaller_images:
            return pruned_tokens(encoded.seen, self._layouts(groups, variant.settings))
        stock = self._layouts(groups, self._plan[0].settings)
        if variant.method == BASE_ONLY:
            return base_tile_tokens(encoded.seen, stock)
        if variant.grid is None and variant.ratio is not None:
            smaller = self._model, self._processor, self._images(groups), stock, variant.ratio
            if variant.settings is None:
                return smaller_images_tokens(*smaller)
            return smaller_images_pruned_tokens(*smaller, variant.settings)
        shrunken = self._model, encoded.inputs, stock, variant.grid or 1
        if variant.settings is None or variant.ratio is None:
            return shrunken_tokens(*shrunken)
        return shrunken_and_pruned_tokens(*shrunken, variant.ratio, variant.settings)

    def _layouts(self, groups: Sequence[ImageGroup], settings: VisualTokenPruningConfig | None) -> list[TokenLayout]:
        sizes = [self._data.image_sizes[group.image_name] for group in groups]
        return [self._processor.family.processor_layout(self._processor, height, width, settings) for height, width in sizes]

    def _named_image(self, group: ImageGroup) -> str:
        return self._data.named(group.rows[0])


def _naming_the_row(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Result], named: Callable[[Item], str], doing: str
) -> Result:
    def failure(name: str, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{name}: {doing} failed with {type(error).__name__}: {error}. No results were written; rows that were finished "
            "before are kept, and the same command goes on after them."
        )

    return failing_by_row(items, work, named, failure, "--batch-size")


def failing_by_row(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Result],
    named: Callable[[Item], str],
    failure: Callable[[str, Exception], BaseException],
    batch_option: str,
) -> Result:
    """What `work` returns for a batch of items; what breaks in it is looked for item by item.

    Args:
        items: at least one.
        work: takes a batch, or one item of it, as a sequence. Done twice, it must have no further effect.
        named: how to call an item.
        failure: the error to raise, by the name of what failed and the error that it failed with. The name is of the first item
            that goes wrong by itself; where each goes well by itself, of all of the batch.
        batch_option: how users set the size of a batch.
    """
    try:
        return work(items)
    except Exception as error:
        if len(items) > 1:
            for item in items:
                try:
                    work([item])
                except Exception as alone:
                    raise failure(named(item), alone) from alone
            names = f"{named(items[0])} to {named(items[-1])}, which go well one by one (a smaller `{batch_option}` may do)"
            raise failure(names, error) from error
        raise failure(named(items[0]), error) from error


class _Prefill:
    """The first pass of a language model: seconds on the clock, and the hidden states of the last position, (batch, hidden)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_states = torch.tensor(torch.nan)


@contextlib.contextmanager
def pruning_by(model: Any, settings: VisualTokenPruningConfig) -> Iterator[None]:
    """Within it a model goes by a variant's settings, by which it takes what was encoded."""
    before = model.config.pruning_config
    model.config.pruning_config = settings
    try:
        yield
    finally:
        model.config.pruning_config = before


@torch.no_grad()
def greedy_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[KeptTokens],
    max_new_tokens: int,
) -> tuple[list[str], float]:
    """What a model answers to some prompts by greedy decoding, until the end of sequence or a number of tokens.

    It is `generate` of the model that answers, given images that are encoded already. So families see to positions and further
    features by themselves, and an answer is the one that a user gets.

    Args:
        model: a pruned model with a language modelling head, under the settings that the images were encoded by.
        processor: of the model.
        prompts: the token ids of each, with placeholders; padded on the left to one length.
        images: in the order of their placeholders.
        max_new_tokens: per answer.

    Returns:
        The answers without special tokens, and the seconds that the language model's layers took for the whole prefill.

    Raises:
        ValueError: where the prefill is not finite: an answer would mean nothing.
    """
    arguments = generation_arguments(model, processor, prompts, images)
    with _watched(model.model) as prefill:
        tokens = model.generate(**arguments, max_new_tokens=max_new_tokens)
    check_finite("states of the language model's prefill", [prefill.last_states])
    texts = processor.tokenizer.batch_decode(tokens[:, max(map(len, prompts)) :], skip_special_tokens=True)
    return texts, prefill.seconds


def generation_arguments(
    model: Any, processor: Any, prompts: Sequence[Sequence[int]], images: Sequence[KeptTokens]
) -> dict[str, Any]:
    """The arguments of `generate` for greedy decoding, given images that are encoded already.

    Args:
        model, processor, prompts, images: as for `greedy_answers`.
    """
    tokenizer = processor.tokenizer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, **together(images)}
    if "mm_token_type_ids" in processor.model_input_names:
        inputs["mm_token_type_ids"] = ((ids == processor.image_token_id) & mask.bool()).long()
    # What a checkpoint sets for sampling plays no part.
    sampling = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return {**inputs, **sampling, "pad_token_id": padding}


@contextlib.contextmanager
def _watched(base: Any) -> Iterator[_Prefill]:
    """Takes the time of the first pass of a base model's language model within it."""
    prefill = _Prefill()
    device = base.device
    started: list[float] = []

    def clock() -> float:
        if device.type == "cuda":  # which is told what to do ahead of time
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not started:
            started.append(clock())

    def after(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not prefill.seconds:
            prefill.seconds = clock() - started[0]
            prefill.last_states = output[0][:, -1]

    # With stages the language model runs several times in one pass, so the base model says when that ends.
    handles = (
        base.language_model.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield prefill
    finally:
        for handle in handles:
            handle.remove()
