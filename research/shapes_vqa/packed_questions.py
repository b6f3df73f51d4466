"""Many questions about one image in one sequence, which share the image and do not see each other.

The image's tokens are most of a prompt. So all questions about an image follow it in one sequence: each sees the image and
itself, and its positions go on from the image's end, as if it were alone. Logits equal those of single prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.shapes_vqa.questions import Question

from .reference_model import ASKED, Places, ReferenceModel


@dataclass(frozen=True)
class PackedQuestions:
    """The words of one image's sequence; the image comes between `before` and the rest.

    Attributes:
        before, after: ids in front of the image and right behind it, which all questions share.
        ids: of all questions and answers, one after another, (words,).
        question: of every word the question that it belongs to.
        place: of every word its place in its question.
        labels: the word that shall follow, where that is part of an answer; -100 elsewhere.
    """

    before: Tensor
    after: Tensor
    ids: Tensor
    question: Tensor
    place: Tensor
    labels: Tensor

    @property
    def answer_lengths(self) -> list[int]:
        """How many words each answer has, its end counted."""
        return self.question[self.labels != -100].bincount().tolist()


def pack(reference: ReferenceModel, questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> PackedQuestions:
    """The sequence of an image's questions."""

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, numbers, places, labels = [], [], [], []
    for number, question in enumerate(questions):
        asked = encoded(question.text + ASKED)
        said = [*encoded(question.answer), tokenizer.eos_token_id]
        # The last word is predicted and never read.
        read = [*asked, *said[:-1]]
        ids += read
        numbers += [number] * len(read)
        places += range(len(read))
        labels += [*[-100] * (len(asked) - 1), *said]
    return PackedQuestions(
        *map(torch.tensor, (encoded(reference.before), encoded(reference.after), ids, numbers, places, labels))
    )


@dataclass(frozen=True)
class PackedBatch:
    """What the language model is run on; shapes begin with (images, length), of positions with (3, images, length) where these
    are times, rows and columns.

    Attributes:
        place: where in `embeddings` each image begins.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    place: list[int]


def packed_batch(
    images: Sequence[Tensor],
    places: Sequence[Places | None],
    packed: Sequence[PackedQuestions],
    words: torch.nn.Embedding,
) -> PackedBatch:
    """Image features (tokens, width), where they stand if that counts, and the questions about them, padded to one length.

    Returns:
        Embeddings, an additive mask (images, 1, length, length), positions, and labels of the next word.
    """
    rows, device, starts = [], words.weight.device, []
    for features, of_image, questions in zip(images, places, packed, strict=True):
        before, after, asked = (words(ids.to(device)) for ids in (questions.before, questions.after, questions.ids))
        prefix = len(before) + len(features) + len(after)
        embeddings = torch.cat((before, features.to(device, before.dtype), after, asked))
        number = torch.cat((torch.full((prefix,), -1), questions.question))
        labels = torch.cat((torch.full((prefix,), -100), questions.labels))
        of_tokens, extent = torch.arange(len(features)), len(features)
        if of_image is not None:
            of_tokens, extent = of_image.of_tokens, max(of_image.rows, of_image.columns)
        behind = len(before) + extent
        counted = (torch.arange(len(before)), behind + torch.arange(len(after)), behind + len(after) + questions.place)
        first, *others = (of_words.expand(*of_tokens.shape[:-1], -1) for of_words in counted)
        all_places = torch.cat((first, len(before) + of_tokens, *others), dim=-1)
        rows.append((embeddings, number, all_places.movedim(-1, 0), labels))
        starts.append(len(before))
    longest = max(len(row[0]) for row in rows)

    def padded(index: int, value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[index] for row in rows], batch_first=True, padding_value=value)

    number = padded(1, -2)
    order = torch.arange(longest)
    sees = (number[:, :, None] == number[:, None, :]) | (number[:, None, :] == -1)
    sees &= order[:, None] >= order
    sees |= torch.eye(longest, dtype=torch.bool)  # padding sees itself, as a row of nothing has no softmax
    dtype = rows[0][0].dtype
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    of_batch = padded(2, 0)
    of_batch = of_batch.movedim(-1, 0) if of_batch.ndim == 3 else of_batch
    return PackedBatch(padded(0, 0.0), mask[:, None].to(device), of_batch.to(device), padded(3, -100).to(device), starts)
