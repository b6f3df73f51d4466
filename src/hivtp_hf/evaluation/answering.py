"""Answers of a batch of prompts, and how long their prefill took."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Prefill:
    """The first pass of a language model: seconds on the clock, and the hidden states of the last position, (batch, hidden)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_states: Tensor | None = None


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int) -> tuple[list[str], float]:
    """What a model answers to some prompts by greedy decoding, until the end of sequence or a number of tokens.

    Args:
        model: a pruned model with a language modelling head.
        tokenizer: of its processor.
        prompts: the embeddings of each, (length, hidden); padded on the left to one length.
        max_new_tokens: per answer.

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
        )
    if prefill.last_states is None or not bool(prefill.last_states.isfinite().all()):
        raise ValueError("the language model's prefill is not finite. Load it in another dtype, such as float32 or bfloat16.")
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), prefill.seconds


@contextlib.contextmanager
def _watched(language_model: torch.nn.Module) -> Iterator[Prefill]:
    """Takes the time of the first pass within it."""
    prefill = Prefill()
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
        if prefill.last_states is None:
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
