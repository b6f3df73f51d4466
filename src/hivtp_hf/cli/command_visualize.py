"""`hivtp visualize`."""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints import open_source
from ..checkpoints.placing import placing
from ..files import atomic_write
from .image_files import check_targets, read_image
from .printing import say
from .pruning_options import with_pruning_options


class Format(enum.StrEnum):
    """File formats of figures."""

    png = "png"
    pdf = "pdf"
    svg = "svg"


# Without the day they were made, files of equal figures are equal.
_METADATA: dict[Format, dict[str, Any]] = {Format.png: {}, Format.pdf: {"CreationDate": None}, Format.svg: {"Date": None}}
# Fonts that publishers accept: TrueType, not Type 3; and names in an SVG that do not change from run to run.
_SAVING: Any = {"pdf.fonttype": 42, "svg.hashsalt": "hivtp"}


@with_pruning_options
def visualize(
    checkpoint: Annotated[str, typer.Argument(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    images: Annotated[list[Path], typer.Argument(help="Images, one figure each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for figures, IMAGE_METHOD.FORMAT each.")],
    file_format: Annotated[Format, typer.Option("--format", help="PNG with 300 dots per inch, or PDF or SVG.")] = Format.png,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace figures that exist.")] = False,
    *,
    pruning: dict[str, Any],
) -> None:
    """Draw what CHECKPOINT keeps of images, and the scores that chose it, as figures for a paper.

    Settings that are given are tried in place of the checkpoint's own.
    """
    # Imported here, as Pillow is needed for nothing else.
    from ..figures.image_choice import choice_of_image
    from ..figures.plotting import check_matplotlib
    from ..figures.score_maps import plot_kept_cells

    check_matplotlib()
    # Whatever can be wrong before a checkpoint is downloaded and loaded is found before.
    for path in images:
        read_image(path, "drawn")
    source = open_source(checkpoint, revision=revision, cache_dir=cache_dir)
    settings = source.settings().replace(**pruning)
    targets = _targets(images, output, f"_{settings.method}.{file_format.value}", force)
    processor, model = source.load_processor(settings), source.load_model(settings, **placing("auto"))

    for path, target in zip(images, targets, strict=True):
        image = read_image(path, "drawn")
        layout = processor.token_layout(image.height, image.width)
        inputs = processor(images=image, text=processor.image_token, return_tensors="pt").to(model.device)
        figure = plot_kept_cells(image, layout, *choice_of_image(model, inputs, layout))
        _save(figure, target, file_format)
        say(str(target), "green")


def _targets(images: Sequence[Path], folder: Path, ending: str, force: bool) -> list[Path]:
    """The file of every figure; a ValueError where one would take another's place."""
    targets = [folder / f"{path.stem}{ending}" for path in images]
    owners: dict[Path, Path] = {}
    for path, target in zip(images, targets, strict=True):
        if target in owners:
            raise ValueError(f"the figures of {owners[target]} and {path} would both be {target}; draw them in two calls.")
        owners[target] = path
    check_targets(folder, {target: f"the figure of {path}" for target, path in owners.items()}, images, force)
    return targets


def _save(figure: Any, target: Path, file_format: Format) -> None:
    """Writes a file that appears whole or not at all."""
    import matplotlib

    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_SAVING):
        atomic_write(target, lambda path: figure.savefig(path, format=file_format.value, metadata=_METADATA[file_format]))
