"""Answers to the questions about a few images under every variant, from one pass of the vision tower; errors name the row."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..pruning.layout import TokenLayout
from ..pruning.look import Look
from ..pruning.prompt_columns import COLUMN_ARGUMENTS, PromptColumns, unmarked_columns
from ..pruning.settings import VisualTokenPruningConfig
from .data import EvaluationData, ImageGroup
from .prompts import Prompt, embedded
from .tower_pass import KeptTokens, base_tile_tokens, check_finite, pruned_tokens, see, shrunken_tokens
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
        self._prunings = [variant.settings for variant in plan if variant.settings is not None]
        self._warm: set[Variant] = set()

    def results(self, part: Sequence[ImageGroup], advance: Callable[[int], object]) -> list[dict[str, Any]]:
        """What comes out for some images, for every variant of the plan, as JSON types.

        Args:
            part: the images and their rows.
            advance: told how many questions were answered, time and again.

        Returns:
            For every variant `answers` of the rows, image by image; `patches` and `newlines` of every image; and
            `prefill_seconds` of every batch, per question in it.

        Raises:
            RuntimeError: where anything goes wrong; names the row, the method and the ratio.
        """
        encoded = _naming_the_row(part, self._encode, self._named_image, "encoding the image for all methods")
        return [self._of_variant(variant, part, encoded, advance) for variant in self._plan]

    def _encode(self, groups: Sequence[ImageGroup]) -> _Encoded:
        images = [self._data.rows[group.rows[0]].open_image() for group in groups]
        inputs = self._processor.image_processor(images, return_tensors="pt").to(self._model.device)
        return _Encoded(inputs, see(self._model, inputs, self._prunings))

    def _of_variant(
        self, variant: Variant, part: Sequence[ImageGroup], encoded: _Encoded, advance: Callable[[int], object]
    ) -> dict[str, Any]:
        def shorten(groups: Sequence[ImageGroup]) -> list[KeptTokens]:
            # A row that is looked for by itself is encoded by itself.
            return self._shortened(variant, groups, encoded if groups is part else self._encode(groups))

        kept = _naming_the_row(part, shorten, self._named_image, f"choosing visual tokens ({variant})")
        tokens_of_row = {row: tokens for group, tokens in zip(part, kept, strict=True) for row in group.rows}

        def answer(chosen: Sequence[int], new_tokens: int = self._max_new_tokens) -> tuple[list[str], float]:
            words = self._model.get_input_embeddings()
            prompts = [embedded(self._prompts[row], tokens_of_row[row].features, words) for row in chosen]
            if variant.settings is None or not variant.settings.marks_columns:
                return greedy_answers(self._model, self._processor.tokenizer, prompts, new_tokens)
            places = [_places_in_prompt(self._prompts[row], tokens_of_row[row]) for row in chosen]
            with _pruning_by(self._model, variant.settings):
                return greedy_answers(self._model, self._processor.tokenizer, prompts, new_tokens, places)

        # Prompts of about one length together, for the least padding.
        rows = sorted(tokens_of_row, key=lambda row: self._prompts[row].length(len(tokens_of_row[row].features)))
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
            "prefill_seconds": prefill_seconds,
        }

    def _shortened(self, variant: Variant, groups: Sequence[ImageGroup], encoded: _Encoded) -> list[KeptTokens]:
        if variant.settings is not None:
            return pruned_tokens(encoded.seen, self._layouts(groups, variant.settings))
        stock = self._layouts(groups, self._plan[0].settings)
        if variant.method == BASE_ONLY:
            return base_tile_tokens(encoded.seen, stock)
        return shrunken_tokens(self._model, encoded.inputs, stock, variant.grid or 1)

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


def _places_in_prompt(prompt: Prompt, tokens: KeptTokens) -> PromptColumns:
    """Where the tokens of a prompt stand and what they weigh, from those of its image."""
    length = prompt.length(len(tokens.features))
    nothing = unmarked_columns(tokens.features.device)
    if tokens.places is None or not len(tokens.features):
        return nothing.of_columns(length)
    return nothing.followed_by(len(prompt.before), tokens.places).of_columns(length)


@contextlib.contextmanager
def _pruning_by(model: Any, settings: VisualTokenPruningConfig) -> Iterator[None]:
    """Within it a model goes by a variant's settings: its language model takes places and weights under such settings alone."""
    before = model.config.pruning_config
    model.config.pruning_config = settings
    try:
        yield
    finally:
        model.config.pruning_config = before


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    places: Sequence[PromptColumns] | None = None,
) -> tuple[list[str], float]:
    """What a model answers to some prompts by greedy decoding, until the end of sequence or a number of tokens.

    Args:
        model: a pruned model with a language modelling head.
        tokenizer: of its processor.
        prompts: the embeddings of each, (length, hidden); padded on the left to one length.
        max_new_tokens: per answer.
        places: of each prompt, as one row, where its tokens stand and what they weigh; None for packed and equal ones.

    Returns:
        The answers without special tokens, and the seconds that the language model's layers took for the whole prefill.

    Raises:
        ValueError: where the prefill is not finite: an answer would mean nothing.
    """
    longest = max(len(prompt) for prompt in prompts)
    embeddings = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=embeddings.device)
    for index, prompt in enumerate(prompts):
        embeddings[index, longest - len(prompt) :] = prompt
        mask[index, longest - len(prompt) :] = 1
    told = {}
    if places is not None:
        nothing = unmarked_columns(embeddings.device)
        rows = [nothing.followed_by(longest - len(prompt), own) for prompt, own in zip(prompts, places, strict=True)]
        told = {name: torch.cat(parts) for name, parts in zip(COLUMN_ARGUMENTS, zip(*rows, strict=True), strict=True)}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with _watched(model.model.language_model) as prefill:
        # Given embeddings alone, it returns new tokens alone. What a checkpoint sets for sampling plays no part.
        tokens = model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
            **told,
        )
    check_finite("states of the language model's prefill", [prefill.last_states])
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), prefill.seconds


@contextlib.contextmanager
def _watched(language_model: torch.nn.Module) -> Iterator[_Prefill]:
    """Takes the time of the first pass within it."""
    prefill = _Prefill()
    device = next(language_model.parameters()).device
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

    handles = (
        language_model.register_forward_pre_hook(before, with_kwargs=True),
        language_model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield prefill
    finally:
        for handle in handles:
            handle.remove()
