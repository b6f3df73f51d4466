"""First stage: the vision tower and the projector learn, cell by cell, what a visual token shows.

The classifiers are the language model's own word embeddings, seen through the projector: a cell of a red circle shall point
along "red" and "circle". So the language model's answers are aligned with what it sees before it is trained itself. Two heads
that are thrown away afterwards ask every token of a middle layer, and the class token at the end, what the whole tile holds:
that makes tokens look at shapes, and not at their neighbours alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from examples.shapes_vqa.scenes import Scene, draw, make_practice_scene, make_scene, make_sign_practice_scene, make_sign_scene
from examples.shapes_vqa.splits import PRACTICE
from examples.shapes_vqa.vocabulary import CHARACTERS, CODE_LENGTH, COLOURS, DIGITS, KINDS
from hivtp_hf import TokenLayout

from .dense_targets import SHOWN_KINDS, DenseTargets, dense_targets
from .reference_model import Encoded, ReferenceModel
from .tokens import SIGN

# Per cell: how long a component has to be, of an embedding's length, to count as there, and how sharply.
_THERE, _SHARPNESS = 0.5, 10.0
# Cells without a shape are many and easy.
_BACKGROUND_WEIGHT = 0.25
_DIGIT_WEIGHT, _CHARACTER_WEIGHT = 2.0, 2.0
_CENTRE_WEIGHT, _PLACE_WEIGHT, _BASE_WEIGHT, _TILE_WEIGHT = 0.5, 1.0, 0.2, 0.5
# How many scenes have signs, and how many images another size, where the model's tokens follow it.
_WITH_SIGNS, _SCALED = 0.4, 0.3


@dataclass(frozen=True)
class TowerBatch:
    """Images as the model takes them, and what their cells show."""

    inputs: dict[str, Tensor]
    layouts: list[TokenLayout]
    targets: list[DenseTargets]
    scenes: list[Scene]


class TowerScenes(IterableDataset):
    """Batches of scenes from a range of seeds, made while the model trains."""

    def __init__(self, reference: ReferenceModel, processor: Any, seeds: range, batch_size: int, split: int):
        self._reference, self._processor = reference, processor
        self._seeds, self._batch_size, self._split = seeds, batch_size, split

    def __iter__(self) -> Iterator[TowerBatch]:
        for start in range(0, len(self._seeds), self._batch_size):
            seeds = self._seeds[start : start + self._batch_size]
            scenes = [_scene(self._split, seed) for seed in seeds]
            scales = [_scale(self._reference, self._split, seed) for seed in seeds]
            yield tower_batch(self._reference, self._processor, scenes, scales)


def _scene(split: int, seed: int) -> Scene:
    plain, with_signs = (make_practice_scene, make_sign_practice_scene) if split == PRACTICE else (make_scene, make_sign_scene)
    # By the golden ratio, so that every batch has its share.
    return (with_signs if seed * 0.618034 % 1 < _WITH_SIGNS else plain)((split, seed))


def _scale(reference: ReferenceModel, split: int, seed: int) -> float:
    random = np.random.default_rng([split, seed, 3])
    return float(random.uniform(*reference.scales)) if random.random() < _SCALED else 1.0


def tower_batch(
    reference: ReferenceModel, processor: Any, scenes: list[Scene], scales: Sequence[float] | None = None
) -> TowerBatch:
    """The images of some scenes, each made larger by a factor, and their labels."""
    images, layouts, targets = [], [], []
    for scene, scale in zip(scenes, scales or [1.0] * len(scenes), strict=True):
        image = draw(scene)
        if scale != 1:
            image = image.resize((round(scale * image.width), round(scale * image.height)))
        images.append(image)
        layouts.append(reference.layout_of(processor, image.height, image.width))
        targets.append(dense_targets(scene, layouts[-1], image.width / scene.width))
    return TowerBatch(reference.inputs_of(processor, images), layouts, targets, scenes)


def loader(scenes: TowerScenes) -> DataLoader:
    """Makes batches in a process of its own, ahead of time."""
    return DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4)


class TowerHeads(nn.Module):
    """What asks for more than words: which characters a cell shows, whether it is of the base tile, and what a tile or an image
    holds. Thrown away after training."""

    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.is_base = nn.Linear(text_width, 1)
        self.characters = nn.Linear(text_width, CODE_LENGTH * (len(CHARACTERS) + 1))
        self.middle = nn.Linear(vision_width, _IN_TILE)
        self.tile = nn.Linear(vision_width, len(KINDS) * len(COLOURS))


_IN_TILE = len(SHOWN_KINDS) + len(COLOURS) + len(DIGITS)


def word_directions(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """The embeddings of all words."""
    embeddings = model.get_input_embeddings().weight.detach().float()
    return {word: embeddings[index] for word, index in tokenizer.get_vocab().items()}


def dense_loss(
    reference: ReferenceModel, model: Any, tokenizer: Any, heads: TowerHeads, batch: TowerBatch
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and how many cells of each kind of label are right."""
    device = model.device
    encoded = reference.encode(model, batch.inputs, hidden_states=True)
    packed = zip(encoded.features, batch.targets, strict=True)
    cells = torch.cat([features[targets.positions.to(device)] for features, targets in packed]).float()
    labels = {
        name: torch.cat([getattr(targets, name) for targets in batch.targets]).to(device)
        for name in ("tile", "row", "column", "kind", "colour", "digit", "characters", "is_centre", "is_shown")
    }
    of_word = word_directions(model, tokenizer)
    losses, right = [], {}
    for name, choices, weight in (("kind", SHOWN_KINDS, 1.0), ("colour", COLOURS, 1.0), ("digit", DIGITS, _DIGIT_WEIGHT)):
        of_words = _SHARPNESS * cells @ torch.stack([of_word[choice] for choice in choices]).T
        logits = nn.functional.pad(of_words, (0, 1), value=_SHARPNESS * _THERE)
        losses.append(weight * _told(name, logits, labels[name], right))
    characters = heads.characters(cells).view(-1, len(CHARACTERS) + 1)
    losses.append(_CHARACTER_WEIGHT * _told("characters", characters, labels["characters"].flatten(), right))
    centre = _SHARPNESS * (cells @ of_word["shapes"] - _THERE)
    is_centre = labels["is_centre"].float()
    losses.append(_CENTRE_WEIGHT * _weighted(centre, is_centre))
    right["centre"] = ((centre > 0) == (is_centre > 0))[is_centre > 0].float().mean().item()
    if reference.has_base_tile:
        losses += _place_losses(cells, labels, of_word, heads, right)
    losses.append(_TILE_WEIGHT * _tile_loss(reference, encoded, heads, batch, right))
    return sum(losses), right


def _told(name: str, logits: Tensor, labels: Tensor, right: dict[str, float]) -> Tensor:
    """Cross-entropy of what cells show; the last choice is nothing. Notes how much is right, of both."""
    is_there = labels < logits.shape[1] - 1
    of_cells = nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(is_there, 1.0, _BACKGROUND_WEIGHT)
    found = logits.argmax(1) == labels
    right[name] = found[is_there].float().mean().item()
    right[f"no {name}"] = found[~is_there].float().mean().item()
    return (weights * of_cells).sum() / weights.sum()


def _place_losses(
    cells: Tensor, labels: dict[str, Tensor], of_word: dict[str, Tensor], heads: TowerHeads, right: dict[str, float]
) -> list[Tensor]:
    """In the base tile a place is one in the whole image, told as words tell it; a crop does not know where it lies."""
    is_shown = labels["is_shown"]
    is_base = (labels["tile"] == 0).float()
    last = max(int(labels[name].max()) for name in ("row", "column"))
    place = torch.stack((labels["row"], labels["column"]), dim=1) / last * 2 - 1
    axes = torch.stack([of_word[more] - of_word[less] for less, more in (("above", "below"), ("left", "right"))])
    told = (cells @ axes.T)[is_shown]
    of_base = heads.is_base(cells[is_shown])[:, 0]
    right["base"] = ((of_base > 0) == (is_base[is_shown] > 0)).float().mean().item()
    right["place"] = (told - place[is_shown])[is_base[is_shown] > 0].abs().mean().item()
    return [
        _PLACE_WEIGHT * nn.functional.mse_loss(told, (place * is_base[:, None])[is_shown]),
        _BASE_WEIGHT * nn.functional.binary_cross_entropy_with_logits(of_base, is_base[is_shown]),
    ]


def _tile_loss(
    reference: ReferenceModel, encoded: Encoded, heads: TowerHeads, batch: TowerBatch, right: dict[str, float]
) -> Tensor:
    """What every token of a middle layer, and a class token at the end, tell of their whole tile, or of the whole image."""
    parts, pairs = [], []
    for scene, targets in zip(batch.scenes, batch.targets, strict=True):
        tiles = int(targets.tile.max()) + 1
        in_tile = torch.zeros(tiles, _IN_TILE)
        pair = torch.zeros(tiles, len(KINDS) * len(COLOURS))
        covers = torch.zeros(tiles, len(scene.shapes) + 1)
        covers.index_put_((targets.tile, targets.shape), torch.ones(len(targets.tile)), accumulate=True)
        # Of a shape that a tile shows a corner of, nobody can tell the kind.
        least = 0.4 * covers[:, :-1].amax(0).clamp(min=1)
        for index, shape in enumerate(scene.shapes):
            seen = covers[:, index] >= least[index]
            kind, colour = KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
            in_tile[seen, kind] = 1
            in_tile[seen, len(SHOWN_KINDS) + colour] = 1
            pair[seen, kind * len(COLOURS) + colour] = 1
            if shape.digit is not None:
                in_tile[seen, len(SHOWN_KINDS) + len(COLOURS) + DIGITS.index(shape.digit)] = 1
        for tile, colour in set(
            zip(targets.tile[targets.sign >= 0].tolist(), targets.colour[targets.sign >= 0].tolist(), strict=True)
        ):
            in_tile[tile, [SHOWN_KINDS.index(SIGN), len(SHOWN_KINDS) + colour]] = 1
        parts.append(in_tile)
        pairs.append(pair)
    state = encoded.hidden_states[reference.middle_state].float()
    in_tile, pair = torch.cat(parts).to(state.device), torch.cat(pairs).to(state.device)
    told = heads.middle(state)
    if reference.has_base_tile:
        expected = in_tile[:, None].expand_as(told)
    else:
        # Patches of all images are one sequence, image after image.
        patches = torch.tensor([layout.num_cells for layout in batch.layouts], device=state.device)
        expected = in_tile.repeat_interleave(patches * len(told) // int(patches.sum()), dim=0)
    middle = nn.functional.binary_cross_entropy_with_logits(told, expected)
    if not reference.has_base_tile:
        return middle
    class_token = heads.tile(encoded.hidden_states[-1][:, 0].float())
    right["tile"] = ((class_token > 0) == (pair > 0))[pair > 0].float().mean().item()
    return middle + _weighted(class_token, pair)


def _weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy where what is there is rare and counts four times."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(4.0, device=logits.device))
