"""Second stage: the language model learns to answer, on features of the trained tower, which does not change any more."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.shapes_vqa.questions import Balance, Question

from .packed_questions import PackedQuestions, pack, packed_batch
from .reference_model import Places, ReferenceModel
from .tower_training import TowerScenes, loader

# The input of this layer of the language model is asked for places, where the tower cannot know them, and how much that counts.
_PLACE_LAYER, _PLACE_WEIGHT = 2, 0.3


@dataclass(frozen=True)
class SeenImage:
    """An image as the language model meets it in training.

    Attributes:
        features: of its visual tokens, (tokens, width).
        is_shown: which of them show a shape or a sign.
        places: where they stand, if that counts.
        questions: about it.
        packed: the same, as words.
    """

    features: Tensor
    is_shown: Tensor
    places: Places | None
    questions: tuple[Question, ...]
    packed: PackedQuestions

    def without_most_background(self, share: float, random: np.random.Generator) -> "SeenImage":
        """The image with only a share of what shows nothing: shorter, so that more is learnt in the same time."""
        kept = self.is_shown | torch.from_numpy(random.random(len(self.is_shown)) < share)
        places = self.places and self.places._replace(of_tokens=self.places.of_tokens[:, kept])
        return replace(self, features=self.features[kept], is_shown=self.is_shown[kept], places=places)


class LanguageHeads(nn.Module):
    """Asks every token for its row and column, where the tower cannot know them. Thrown away after training."""

    def __init__(self, text_width: int):
        super().__init__()
        self.place = nn.Linear(text_width, 2)


@torch.no_grad()
def seen_images(
    reference: ReferenceModel,
    model: Any,
    processor: Any,
    split: int,
    seeds: range,
    most: Mapping[str, int],
    batch_size: int = 16,
) -> Iterator[SeenImage]:
    """Runs the tower once over the images of a range of seeds, and asks of each at most so many questions of each type."""
    balance, random = Balance(), np.random.default_rng([split, seeds.start])
    for batch in loader(TowerScenes(reference, processor, seeds, batch_size, split)):
        encoded = reference.encode(model, batch.inputs).features
        for scene, layout, targets, features in zip(batch.scenes, batch.layouts, batch.targets, encoded, strict=True):
            is_shown = torch.zeros(len(features), dtype=torch.bool)
            is_shown[targets.positions] = targets.is_shown
            questions = tuple(balance.choose(scene, most, random))
            if questions:
                packed = pack(reference, questions, processor.tokenizer)
                yield SeenImage(features.cpu().clone(), is_shown, reference.places(layout), questions, packed)


class _Answers(NamedTuple):
    logits: Tensor
    labels: Tensor
    hidden_states: Sequence[Tensor]
    starts: list[int]


def _answers(model: Any, images: Sequence[SeenImage], hidden_states: bool = False) -> _Answers:
    """Logits wherever a word of an answer shall follow, and the ids of those words."""
    batch = packed_batch(
        [image.features for image in images],
        [image.places for image in images],
        [image.packed for image in images],
        model.get_input_embeddings(),
    )
    output = model.model.language_model(
        inputs_embeds=batch.embeddings,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=hidden_states,
    )
    is_answer = batch.labels != -100
    logits = model.lm_head(output.last_hidden_state[is_answer]).float()
    return _Answers(logits, batch.labels[is_answer], output.hidden_states if hidden_states else (), batch.place)


def answer_logits(model: Any, images: Sequence[SeenImage]) -> tuple[Tensor, Tensor]:
    """The logits wherever a word of an answer shall follow, and the ids of those words."""
    answers = _answers(model, images)
    return answers.logits, answers.labels


def answer_loss(model: Any, heads: LanguageHeads, images: Sequence[SeenImage]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of answers and their ends, and, where tokens have rows and columns, how far off told places are."""
    told = images[0].places is not None
    answers = _answers(model, images, hidden_states=told)
    loss = nn.functional.cross_entropy(answers.logits, answers.labels)
    if not told:
        return loss, {}
    states, expected = [], []
    for state, start, image in zip(answers.hidden_states[_PLACE_LAYER], answers.starts, images, strict=True):
        states.append(state[start : start + len(image.features)][image.is_shown.to(state.device)])
        size = torch.tensor([image.places.rows, image.places.columns])
        expected.append((image.places.of_tokens[1:, image.is_shown].T + 0.5) / size * 2 - 1)
    off = heads.place(torch.cat(states).float()) - torch.cat(expected).to(loss.device)
    return loss + _PLACE_WEIGHT * off.square().mean(), {"place": off.abs().mean().item()}


@torch.no_grad()
def accuracy_by_type(model: Any, images: Sequence[SeenImage], batch_size: int = 8) -> dict[str, tuple[int, int]]:
    """Of every question type how many answers are right, and how many were asked for."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start in range(0, len(images), batch_size):
        chosen = images[start : start + batch_size]
        logits, labels = answer_logits(model, chosen)
        # Every answer is words and the end: all words are to be right.
        lengths = [int(number) for image in chosen for number in image.packed.answer_lengths]
        right = [bool(found[:-1].all()) for found in (logits.argmax(1) == labels).split(lengths)]
        types = [question.type for image in chosen for question in image.questions]
        for question_type, is_right in zip(types, right, strict=True):
            counts[question_type][0] += is_right
            counts[question_type][1] += 1
    return {question_type: (right, asked) for question_type, (right, asked) in counts.items()}
