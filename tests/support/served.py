"""`hivtp serve` in a process of its own, and the real `openai` client of it."""

import base64
import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

ON_CPU = ("--device", "cpu", "--dtype", "float32")
_STARTING = 180  # seconds, after which something is wrong


class Answer(NamedTuple):
    """What a client got: the text, and how many tokens its prompt had."""

    text: str
    prompt_tokens: int


class Reference(NamedTuple):
    """The checkpoint's model and processor in this process."""

    model: Any
    processor: Any

    @classmethod
    def of(cls, checkpoint: Path) -> "Reference":
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return cls(model, AutoProcessor.from_pretrained(checkpoint))

    def inputs(self, text: str, *images: Any, **budget: Any) -> Any:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(images=[list(images)] if images else None, text=[prompt], return_tensors="pt", **budget)

    def answer(self, text: str, *images: Any, **budget: Any) -> Answer:
        inputs = self.inputs(text, *images, **budget)
        length = inputs.input_ids.shape[1]
        output = self.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return Answer(self.processor.decode(output[0, length:], skip_special_tokens=True), length)


class Served(NamedTuple):
    """A running server: where it listens, the file that it logs to, and its process."""

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def ask(self, model: object, content: Any, stream: bool = False, **options: Any) -> Answer:
        """What a client of its own is answered; `content` is that of a user's message. Nothing is tried twice."""
        with self.client() as client:
            messages = [{"role": "user", "content": content}]
            options = {"max_tokens": 5, "temperature": 0, **options}
            answer = client.chat.completions.create(model=str(model), messages=messages, stream=stream, **options)
            if not stream:
                return Answer(answer.choices[0].message.content, answer.usage.prompt_tokens)
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return Answer(text, chunks[-1].usage.prompt_tokens)

    def client(self) -> openai.OpenAI:
        direct = openai.DefaultHttpxClient(trust_env=False)  # past any proxy of the environment
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=_STARTING, http_client=direct)


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def image_part(image: Image.Image) -> dict[str, Any]:
    """An image within a message's content."""
    return bytes_part(png_of(image))


def bytes_part(content: bytes) -> dict[str, Any]:
    """What a client sends as an image, whether it is one or not."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """A server that listens by the time this is entered, and has ended in order once it is left.

    Args:
        folder: where it runs and logs.
        arguments: of `hivtp serve`, without its address.
        environment: of its process, if not this one's.
    """
    log = folder / "server.log"
    command = [sys.executable, "-m", "hivtp_hf.cli", "serve", *map(str, arguments), "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Served(_address(process, log), log, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert "Finished server process" in log.read_text()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    for _ in range(10 * _STARTING):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            break
        listening = re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if listening:
            return listening[1]
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
