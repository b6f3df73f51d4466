"""`hivtp analyze`."""

import csv
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..analysis import DispersionReport, LayerRow, analyze_layers
from ..analysis.dispersion import checked_share
from ..checkpoints import open_source
from ..checkpoints.placing import placing
from .image_files import check_targets, read_image
from .printing import say

_UNDONE = "analysed"
_FILES = ("dispersion.png", "dispersion.csv")


def analyze(
    checkpoint: Annotated[str, typer.Argument(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    images: Annotated[list[Path], typer.Argument(help="Images to look at: some dozens, of the kind that you will ask about.")],
    top_share: Annotated[
        float, typer.Option(help="The share of a tile's cells that count as most attended, above 0 and below 1.")
    ] = 0.2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"A folder for {' and '.join(_FILES)}. The first needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    device: Annotated[
        str, typer.Option(help="Where the model runs: auto, or a device of torch such as cpu or cuda:1.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Show how far apart the most attended cells lie in each encoder layer of CHECKPOINT, and suggest which layers to score.

    Middle layers attend to objects, whose cells lie together; in deep layers attention is scattered. The suggestion is the
    window of layers in which they lie closest together: a heuristic, which looks at no question and no answer.
    """
    # Whatever can be wrong before a checkpoint is downloaded and loaded is found before.
    top_share = checked_share(top_share)
    placed = placing(device)
    for path in images:
        read_image(path, _UNDONE)
    targets = [] if output is None else _targets(output, images, force)
    source = open_source(checkpoint, revision=revision, cache_dir=cache_dir)
    settings = source.settings()
    source.weight_files()  # downloads them, its base's if it has none
    # Nothing is pruned here. So settings that do not fit the tower, which this is there to mend, do no harm.
    keep_all = {"method": "none"}
    processor = source.family.classes.processor.from_pretrained(
        source.folder, pruning_config=keep_all, trust_remote_code=False, local_files_only=True
    )
    model = source.family.classes.model.from_pretrained(
        source.folder, pruning_config=keep_all, dtype="auto", cache_dir=cache_dir, local_files_only=True, **placed
    )
    analysis = analyze_layers(model, processor, (read_image(path, _UNDONE) for path in images), top_share)
    report = DispersionReport(source.name, source.config["model_type"], settings, analysis)

    if targets:
        _save(report, targets)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    _print_table(report)
    _print_suggestion(report, revision)
    for target in targets:
        say(str(target), "green")


def _targets(folder: Path, images: Sequence[Path], force: bool) -> list[Path]:
    """The files to write; a ValueError where one would take another's place, and where matplotlib is missing."""
    from ..visualization.plotting import check_matplotlib

    check_matplotlib()
    targets = [folder / name for name in _FILES]
    check_targets(folder, {target: target.name for target in targets}, images, force)
    return targets


def _save(report: DispersionReport, targets: Sequence[Path]) -> None:
    """Writes figure and table; each appears whole or not at all, and neither before both are finished."""
    from ..analysis.dispersion_figure import plot_dispersion

    figure_file, table_file = targets
    figure_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dispersion.unfinished-", dir=figure_file.parent) as stage:
        unfinished = [Path(stage, target.name) for target in targets]
        plot_dispersion(report).savefig(unfinished[0])
        with unfinished[1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(LayerRow._fields)
            writer.writerows(report.rows())
        for finished, target in zip(unfinished, (figure_file, table_file), strict=True):
            os.replace(finished, target)


def _print_table(report: DispersionReport) -> None:
    analysis = report.analysis
    say(f"{report.checkpoint} ({report.model_type})")
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),  # so that all marks fit into the 80 columns of a pipe
        caption=(
            f"Mean distance in cells between the {analysis.top_share:.3g} of a tile's cells with most attention; share: what "
            f"they have of all cells' attention. Cells at random: {analysis.random_dispersion:.2f}. "
            f"Images: {analysis.num_images}; tiles: {analysis.num_tiles}."
        ),
    )
    headings = ["layer", "attention\nreceived", "of\nrandom", "share"]
    headings += ["class\ntoken", "of\nrandom"] * (analysis.class_token is not None)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.rows():
        cells = [*_distance(row.received_dispersion, row), f"{row.received_share:.0%}"]
        if row.class_token_dispersion is not None:
            cells += _distance(row.class_token_dispersion, row)
        marks = {"scored": row.scored, "suggested": row.suggested, "feature": row.is_feature}
        applying = " ".join(mark for mark, applies in marks.items() if applies)
        table.add_row(str(row.layer), *cells, applying, style="bold" if row.suggested else None)
    Console().print(table)


def _distance(distance: float, row: LayerRow) -> list[str]:
    return [f"{distance:.2f}", f"{distance / row.random_dispersion:.0%}"]


def _print_suggestion(report: DispersionReport, revision: str | None) -> None:
    """What is suggested, how to write it, and what it is worth."""
    number, feature_layer, start = report.importance_num_layers, report.analysis.feature_layer, report.suggested_start_layer
    if start is None:
        if feature_layer < 1:
            say("Nothing is suggested: no layer lies between layer 0 and the visual feature.")
        else:
            say(
                f"Nothing is suggested: no {number} successive layers lie behind layer 0 and not behind layer {feature_layer}, "
                f"whose output is the visual feature. Set `importance_num_layers` to {feature_layer} or less."
            )
        return
    ratio = report.relative_dispersion(report.suggested_layers)
    say(f"Suggested importance_start_layer: {start}", "green")
    say(f"In {_named(report.suggested_layers)} the most attended cells lie closest together: {ratio:.0%} of random.")
    if ratio >= 1:
        say("That is no closer than at random, so this curve is no reason to leave the published layers.")
    is_hivtp = report.settings.method == "hivtp"
    if is_hivtp and report.scored_layers == report.suggested_layers:
        say("Its settings read these layers already.")
    else:
        if is_hivtp and len(report.scored_layers) == number:
            present = report.relative_dispersion(report.scored_layers)
            say(f"Its settings read {_named(report.scored_layers)}: {present:.0%} of random.")
        command = ["hivtp", "convert", report.checkpoint, "TARGET"]
        command += [] if revision is None else ["--revision", revision]
        command += [] if is_hivtp else ["--method", "hivtp"]
        say(shlex.join([*command, "--importance-start-layer", str(start)]))
    say("A heuristic: it sees where attention lies, not whether answers are right. Evaluate both before you choose.")


def _named(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
