"""The language model's pass over some prompts: its last hidden states, by the same `generate` that answers questions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.answering import generation_arguments, pruning_by
from ..evaluation.tower_pass import KeptTokens, check_finite
from ..pruning.settings import VisualTokenPruningConfig


class Prefill(NamedTuple):
    """What a language model makes of some prompts.

    Attributes:
        states: the normed states of the last layer at the last positions, float32 (prompts, positions, hidden).
        logits: of the token after the prompt, float32 (prompts, vocabulary).
    """

    states: Tensor
    logits: Tensor


@torch.no_grad()
def prefill(
    model: Any,
    processor: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[KeptTokens],
    settings: VisualTokenPruningConfig,
    positions: int = 1,
) -> Prefill:
    """One pass over some prompts.

    Args:
        model: a pruned model with a language modelling head.
        processor: of the model.
        prompts: the token ids of each, with placeholders.
        images: in the order of their placeholders, encoded under `settings`.
        settings: of the images; the model's own play no part.
        positions: at how many of the last positions states are wanted.

    Raises:
        ValueError: where states are not finite.
    """
    arguments = generation_arguments(model, processor, prompts, images)
    seen: list[Tensor] = []

    def take(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(output[0][:, -positions:].float())

    # The base model's output has been through the last norm, and has the length of the prompt also where stages drop tokens.
    hook = model.model.register_forward_hook(take, with_kwargs=True)
    try:
        with pruning_by(model, settings):
            output = model.generate(**arguments, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    finally:
        hook.remove()
    check_finite("states of the language model's prefill", seen)
    return Prefill(seen[0], output.logits[0].float())


@torch.no_grad()
def greedy_tokens(
    model: Any,
    processor: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[KeptTokens],
    settings: VisualTokenPruningConfig,
    number: int,
) -> list[list[int]]:
    """The tokens that a model answers to some prompts, at most so many, an end of sequence included. Arguments as `prefill`."""
    arguments = generation_arguments(model, processor, prompts, images)
    with pruning_by(model, settings):
        tokens = model.generate(**arguments, max_new_tokens=number)[:, arguments["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in tokens.tolist():
        length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:length])
    return answers
