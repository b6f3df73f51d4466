"""`hivtp analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..checkpoints import open_source
from ..checkpoints.placing import placing
from ..files import atomic_write
from .image_files import check_targets, read_image
from .printing import say

_UNDONE = "analysed"


def analyze(
    checkpoint: Annotated[str, typer.Argument(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    images: Annotated[list[Path], typer.Argument(help="Images to look at: some dozens, of the kind that you will ask about.")],
    top_share: Annotated[
        float, typer.Option(help="The share of a tile's cells that count as most attended, above 0 and below 1.")
    ] = 0.2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for dispersion.png, which needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    device: Annotated[
        str, typer.Option(help="Where the model runs: auto, or a device of torch such as cpu or cuda:1.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a figure that exists.")] = False,
) -> None:
    """Show how far apart the most attended cells lie in each encoder layer of CHECKPOINT.

    Where attention gathers on objects, they lie closer together than cells at random. That says nothing of answers.
    """
    # Imported here, as Pillow is needed for nothing else.
    from ..figures.dispersion import checked_share, dispersion_by_layer, plot_dispersion
    from ..figures.plotting import check_matplotlib

    # Whatever can be wrong before a checkpoint is downloaded and loaded is found before.
    top_share = checked_share(top_share)
    placed = placing(device)
    for path in images:
        read_image(path, _UNDONE)
    if output is not None:
        check_matplotlib()
        figure_file = output / "dispersion.png"
        check_targets(output, {figure_file: figure_file.name}, images, force)
    source = open_source(checkpoint, revision=revision, cache_dir=cache_dir)
    settings = source.settings()
    # Nothing is pruned here, so settings that do not fit the tower do no harm.
    keep_all = {"method": "none"}
    processor, model = source.load_processor(keep_all), source.load_model(keep_all, **placed)
    found = dispersion_by_layer(model, processor, (read_image(path, _UNDONE) for path in images), top_share)
    scored = [layer for layer in found.layers if layer in settings.scored_layers(model.model.encoder_facts())]

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(figure_file, plot_dispersion(found, scored).savefig)
    if as_json:
        print(json.dumps({"checkpoint": checkpoint, "scored_layers": scored, **found._asdict()}, indent=2))
        return
    say(f"{checkpoint} ({source.config['model_type']})")
    table = Table(box=box.SIMPLE, caption=f"Mean distance in cells; of cells at random {found.at_random:.2f}.")
    for heading in ("layer", "attention received", *["of the class token"] * (found.class_token is not None), ""):
        table.add_column(heading, justify="right")
    for place, layer in enumerate(found.layers):
        distances = [curve[place] for curve in (found.received, found.class_token) if curve is not None]
        marks = ["scored"] * (layer in scored) + ["feature"] * (layer == found.feature_layer)
        table.add_row(str(layer), *(f"{distance:.2f}" for distance in distances), " ".join(marks))
    Console().print(table)
    if output is not None:
        say(str(figure_file), "green")
