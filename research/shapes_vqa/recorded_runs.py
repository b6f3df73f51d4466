"""What a run of `hivtp evaluate` on the held-out questions wrote: its answers, and what its methods keep."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.shapes_vqa.held_out import HeldOut, held_out_questions
from examples.shapes_vqa.reference import CHECKPOINT
from examples.shapes_vqa.scenes import Scene, draw
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.evaluation.tower_pass import see
from hivtp_hf.evaluation.variants import SEEDS, UNPRUNED


class Chosen(NamedTuple):
    """A method of the registry at a ratio."""

    method: str
    ratio: float


class RecordedAnswer(NamedTuple):
    """An answer of a run: the method's word, and whether it is right."""

    prediction: str
    correct: bool


class RecordedRun:
    """A run of the reference model on the project's own questions.

    Args:
        folder: of the run.

    Attributes:
        settings: by method and ratio, for all methods that choose among tokens; "random" with its first seed.
        asked: the questions.
        scenes: that they are about, by number, in the order of the questions.
        answers: for every question of `asked` the answers by method and ratio; (UNPRUNED, 1.0) is the unpruned model's.

    Raises:
        ValueError: for a folder that holds no finished run on these questions.
    """

    def __init__(self, folder: Path):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with (folder / "predictions.csv").open(newline="", encoding="utf-8") as table:
                lines = list(csv.DictReader(table))
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} is no finished run: it lacks {Path(error.filename).name}. Give a folder of one."
            ) from error
        if config["data"]["name"] != "shapes-vqa":
            raise ValueError(f"{folder} is a run on {config['data']['name']!r}; give one on shapes-vqa, without `--data`.")
        if any(len(told) > 1 for told in config.get("weights_and_positions", {}).values()):
            raise ValueError(
                f"{folder} is a run with several `--weights-and-positions`, whose answers method and ratio do not tell apart. "
                "Give a run without."
            )
        self.settings = {
            Chosen(method, ratio): VisualTokenPruningConfig(method=method, retention_ratio=ratio, **settings)
            for method, settings in config["settings"].items()
            for ratio in config["ratios"]
            # Some methods ran after the image was made smaller alone.
            if ratio < 1 and method in config["methods"]
        }
        self.asked: list[HeldOut] = list(held_out_questions(config["data"]["questions"]))
        self.scenes = {asked.number: asked.scene for asked in self.asked}
        self.answers: list[dict[Chosen, RecordedAnswer]] = [{} for _ in self.asked]
        # Tables round ratios.
        by_text = {(method, f"{ratio:.6g}"): Chosen(method, ratio) for method, ratio in (*self.settings, (UNPRUNED, 1.0))}
        for line in lines:
            chosen = by_text.get((line["method"], line["ratio"]))
            if chosen is not None and line["seed"] in ("", str(SEEDS[0])):
                answer = RecordedAnswer(line["prediction"], line["correct"] == "1")
                self.answers[int(line["row"]) - 1][chosen] = answer


@torch.no_grad()
def kept_of_scenes(
    scenes: Mapping[int, Scene], settings: Mapping[Chosen, VisualTokenPruningConfig]
) -> Iterator[tuple[int, dict[Chosen, tuple[TokenLayout, Tensor]]]]:
    """For every scene its number, and by method and ratio its layout and the ascending indices that are kept, int64 (n,)."""
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = HIVTPLlavaNextProcessor.from_pretrained(CHECKPOINT)
    for number, scene in scenes.items():
        inputs = processor.image_processor(draw(scene), return_tensors="pt")
        seen = see(model, inputs, settings.values())
        kept = {}
        for chosen, pruning in settings.items():
            layout = processor.family.processor_layout(processor, scene.height, scene.width, pruning)
            _, (indices,) = seen.kept(pruning, [layout])
            kept[chosen] = layout, indices
        yield number, kept
