"""Questions about drawn scenes of many sizes, and what transformers' `generate` answers to them."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.serving.questions import about_different_images
from hivtp_hf.evaluation import Row

NUMBER = 32
# Answers are a word and the end of the text; more would run on from there.
MAX_TOKENS = 3


class Expected(NamedTuple):
    """What `generate` makes of a prompt: how long it is, and the new tokens as ids and as text."""

    prompt_tokens: int
    token_ids: list[int]
    text: str


@functools.cache
def rows() -> tuple[Row, ...]:
    """The questions; their images have many sizes."""
    return tuple(itertools.islice(about_different_images(), NUMBER))


def prompt_of(processor, row: Row) -> str:
    """A question as the chat template writes it, with one placeholder for its image."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


@torch.no_grad()
def generated(
    checkpoint: Path, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], max_tokens: int, **call: Any
) -> list[Expected]:
    """The greedy answers of a checkpoint, one prompt with its images after another, in float32 on the CPU.

    Further keywords go to the processor.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.suppress_tokens = None  # of which the engine knows nothing
    processor = AutoProcessor.from_pretrained(checkpoint)
    expected = []
    for prompt, of_prompt in zip(prompts, images, strict=True):
        inputs = processor(images=[list(of_prompt)], text=[prompt], return_tensors="pt", **call)
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, length:].tolist()
        expected.append(Expected(length, tokens, processor.decode(tokens, skip_special_tokens=True)))
    return expected
