"""What is served side by side: the stock checkpoint in both of vLLM's ways, and pruned ones."""

from pathlib import Path
from typing import NamedTuple

from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf.conversion import convert_checkpoint

from .server import PRUNED


class Variant(NamedTuple):
    """A checkpoint and how it is served.

    Attributes:
        name: of the variant.
        ratio: of the patch tokens that it keeps.
        checkpoint: a folder.
        arguments: of `vllm serve`.
    """

    name: str
    ratio: float
    checkpoint: Path
    arguments: tuple[str, ...]


def variants(folder: Path, method: str, ratios: list[float]) -> list[Variant]:
    """The stock model by vLLM's own LLaVA-NeXT and by its transformers back end, and the method at every ratio.

    Args:
        folder: an existing one, for the pruned checkpoints.
        method: of hivtp_hf.
        ratios: of the pruned checkpoints.
    """
    found = [
        Variant("stock, vLLM's own model", 1.0, CHECKPOINT, ("--model-impl", "vllm")),
        Variant("stock, transformers back end", 1.0, CHECKPOINT, ("--model-impl", "transformers")),
    ]
    for number, ratio in enumerate(ratios):
        settings = {"method": method, "retention_ratio": ratio}
        checkpoint = convert_checkpoint(str(CHECKPOINT), folder / f"pruned-{number}", settings, show_progress=False)
        found.append(Variant(method, ratio, checkpoint, PRUNED))
    return found
