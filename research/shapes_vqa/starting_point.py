"""What the model starts from instead of plain random numbers: values in stock modules, which training changes like any others.

From default initialisation a small tower spends most of a short training on finding out that cells have neighbours, and a small
language model on finding out that equal words can find each other. So

* the tower's positions are a table of waves (sines and cosines of row and column), kept apart from what patches show;
* patches enter through the filters that whiten photographs and shapes (principal components);
* the heads of the tower's first layers look at one neighbouring cell each: queries are keys of a shifted position;
* in a tower with rotary positions and no table, these heads' biases make a query a key that is turned to another cell;
* the language model's words are orthonormal, and the heads of its first layers look for their own content and hand it on.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

# The last channels of the tower hold the position; as many as a head has, so that one head reads all of them.
_POSITION_CHANNELS = 32
_NEIGHBOURS = (
    *((0, 1), (0, -1), (1, 0), (-1, 0)),
    *((1, 1), (1, -1), (-1, 1), (-1, -1)),
    *((0, 2), (0, -2), (2, 0), (-2, 0)),
    *((0, 1), (0, -1), (1, 0), (-1, 0)),
)
# How much more a head attends to its neighbour than to the next cell: the largest logit.
_SHARPNESS = 8.0
# The same along an axis with rotary positions, and how it is shared among the highest frequencies, of 1, 0.3 and 0.1.
_ROTARY_SHARPNESS, _ROTARY_SHARES = 12.0, (0.5, 0.35, 0.15)


@torch.no_grad()
def set_starting_point(model: LlavaNextForConditionalGeneration, patches: Tensor) -> None:
    """Sets the values described above.

    Args:
        model: with random weights.
        patches: float (patches, channels * side * side), of normalised pixels, from which the filters are made.
    """
    _set_patch_filters(model.model.vision_tower, patches)
    _set_positions(model.model.vision_tower)
    _set_neighbour_heads(model.model.vision_tower)
    _set_words(model)
    _set_matching_heads(model.model.language_model)


@torch.no_grad()
def set_qwen_starting_point(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor) -> None:
    """The same for a Qwen2.5-VL; patches as its image processor makes them."""
    weight = _named(model.model.visual, "patch_embed.proj.weight")
    _set_filters(weight, patches, len(weight))
    _set_rotary_neighbour_heads(model.model.visual)
    _set_words(model)
    _set_matching_heads(model.model.language_model)


def _set_patch_filters(tower: torch.nn.Module, patches: Tensor) -> None:
    weight = _named(tower, "patch_embedding.weight")
    _set_filters(weight, patches, len(weight) - _POSITION_CHANNELS)


def _set_filters(weight: Tensor, patches: Tensor, number: int) -> None:
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    strongest = values.argsort(descending=True)[:number]
    # Fine detail would be amplified to noise by full whitening.
    scale = (values[strongest] + 0.02 * values.max()).rsqrt()
    weight.zero_()
    weight.view(len(weight), -1)[:number] = 0.7 * (vectors[:, strongest] * scale).T


def _frequencies() -> Tensor:
    """Of the waves along each axis, in radians a cell: from half a turn over three cells to one over the whole tile."""
    return torch.logspace(math.log10(1.4), math.log10(0.26), _POSITION_CHANNELS // 4)


def _waves(place: Tensor) -> Tensor:
    """Sines and cosines of places along an axis, (places, 2 * frequencies)."""
    angle = place[:, None].float() * _frequencies()
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def _set_positions(tower: torch.nn.Module) -> None:
    table = _named(tower, "position_embedding.weight")
    table.zero_()
    cells = len(table) - 1
    side = math.isqrt(cells)
    cell = torch.arange(cells)
    table[1:, -_POSITION_CHANNELS:] = torch.cat((_waves(cell // side), _waves(cell % side)), dim=1)


def _set_neighbour_heads(tower: torch.nn.Module) -> None:
    config = tower.config
    head_dim = config.hidden_size // config.num_attention_heads
    waves = _POSITION_CHANNELS // 2  # pairs of sine and cosine
    strength = math.sqrt(_SHARPNESS * math.sqrt(head_dim) / waves)
    for layer in range(math.ceil(len(_NEIGHBOURS) / config.num_attention_heads)):
        query = _named(tower, f"layers.{layer}.self_attn.q_proj.weight")
        key = _named(tower, f"layers.{layer}.self_attn.k_proj.weight")
        for head in range(config.num_attention_heads):
            index = layer * config.num_attention_heads + head
            if index == len(_NEIGHBOURS):
                break
            rows = slice(head * head_dim, head * head_dim + _POSITION_CHANNELS)
            for weight, matrix in ((key, torch.eye(_POSITION_CHANNELS)), (query, _shift(*_NEIGHBOURS[index]))):
                weight[rows].mul_(0.1)
                weight[rows, -_POSITION_CHANNELS:] = strength * matrix


def _set_rotary_neighbour_heads(tower: torch.nn.Module) -> None:
    config = tower.config
    heads, width = config.num_heads, config.hidden_size
    head_dim = width // heads
    waves = head_dim // 4  # along an axis; a wave is a pair of channels that are half a head apart
    frequencies = 10000 ** (-torch.arange(len(_ROTARY_SHARES)) / waves)
    strength = torch.tensor(_ROTARY_SHARES).mul(_ROTARY_SHARPNESS * math.sqrt(head_dim)).sqrt()
    for index, shift in enumerate(_NEIGHBOURS):
        attention = tower.blocks[index // heads].attn.qkv
        first = index % heads * head_dim
        attention.weight[first : first + head_dim].mul_(0.1)
        attention.weight[width + first : width + first + head_dim].mul_(0.1)
        for axis, step in enumerate(shift):
            sines = torch.arange(len(strength)) + axis * waves
            attention.bias[width + first + sines] = strength
            attention.bias[first + sines] = strength * (frequencies * step).cos()
            attention.bias[first + head_dim // 2 + sines] = strength * (frequencies * step).sin()


def _shift(down: int, right: int) -> Tensor:
    """The matrix that moves waves of a place to those of another so many cells away."""
    matrix = torch.zeros(_POSITION_CHANNELS, _POSITION_CHANNELS)
    frequencies = _frequencies().tolist()
    for axis, step in enumerate((down, right)):
        for index, frequency in enumerate(frequencies):
            at = 2 * (axis * len(frequencies) + index)
            sine, cosine = math.sin(frequency * step), math.cos(frequency * step)
            matrix[at : at + 2, at : at + 2] = torch.tensor([[cosine, sine], [-sine, cosine]])
    return matrix


def _set_words(model: LlavaNextForConditionalGeneration | Qwen2_5_VLForConditionalGeneration) -> None:
    words = model.get_input_embeddings().weight
    words.copy_(torch.linalg.qr(torch.randn(words.shape[1], words.shape[0]))[0].T)


def _set_matching_heads(language_model: torch.nn.Module) -> None:
    config = language_model.config
    # Rotary positions turn the first channels of each half of a head fast, and the last ones hardly at all.
    head_dim = language_model.layers[0].self_attn.head_dim
    half = head_dim // 2
    slow = [*range(half // 2, half), *range(half + half // 2, 2 * half)]
    for layer in range(2):
        attention = language_model.layers[layer].self_attn
        # Parts of one basis: all heads together copy what they attend to as it is.
        basis = torch.linalg.qr(torch.randn(config.hidden_size, config.num_attention_heads * head_dim))[0].T
        for head in range(config.num_attention_heads):
            start = head * head_dim
            directions = torch.linalg.qr(torch.randn(config.hidden_size, len(slow)))[0].T
            rows = [start + channel for channel in slow]
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[start : start + head_dim].mul_(0.1)
                projection.weight[rows] = 1.5 * directions
            rows = slice(start, start + head_dim)
            attention.v_proj.weight[rows] = 0.5 * basis[rows]
            attention.o_proj.weight[:, rows] = 0.5 * basis[rows].T


def _named(module: torch.nn.Module, ending: str) -> Tensor:
    """A parameter by the end of its name, as the way to it differs between releases."""
    return next(parameter for name, parameter in module.named_parameters() if name.endswith(ending))


def patches_of(pixel_values: Iterable[Tensor], side: int, number: int, random: np.random.Generator) -> Tensor:
    """Random patches of tiles (tiles, channels, height, width): float (number, channels * side * side)."""
    tiles = torch.cat(list(pixel_values))
    rows = torch.from_numpy(random.integers(0, tiles.shape[2] - side + 1, number))
    columns = torch.from_numpy(random.integers(0, tiles.shape[3] - side + 1, number))
    which = torch.from_numpy(random.integers(0, len(tiles), number))
    return torch.stack(
        [
            tiles[tile, :, row : row + side, column : column + side].flatten()
            for tile, row, column in zip(which.tolist(), rows.tolist(), columns.tolist(), strict=True)
        ]
    )
