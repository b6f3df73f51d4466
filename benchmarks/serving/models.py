"""What is served: the small trained model, or one whose language model is large enough for its prefill to count."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from examples.shapes_vqa.reference import CHECKPOINT
from examples.tiny_checkpoint import tiny_config, tiny_model, tiny_processor

from .questions import about_different_images

# The shape of Qwen2.5-0.5B, but for its vocabulary.
_HALF_BILLION = {
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


class Question(NamedTuple):
    """A question about an image, and the right answer, where there is one."""

    text: str
    image: Image.Image
    answer: str | None


class Served(NamedTuple):
    """A stock checkpoint and what is asked of it.

    Attributes:
        checkpoint: a folder.
        questions: without end, each about an image of its own.
        words: that the results say about both.
    """

    checkpoint: Path
    questions: Iterator[Question]
    words: str


def trained_model(folder: Path) -> Served:
    """The small trained model, from its own folder, and held-out questions."""
    questions = (Question(row.question, row.open_image(), row.answer) for row in about_different_images())
    return Served(
        CHECKPOINT, questions, "The trained model of examples/shapes_vqa, one question about one drawn image a request."
    )


def half_billion_model(folder: Path) -> Served:
    """A LLaVA-NeXT of random weights, saved in `folder`, and square images of noise.

    Its language model has 24 layers of 896 numbers. Its tower has real tiles of 24 x 24 cells and is narrow.
    """
    config = half_billion_config()
    checkpoint = folder / "half-billion"
    tiny_model(config).save_pretrained(checkpoint)
    tiny_processor(config).save_pretrained(checkpoint)
    words = (
        "LLaVA-NeXT of random weights: a language model shaped as Qwen2.5-0.5B (24 layers, 896 wide, a vocabulary of 400)\n"
        "and a narrow tower (10 layers, 64 wide). One image of noise a request; every answer has 5 tokens, and none is right."
    )
    return Served(checkpoint, squares_of_noise(), words)


def half_billion_config() -> Any:
    """Its configuration, of stock's class."""
    config = tiny_config(text_type="qwen2", text_layers=24, text_width=896)
    for name, value in _HALF_BILLION.items():
        setattr(config.text_config, name, value)
    return config


def squares_of_noise() -> Iterator[Question]:
    """Questions about images of 336 pixels a side, which LLaVA-NeXT sees as 1,176 tokens: 576 twice, and 24 ends of rows."""
    for seed in itertools.count():
        pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        yield Question("What is shown in this image?", Image.fromarray(pixels), None)


MODELS = {"trained": trained_model, "0.5b": half_billion_model}
