"""`CalibrationPasses`: what a model makes of questions about images, unpruned once and pruned under any settings.

The vision tower runs once over an image for all settings, as long as what they read of it fits into the memory that is allowed.
Beyond that, and for methods that tell the tower during its pass what they read, it runs again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..evaluation.answering import failing_by_row
from ..evaluation.data import EvaluationData, ImageGroup
from ..evaluation.prompts import prompts_of
from ..evaluation.tower_pass import KeptTokens, pruned_tokens, see
from ..pruning.evidence import Evidence, evidence_to_read
from ..pruning.features import check_pruning_fits_encoder
from ..pruning.layout import TokenLayout
from ..pruning.look import Look
from ..pruning.settings import VisualTokenPruningConfig
from ..pruning.stages import stages_of_language_model
from .objectives import Objective
from .prefill import greedy_tokens, prefill

UNPRUNED = VisualTokenPruningConfig(method="none")
# Of these a pass holds what any settings read, given the layers.
_OF_ANY_SETTINGS = {Evidence.RECEIVED_ATTENTION, Evidence.CLASS_ATTENTION, Evidence.FEATURES, Evidence.ENCODED}
_GIB = 2**30


class Measured(NamedTuple):
    """What some settings come to.

    Attributes:
        values: of the objective, of every question in turn.
        tokens_per_layer: of an image, newlines included, the mean over all layers of the language model and all images.
    """

    values: tuple[float, ...]
    tokens_per_layer: float

    @property
    def value(self) -> float:
        """Of the objective, the mean over all questions."""
        return sum(self.values) / len(self.values)


class _Reference(NamedTuple):
    """The unpruned model's pass over a question: its greedy answer as far as it goes before the states, and what they are."""

    answer: list[int]
    states: Tensor
    logits: Tensor


class CalibrationPasses:
    """The passes that a search needs.

    Args:
        model: a pruned model with a language modelling head. Its own settings play no part.
        processor: of the model; nor do its settings.
        data: questions about images. Their answers play no part.
        objective: that is measured.
        start: the settings that a search begins from.
        layers: the encoder layers that settings may read.
        batch_size: images at once in the vision tower, and questions at once in the language model.
        memory: how many GiB kept passes of the tower may take.
        answer_tokens: how long the unpruned model's answer may be, for objectives that need one.

    Raises:
        ValueError: for questions that make no prompt; names the row.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        data: EvaluationData,
        objective: Objective,
        start: VisualTokenPruningConfig,
        layers: Sequence[int],
        batch_size: int,
        memory: float,
        answer_tokens: int,
    ):
        self._model, self._processor, self._data, self._objective = model, processor, data, objective
        self._layers, self._batch_size, self._answer_tokens = list(layers), batch_size, answer_tokens
        self._parts = data.parts(batch_size)
        self._prompts = prompts_of(processor, data)
        self._kept: dict[int, Look] = {}
        # Nothing is gained by keeping what the method cannot use.
        self._bytes_left = memory * _GIB if self._serves_all(start) else 0
        self._references: dict[int, _Reference] = {}

    @property
    def num_questions(self) -> int:
        """How many questions a measurement passes over."""
        return len(self._data.rows)

    @property
    def num_kept(self) -> int:
        """Of how many images the tower's pass is kept."""
        return sum(len(self._parts[part]) for part in self._kept)

    def check(self, settings: VisualTokenPruningConfig) -> None:
        """A ValueError, before anything runs, where model or images do not go with some settings."""
        base = self._model.model
        check_pruning_fits_encoder(settings, base.encoder_facts(), base.provided_evidence)
        base.family.check_pruning(settings)
        stages_of_language_model(settings, base.config.get_text_config().num_hidden_layers)
        for part in self._parts:
            self._layouts(part, settings)

    def refer(self, advance: Callable[[int], object]) -> None:
        """Runs the unpruned model over all questions; done once, before the first measurement.

        Args:
            advance: told how many questions are done, time and again.

        Raises:
            RuntimeError: where a row goes wrong; names it.
        """
        for number, part in enumerate(self._parts):
            tokens = self._tokens(number, part, UNPRUNED)
            for rows in self._batches(part):
                references = self._naming_the_row(rows, functools.partial(self._refer, tokens=tokens), "unpruned")
                self._references.update(zip(rows, references, strict=True))
                advance(len(rows))

    def measure(self, settings: VisualTokenPruningConfig, advance: Callable[[int], object]) -> Measured:
        """The objective of some settings, by one pass over every question. Arguments and errors as `refer`."""
        values: dict[int, float] = {}
        per_layer = []
        for number, part in enumerate(self._parts):
            tokens = self._tokens(number, part, settings)
            per_layer += [tokens[group.rows[0]].tokens_per_layer for group in part]
            for rows in self._batches(part):
                work = functools.partial(self._compared, tokens=tokens, settings=settings)
                values.update(zip(rows, self._naming_the_row(rows, work, f"pruned by {settings!r}"), strict=True))
                advance(len(rows))
        # Rows about one image need not stand side by side.
        return Measured(tuple(values[row] for row in sorted(values)), sum(per_layer) / len(per_layer))

    def _refer(self, rows: Sequence[int], tokens: Mapping[int, KeptTokens]) -> list[_Reference]:
        prompts, images = self._prompts_and_images(rows, tokens, {})
        answers: list[list[int]] = [[] for _ in rows]
        if self._objective.needs_answer:
            # The last token of an answer predicts nothing.
            of_rows = greedy_tokens(self._model, self._processor, prompts, images, UNPRUNED, self._answer_tokens)
            answers = [answer[:-1] for answer in of_rows]
            prompts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        states, logits = self._passed(prompts, images, UNPRUNED, answers)
        return [_Reference(*of_row) for of_row in zip(answers, states, logits, strict=True)]

    def _compared(
        self, rows: Sequence[int], tokens: Mapping[int, KeptTokens], settings: VisualTokenPruningConfig
    ) -> list[float]:
        references = [self._references[row] for row in rows]
        answers = {row: reference.answer for row, reference in zip(rows, references, strict=True)}
        prompts, images = self._prompts_and_images(rows, tokens, answers)
        passed = self._passed(prompts, images, settings, list(answers.values()))
        return [
            self._objective.value(reference.states, reference.logits, states, logits)
            for reference, states, logits in zip(references, *passed, strict=True)
        ]

    def _passed(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[KeptTokens],
        settings: VisualTokenPruningConfig,
        answers: Sequence[Sequence[int]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of every prompt the states from its last token on, and the logits of its end."""
        longest = 1 + max(map(len, answers))
        states, logits = prefill(self._model, self._processor, prompts, images, settings, longest)
        # Prompts are padded on the left, so that all end in the last position.
        return [of_row[-1 - len(answer) :] for of_row, answer in zip(states, answers, strict=True)], list(logits)

    def _prompts_and_images(
        self, rows: Sequence[int], tokens: Mapping[int, KeptTokens], answers: Mapping[int, Sequence[int]]
    ) -> tuple[list[list[int]], list[KeptTokens]]:
        of_rows = [tokens[row] for row in rows]
        prompts = [
            [*self._prompts[row].ids(len(image.features)), *answers.get(row, ())]
            for row, image in zip(rows, of_rows, strict=True)
        ]
        return prompts, [image for image in of_rows if len(image.features)]

    def _tokens(self, number: int, part: Sequence[ImageGroup], settings: VisualTokenPruningConfig) -> dict[int, KeptTokens]:
        """What enters the language model of the image of every row of a part."""

        def shorten(groups: Sequence[ImageGroup]) -> list[KeptTokens]:
            # A row that is looked for by itself is encoded by itself.
            look = self._look(number, part, settings) if groups is part else self._see(groups, settings, ())
            return pruned_tokens(look, self._layouts(groups, settings))

        kept = failing_by_row(
            part, shorten, lambda group: self._data.named(group.rows[0]), _failure(f"encoded, {settings!r}"), "--batch-size"
        )
        return {row: tokens for group, tokens in zip(part, kept, strict=True) for row in group.rows}

    def _look(self, number: int, part: Sequence[ImageGroup], settings: VisualTokenPruningConfig) -> Look:
        if not self._serves_all(settings):
            return self._see(part, settings, ())
        if number in self._kept:
            return self._kept[number]
        if self._bytes_left <= 0:
            return self._see(part, settings, ())
        look = self._see(part, UNPRUNED, self._layers)
        # Pixels have been seen by then.
        pixels = self._model.model.family.image_inputs[0]
        arguments = {name: value for name, value in look.arguments.items() if name != pixels}
        look = dataclasses.replace(look, arguments=arguments)
        taken = sum(_sizes_of_memory(look).values())
        if taken <= self._bytes_left:
            self._kept[number] = look
            self._bytes_left -= taken
        else:
            self._bytes_left = 0  # so that no later part reads all layers in vain
        return look

    def _serves_all(self, settings: VisualTokenPruningConfig) -> bool:
        """Whether a pass that is kept holds all that some settings read."""
        base = self._model.model
        kinds = evidence_to_read(settings, base.provided_evidence)
        return kinds is not None and kinds <= _OF_ANY_SETTINGS and self._has_layers(settings)

    def _has_layers(self, settings: VisualTokenPruningConfig) -> bool:
        return set(settings.scored_layers(self._model.model.encoder_facts())) <= set(self._layers)

    def _see(self, groups: Sequence[ImageGroup], settings: VisualTokenPruningConfig, layers: Sequence[int]) -> Look:
        images = [self._data.rows[group.rows[0]].open_image() for group in groups]
        inputs = self._processor.image_processor(images, return_tensors="pt").to(self._model.device)
        return see(self._model, inputs, [settings], layers)

    def _layouts(self, groups: Sequence[ImageGroup], settings: VisualTokenPruningConfig) -> list[TokenLayout]:
        sizes = [self._data.image_sizes[group.image_name] for group in groups]
        family = self._processor.family
        return [family.processor_layout(self._processor, height, width, settings) for height, width in sizes]

    def _batches(self, part: Sequence[ImageGroup]) -> Iterator[list[int]]:
        rows = [row for group in part for row in group.rows]
        for start in range(0, len(rows), self._batch_size):
            yield rows[start : start + self._batch_size]

    def _naming_the_row(self, rows: Sequence[int], work: Callable[[Sequence[int]], Any], what: str) -> Any:
        return failing_by_row(
            rows, work, self._data.named, _failure(f"passed through the language model, {what}"), "--batch-size"
        )


def _failure(doing: str) -> Callable[[str, Exception], RuntimeError]:
    def failure(name: str, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"{name} cannot be {doing}: {type(error).__name__}: {error}. Trials that were finished before are kept, and the "
            "same call goes on after them."
        )

    return failure


def _sizes_of_memory(value: Any) -> dict[int, int]:
    """The blocks of memory that hold the tensors of a value, by their address, in bytes; what two tensors share counts once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, Look):
        return _sizes_of_memory([getattr(value, field.name) for field in dataclasses.fields(value)])
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    found: dict[int, int] = {}
    for part in parts:
        found |= _sizes_of_memory(part)
    return found
