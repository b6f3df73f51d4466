"""Questions about images to a server with an OpenAI interface, so many at a time."""

import base64
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
from PIL import Image

from .server import MODEL


class Asked(NamedTuple):
    """A question about images, which travel as lossless PNG files in the request.

    Attributes:
        question: the text after the images.
        images: their data addresses.
    """

    question: str
    images: tuple[str, ...]

    @classmethod
    def about(cls, question: str, *images: Image.Image) -> "Asked":
        return cls(question, tuple(map(_data_address, images)))


class Answered(NamedTuple):
    """An answer.

    Attributes:
        text: of the answer.
        prompt_tokens: of the prompt, with those of the images, as the server counts them.
        seconds: from the request to the whole answer.
    """

    text: str
    prompt_tokens: int
    seconds: float


def ask(
    address: str, questions: Sequence[Asked], concurrency: int, max_tokens: int = 5, to_the_end: bool = False
) -> list[Answered]:
    """The answers to questions, greedy, in their order.

    Args:
        address: as `serving` yields it.
        questions: all of them are asked.
        concurrency: how many requests are under way at once.
        max_tokens: of an answer.
        to_the_end: answers have all of these tokens, whatever the model would end with.
    """
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:

        def answer(asked: Asked) -> Answered:
            parts = [{"type": "image_url", "image_url": {"url": image}} for image in asked.images]
            content = [*parts, {"type": "text", "text": asked.question}]
            messages: Any = [{"role": "user", "content": content}]
            start = time.perf_counter()
            reply: Any = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                temperature=0.0,
                max_tokens=max_tokens,
                extra_body={"ignore_eos": True} if to_the_end else None,
            )
            seconds = time.perf_counter() - start
            return Answered(reply.choices[0].message.content or "", reply.usage.prompt_tokens, seconds)

        with ThreadPoolExecutor(concurrency) as threads:
            return list(threads.map(answer, questions))


def _data_address(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
