"""Models of real shapes, from configuration alone, and how much of them a kind of machine can measure in a coffee break."""

from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, MistralConfig

# LLaVA-NeXT's five shapes of crops, in tiles.
_CROPS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
_VICUNA_13B = {
    **_VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_MISTRAL_7B = {
    **_VICUNA_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_TINY_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 7,
}
_TINY_TEXT = {
    **_VICUNA_7B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
_SCORING_METHODS = ("hivtp", "hiprune", "gprune", "cls_attention")
_ALL_METHODS = (*_SCORING_METHODS, "random", "uniform")


@dataclass(frozen=True)
class Preset:
    """A model's shapes and how it is measured by default.

    Attributes:
        name: on the command line.
        description: for people, in a line.
        device: the kind of device that it is for.
        vision, text: settings of the CLIP tower and of the language model.
        methods: the first one leads: it stands for all where the method makes no difference.
        batches: of the throughput, in images.
        memory_batches: of the peak memory of the vision pass, in images.
        repeats: timed rounds of each part.
        threads: of torch on the CPU, its own choice unless given.
        thorough: whether a pass takes milliseconds. Else, so that a run ends within an hour, only the first pass of a
            part is a warm-up, and the images after the first, the published way, FLOPs and large batches are measured for
            the leading method alone, images after the first at the middle ratio only.
        real_shapes: whether targets of time mean anything.
    """

    name: str
    description: str
    device: str
    vision: dict[str, Any]
    text: dict[str, Any]
    methods: tuple[str, ...]
    batches: tuple[int, ...]
    memory_batches: tuple[int, ...]
    repeats: dict[str, int]
    text_type: str = "llama"
    threads: int | None = None
    thorough: bool = True
    real_shapes: bool = True
    images: tuple[tuple[int, int], ...] = ((672, 672), (480, 640))
    ratios: tuple[float, ...] = (1 / 2, 2 / 9, 1 / 9)
    new_tokens: tuple[int, ...] = (64, 256)

    def config(self) -> LlavaNextConfig:
        """The stock configuration."""
        text = (MistralConfig if self.text_type == "mistral" else LlamaConfig)(**self.text)
        side = self.vision["image_size"]
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**self.vision).to_dict(),
            text_config=text.to_dict(),
            # Any id does; LLaVA's own where the vocabulary reaches it.
            image_token_index=min(32000, self.text["vocab_size"] - 1),
            image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in _CROPS],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=(side // self.vision["patch_size"]) ** 2,
        )


_ACCELERATOR: dict[str, Any] = {
    "device": "cuda",
    "vision": _CLIP_L,
    "methods": _ALL_METHODS,
    "batches": (1, 4, 16),
    "memory_batches": (1, 16),
    "repeats": {"vision": 20, "prefill": 10, "weights": 10, "throughput": 2, "processor": 100, "import": 5},
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("7b", "LLaVA-NeXT-Vicuna-7B, for an accelerator", text=_VICUNA_7B, **_ACCELERATOR),
        Preset(
            "7b-mistral", "LLaVA-NeXT-Mistral-7B, for an accelerator", text=_MISTRAL_7B, text_type="mistral", **_ACCELERATOR
        ),
        Preset("13b", "LLaVA-NeXT-Vicuna-13B, for an accelerator", text=_VICUNA_13B, **_ACCELERATOR),
        Preset(
            "cpu",
            "the full CLIP-L/336 tower, and two layers of Vicuna-7B, for two cores",
            device="cpu",
            vision=_CLIP_L,
            text={**_VICUNA_7B, "num_hidden_layers": 2},
            methods=_SCORING_METHODS,
            batches=(1,),
            memory_batches=(1, 16),
            repeats={"vision": 6, "prefill": 6, "weights": 6, "throughput": 2, "processor": 100, "import": 5},
            thorough=False,
        ),
        Preset(
            "tiny",
            "a smoke test: LLaVA-NeXT's layout at 8 x 8 cells a tile, and no time that means anything",
            device="cpu",
            vision=_TINY_VISION,
            text=_TINY_TEXT,
            methods=_ALL_METHODS,
            batches=(1, 4),
            memory_batches=(1, 16),
            repeats={"vision": 3, "prefill": 3, "weights": 3, "throughput": 2, "processor": 5, "import": 1},
            # More gain nothing at such widths, and lose much where something else wants the cores.
            threads=1,
            real_shapes=False,
            new_tokens=(4, 8),
        ),
    )
}
