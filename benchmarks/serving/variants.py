"""What is served side by side: the stock checkpoint and pruned ones, all in the back end that runs transformers' classes."""

from pathlib import Path
from typing import NamedTuple

from hivtp_hf.checkpoints import convert_checkpoint

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


def variants(stock: Path, folder: Path, method: str, ratios: list[float]) -> list[Variant]:
    """The stock checkpoint, and the method at every ratio.

    vLLM's own LLaVA-NeXT is not among them: it needs torchvision, which has no build for a torch without CUDA.

    Args:
        stock: the checkpoint.
        folder: an existing one, for the pruned checkpoints.
        method: of hivtp_hf.
        ratios: of the pruned checkpoints.
    """
    found = [Variant("stock", 1.0, stock, ("--model-impl", "transformers"))]
    for number, ratio in enumerate(ratios):
        settings = {"method": method, "retention_ratio": ratio}
        checkpoint = convert_checkpoint(str(stock), folder / f"pruned-{number}", settings, show_progress=False)
        found.append(Variant(method, ratio, checkpoint, PRUNED))
    return found
