"""Second stage: the language model learns to answer, on features of the trained tower, which does not change any more."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from examples.shapes_vqa.questions import Balance, Question

from .packed_questions import PackedQuestions, pack, packed_batch
from .tower_training import TowerScenes, loader


@dataclass(frozen=True)
class SeenImage:
    """An image as the language model meets it in training.

    Attributes:
        features: of its visual tokens, (tokens, width).
        is_shape: which of them show a shape.
        questions: about it.
        packed: the same, as words.
    """

    features: Tensor
    is_shape: Tensor
    questions: tuple[Question, ...]
    packed: PackedQuestions

    def without_most_background(self, share: float, random: np.random.Generator) -> "SeenImage":
        """The image with only a share of what shows no shape: shorter, so that more is learnt in the same time."""
        kept = self.is_shape | torch.from_numpy(random.random(len(self.is_shape)) < share)
        return SeenImage(self.features[kept], self.is_shape[kept], self.questions, self.packed)


@torch.no_grad()
def seen_images(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    split: int,
    seeds: range,
    most: Mapping[str, int],
    batch_size: int = 16,
) -> Iterator[SeenImage]:
    """Runs the tower once over the images of a range of seeds, and asks of each at most so many questions of each type."""
    balance, random = Balance(), np.random.default_rng([split, seeds.start])
    for batch in loader(TowerScenes(processor, seeds, batch_size, split)):
        pixel_values = batch.pixel_values.to(model.device, model.dtype)
        encoded = model.model.get_image_features(pixel_values, batch.image_sizes, return_dict=True).pooler_output
        for scene, targets, features in zip(batch.scenes, batch.targets, encoded, strict=True):
            is_shape = torch.zeros(len(features), dtype=torch.bool)
            is_shape[targets.positions] = targets.shape >= 0
            questions = tuple(balance.choose(scene, most, random))
            yield SeenImage(features.cpu().clone(), is_shape, questions, pack(questions, processor.tokenizer))


def answer_logits(model: LlavaNextForConditionalGeneration, images: Sequence[SeenImage]) -> tuple[Tensor, Tensor]:
    """The logits wherever a word of an answer shall follow, and the ids of those words."""
    batch = packed_batch([image.features for image in images], [image.packed for image in images], model.get_input_embeddings())
    hidden = model.model.language_model(
        inputs_embeds=batch.embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    is_answer = batch.labels != -100
    return model.lm_head(hidden[is_answer]).float(), batch.labels[is_answer]


def answer_loss(model: LlavaNextForConditionalGeneration, images: Sequence[SeenImage]) -> Tensor:
    """Cross-entropy of answers and their ends."""
    logits, labels = answer_logits(model, images)
    return nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def accuracy_by_type(
    model: LlavaNextForConditionalGeneration, images: Sequence[SeenImage], batch_size: int = 8
) -> dict[str, tuple[int, int]]:
    """Of every question type how many answers are right, and how many were asked for."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start in range(0, len(images), batch_size):
        chosen = images[start : start + batch_size]
        logits, labels = answer_logits(model, chosen)
        # Every answer is a word and the end: the word decides.
        right = (logits.argmax(1) == labels)[::2].tolist()
        types = [question.type for image in chosen for question in image.questions]
        for question_type, is_right in zip(types, right, strict=True):
            counts[question_type][0] += is_right
            counts[question_type][1] += 1
    return {question_type: (right, asked) for question_type, (right, asked) in counts.items()}
