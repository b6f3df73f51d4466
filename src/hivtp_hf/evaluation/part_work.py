"""`PartWork`: answers the questions about a few images under every variant, from one pass of the vision tower."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..pruning_config import VisualTokenPruningConfig
from ..token_layout import TokenLayout
from .answering import greedy_answers
from .evaluation_data import EvaluationData, numbered
from .image_groups import ImageGroup
from .kept_tokens import KeptTokens, base_tile_tokens, pruned_tokens
from .named_errors import naming_the_row
from .prompts import Prompt, embedded
from .shrunken_images import shrunken_tokens
from .tower_pass import SeenImages, see
from .variants import BASE_ONLY, Variant


class _Encoded(NamedTuple):
    """Images, as the processor and the vision tower return them."""

    inputs: Any
    seen: SeenImages


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
        encoded = naming_the_row(part, self._encode, self._named_image, "encoding the image for all methods")
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

        kept = naming_the_row(part, shorten, self._named_image, f"choosing visual tokens ({variant})")
        tokens_of_row = {row: tokens for group, tokens in zip(part, kept, strict=True) for row in group.rows}

        def answer(chosen: Sequence[int], new_tokens: int = self._max_new_tokens) -> tuple[list[str], float]:
            words = self._model.get_input_embeddings()
            prompts = [embedded(self._prompts[row], tokens_of_row[row].features, words) for row in chosen]
            return greedy_answers(self._model, self._processor.tokenizer, prompts, new_tokens)

        # Prompts of about one length together, for the least padding.
        rows = sorted(tokens_of_row, key=lambda row: self._prompts[row].length(len(tokens_of_row[row].features)))
        answers: dict[int, str] = {}
        prefill_seconds = []
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            if variant not in self._warm:  # what runs for the first time is slower, and its time counts for nothing
                naming_the_row(batch, lambda chosen: answer(chosen, 1), self._named, f"answering ({variant})")
                self._warm.add(variant)
            texts, seconds = naming_the_row(batch, answer, self._named, f"answering ({variant})")
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
        return [self._processor._token_layout(height, width, settings) for height, width in sizes]

    def _named(self, row: int) -> str:
        return named_row(self._data, row)

    def _named_image(self, group: ImageGroup) -> str:
        return self._named(group.rows[0])


def named_row(data: EvaluationData, row: int) -> str:
    """How messages call a row: by number, image and question."""
    asked = data.rows[row]
    return f"{numbered(row)} (image {asked.image_name!r}, question {asked.question!r})"
