"""What shapes lie on: textures, and muted parts of photographs that scikit-image ships (public domain or CC0)."""

import functools

import numpy as np
import skimage.data
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")


def background(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A picture without shapes, uint8 (height, width, 3). Colours are muted, so that no patch of it passes for a shape."""
    make = (_photograph, _noise, _stripes)[random.choice(3, p=(0.5, 0.3, 0.2))]
    pixels = make(height, width, random)
    grey = pixels.mean(axis=2, keepdims=True)
    level = random.uniform(70, 180)
    muted = level + 0.55 * (0.5 * grey + 0.5 * pixels - grey.mean())
    return np.clip(muted, 0, 255).astype(np.uint8)


@functools.cache
def _photograph_of(name: str) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    image.thumbnail((512, 512))
    return image


def _photograph(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    image = _photograph_of(PHOTOGRAPHS[random.integers(len(PHOTOGRAPHS))])
    scale = random.uniform(0.4, 1.0) * min(image.width / width, image.height / height)
    box_width, box_height = scale * width, scale * height
    left, top = random.uniform(0, image.width - box_width), random.uniform(0, image.height - box_height)
    part = image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + box_width, top + box_height))
    pixels = np.asarray(part, dtype=np.float32)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def _noise(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Random colours on a coarse grid, and finer ones on top."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((3, 90), (9, 50), (40, 25)):
        grid = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += strength / 128 * (np.asarray(smooth, dtype=np.float32) - 128)
    return total


def _stripes(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Waves in one direction, between two colours."""
    angle, length = random.uniform(0, np.pi), random.uniform(6, 40)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    wave = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / length + random.uniform(0, 6))
    first, second = random.uniform(0, 255, (2, 3))
    return (first + second) / 2 + wave[..., None] * (first - second) / 2 + random.normal(0, 6, (height, width, 3))
