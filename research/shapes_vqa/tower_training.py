"""First stage: the vision tower and the projector learn, cell by cell, what a visual token shows.

The classifiers are the language model's own word embeddings, seen through the projector: a cell of a red circle shall point
along "red" and "circle". So the language model's answers are aligned with what it sees before it is trained itself. Two heads
that are thrown away afterwards ask every token of a middle layer, and the class token at the end, what the whole tile holds:
that makes tokens look at shapes, and not at their neighbours alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from examples.shapes_vqa.scenes import Scene, draw, make_practice_scene, make_scene
from examples.shapes_vqa.splits import PRACTICE
from examples.shapes_vqa.vocabulary import COLOURS, DIGITS, KINDS

from .dense_targets import DenseTargets, dense_targets
from .model import words

# Per cell: how long a component has to be, of an embedding's length, to count as there, and how sharply.
_THERE, _SHARPNESS = 0.5, 10.0
# Cells without a shape are many and easy.
_BACKGROUND_WEIGHT = 0.25
_DIGIT_WEIGHT, _CENTRE_WEIGHT, _PLACE_WEIGHT, _BASE_WEIGHT, _TILE_WEIGHT = 2.0, 0.5, 1.0, 0.2, 0.5
# The hidden state at which every token is asked what its tile holds.
_MIDDLE_STATE = 7


@dataclass(frozen=True)
class TowerBatch:
    """Images and what their cells show."""

    pixel_values: Tensor
    image_sizes: Tensor
    targets: list[DenseTargets]
    scenes: list[Scene]


class TowerScenes(IterableDataset):
    """Batches of scenes from a range of seeds, made while the model trains."""

    def __init__(self, processor: LlavaNextProcessor, seeds: range, batch_size: int, split: int):
        self._processor = processor
        self._seeds, self._batch_size, self._split = seeds, batch_size, split

    def __iter__(self) -> Iterator[TowerBatch]:
        make = make_practice_scene if self._split == PRACTICE else make_scene
        for start in range(0, len(self._seeds), self._batch_size):
            scenes = [make((self._split, seed)) for seed in self._seeds[start : start + self._batch_size]]
            yield tower_batch(self._processor, scenes)


def tower_batch(processor: LlavaNextProcessor, scenes: list[Scene]) -> TowerBatch:
    """The images of some scenes as the model takes them, and their labels."""
    inputs = processor.image_processor([draw(scene) for scene in scenes], return_tensors="pt")
    targets = [dense_targets(scene) for scene in scenes]
    return TowerBatch(inputs["pixel_values"], inputs["image_sizes"], targets, scenes)


def loader(scenes: TowerScenes) -> DataLoader:
    """Makes batches in a process of its own, ahead of time."""
    return DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4)


class TowerHeads(nn.Module):
    """What asks for more than words: whether a cell is of the base tile, and what a tile holds. Thrown away after training."""

    def __init__(self, vision_width: int, text_width: int, grid: int):
        super().__init__()
        self.is_base = nn.Linear(text_width, 1)
        self.middle = nn.Linear(vision_width, len(KINDS) + len(COLOURS) + len(DIGITS))
        self.tile = nn.Linear(vision_width, len(KINDS) * len(COLOURS))
        self.grid = grid


def dense_loss(
    model: LlavaNextForConditionalGeneration, heads: TowerHeads, batch: TowerBatch
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and how many cells of each kind of label are right."""
    device = model.device
    output = model.model.get_image_features(
        batch.pixel_values.to(device, model.dtype), batch.image_sizes, output_hidden_states=True, return_dict=True
    )
    packed = zip(output.pooler_output, batch.targets, strict=True)
    cells = torch.cat([features[targets.positions.to(device)] for features, targets in packed]).float()
    labels = {
        name: torch.cat([getattr(targets, name) for targets in batch.targets]).to(device)
        for name in ("tile", "row", "column", "shape", "kind", "colour", "digit", "is_centre")
    }
    known = {word: index for index, word in enumerate(words())}
    embeddings = model.get_input_embeddings().weight.detach().float()
    losses, right = [], {}
    is_shape = labels["shape"] >= 0
    for name, choices, weight in (("kind", KINDS, 1.0), ("colour", COLOURS, 1.0), ("digit", DIGITS, _DIGIT_WEIGHT)):
        of_words = _SHARPNESS * cells @ embeddings[[known[choice] for choice in choices]].T
        logits = torch.nn.functional.pad(of_words, (0, 1), value=_SHARPNESS * _THERE)
        is_there = labels[name] < len(choices)
        of_cells = torch.nn.functional.cross_entropy(logits, labels[name], reduction="none")
        weights = torch.where(is_there, 1.0, _BACKGROUND_WEIGHT)
        losses.append(weight * (weights * of_cells).sum() / weights.sum())
        found = logits.argmax(1) == labels[name]
        right[name] = found[is_there].float().mean().item()
        right[f"no {name}"] = found[~is_there].float().mean().item()
    centre = _SHARPNESS * (cells @ embeddings[known["shapes"]] - _THERE)
    is_centre = labels["is_centre"].float()
    losses.append(_CENTRE_WEIGHT * _weighted(centre, is_centre))
    right["centre"] = ((centre > 0) == (is_centre > 0))[is_centre > 0].float().mean().item()
    # In the base tile a place is one in the whole image, told as words tell it; a crop does not know where it lies.
    is_base = (labels["tile"] == 0).float()
    place = torch.stack((labels["row"], labels["column"]), dim=1) / (heads.grid - 1) * 2 - 1
    axes = torch.stack(
        [embeddings[known[more]] - embeddings[known[less]] for less, more in (("above", "below"), ("left", "right"))]
    )
    told = (cells @ axes.T)[is_shape]
    losses.append(_PLACE_WEIGHT * nn.functional.mse_loss(told, (place * is_base[:, None])[is_shape]))
    of_base = heads.is_base(cells[is_shape])[:, 0]
    losses.append(_BASE_WEIGHT * nn.functional.binary_cross_entropy_with_logits(of_base, is_base[is_shape]))
    right["base"] = ((of_base > 0) == (is_base[is_shape] > 0)).float().mean().item()
    right["place"] = (told - place[is_shape])[is_base[is_shape] > 0].abs().mean().item()
    losses.append(_TILE_WEIGHT * _tile_loss(output.hidden_states, heads, batch, right))
    return sum(losses), right


def _tile_loss(hidden_states: tuple[Tensor, ...], heads: TowerHeads, batch: TowerBatch, right: dict[str, float]) -> Tensor:
    parts, pairs = [], []
    for scene, targets in zip(batch.scenes, batch.targets, strict=True):
        tiles = int(targets.tile.max()) + 1
        in_tile = torch.zeros(tiles, len(KINDS) + len(COLOURS) + len(DIGITS))
        pair = torch.zeros(tiles, len(KINDS) * len(COLOURS))
        covers = torch.zeros(tiles, len(scene.shapes) + 1)
        covers.index_put_((targets.tile, targets.shape), torch.ones(len(targets.tile)), accumulate=True)
        # Of a shape that a tile shows a corner of, nobody can tell the kind.
        least = 0.4 * covers[:, :-1].amax(0).clamp(min=1)
        for index, shape in enumerate(scene.shapes):
            seen = covers[:, index] >= least[index]
            kind, colour = KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
            in_tile[seen, kind] = 1
            in_tile[seen, len(KINDS) + colour] = 1
            pair[seen, kind * len(COLOURS) + colour] = 1
            if shape.digit is not None:
                in_tile[seen, len(KINDS) + len(COLOURS) + DIGITS.index(shape.digit)] = 1
        parts.append(in_tile)
        pairs.append(pair)
    device = hidden_states[-1].device
    in_tile, pair = torch.cat(parts).to(device), torch.cat(pairs).to(device)
    told = heads.middle(hidden_states[_MIDDLE_STATE].float())
    middle = nn.functional.binary_cross_entropy_with_logits(told, in_tile[:, None].expand_as(told))
    class_token = heads.tile(hidden_states[-1][:, 0].float())
    right["tile"] = ((class_token > 0) == (pair > 0))[pair > 0].float().mean().item()
    return middle + _weighted(class_token, pair)


def _weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy where what is there is rare and counts four times."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(4.0, device=logits.device))
