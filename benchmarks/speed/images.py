"""What the models are given: random pixels of real shapes, and prompts of any length."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaNextConfig

from hivtp_hf import TokenLayout, VisualTokenPruningConfig

# Positions of a prompt that are no image: its beginning, and a question.
TEXT_TOKENS = 32


@dataclass(frozen=True)
class Images:
    """A batch of images of one size.

    Attributes:
        height, width: in pixels, before any preprocessing.
        pixel_values: (batch, tiles, 3, tile side, tile side), as the processor returns them: one random image, repeated.
        image_sizes: int64 (batch, 2).
    """

    height: int
    width: int
    pixel_values: Tensor
    image_sizes: Tensor

    @property
    def batch(self) -> int:
        return len(self.pixel_values)

    @property
    def name(self) -> str:
        return size_name((self.height, self.width))


def size_name(size: tuple[int, int]) -> str:
    """How an image's height and width read in tables."""
    return "{} x {}".format(*size)


def token_layout(config: LlavaNextConfig, size: tuple[int, int], method: str = "none", ratio: float = 1.0) -> TokenLayout:
    """The layout of an image of (height, width) under a method and a ratio."""
    return TokenLayout.from_image_size(
        *size,
        VisualTokenPruningConfig(method=method, retention_ratio=ratio),
        tile_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        pinpoints=config.image_grid_pinpoints,
    )


def random_images(
    config: LlavaNextConfig, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
) -> Images:
    """Images of (height, width) in pixels, already on the device."""
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, token_layout(config, size).num_views, 3, side, side, generator=generator)
    return Images(*size, pixels.to(device, dtype).repeat(batch, 1, 1, 1, 1), torch.tensor([size] * batch, device=device))


def prompt_ids(config: LlavaNextConfig, image_tokens: int, batch: int, device: torch.device) -> Tensor:
    """A prompt's ids, int64 (batch, image_tokens + TEXT_TOKENS): its beginning, the image, a question."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, config.image_token_id, (TEXT_TOKENS,), generator=generator)
    image = torch.full((image_tokens,), config.image_token_id)
    return torch.cat((text[:1], image, text[1:])).repeat(batch, 1).to(device)
