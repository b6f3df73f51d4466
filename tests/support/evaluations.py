"""What the tests of `hivtp evaluate` share: questions in a folder, runs in a few seconds, and the plain way to an answer."""

import csv
from pathlib import Path
from typing import Any

import torch

from hivtp_hf.evaluation import Evaluation, evaluate_checkpoint
from tiny_models import photo

# The questions about an image need not stand side by side.
SIZES = {"wide.png": (60, 100), "deep/tall.png": (110, 40), "square.png": (60, 60)}
ROWS = (
    ("wide.png", "What colour is the cat?", "red", "colour"),
    ("deep/tall.png", "How many?", "two", "count"),
    ("wide.png", "How many people are there in this image?", "Three.", "count"),
    ("square.png", "Is there a dog to the left of the chair?", "No", "colour"),
)
HEADINGS = ("image", "question", "answer", "question_type")


def data_folder(folder: Path, rows: Any = ROWS, headings: tuple[str, ...] = HEADINGS) -> Path:
    """A folder with a table and images."""
    for seed, (name, size) in enumerate(SIZES.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(*size, seed=seed).save(path)
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([headings, *rows])
    return folder


def evaluated(checkpoint: Path, data: Path | None, output: Path, **options: Any) -> Evaluation:
    """A run of a tiny checkpoint, with nothing printed."""
    options = {"say": lambda text: None, "device": "cpu", "max_new_tokens": 4, **options}
    return evaluate_checkpoint(str(checkpoint), data, output=output, **options)


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_times(path: Path) -> list[dict[str, str]]:
    """metrics.csv, but for what a clock says."""
    return [{name: value for name, value in row.items() if name != "prefill_ms"} for row in table_of(path)]


@torch.no_grad()
def plain_answer(model: Any, processor: Any, image: Any, question: str, pruning: Any, new_tokens: int = 4) -> tuple[str, int]:
    """What a user gets who sets the pruning and calls processor and model; and how many visual tokens the prompt has."""
    processor.pruning_config = model.config.pruning_config = pruning
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    answer = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answer, int((inputs.input_ids == processor.image_token_id).sum())
