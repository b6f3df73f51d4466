"""`hivtp evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .printing import say

if TYPE_CHECKING:
    from ..evaluation.metrics import MetricsRow


def evaluate(
    checkpoint: Annotated[str, typer.Option(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder with questions.csv or questions.jsonl beside images, or written by `datasets`, or a data set on the "
            "Hub (owner/name, owner/name@revision); columns image, question, answer, and if wanted question_type. In a clone "
            "of the project, its own questions by default."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of data that has several.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods of pruning, base-only and downsample, with commas between; all of these by default. Further "
            "downsample+METHOD, which prunes a smaller image."
        ),
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Shares of patch tokens to keep, with commas between; 1 is the unpruned model.")
    ] = "1,1/2,2/9,1/9,1/18",
    questions: Annotated[int | None, typer.Option(help="Ask so many of the first questions; all by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:1 and so on.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at once in the tower, questions at once in the language model.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="The length of an answer at most.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the run gets a folder of its own.")] = Path(
        "evaluation_output"
    ),
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A setting of a method, as in `inspect`; may be repeated."),
    ] = None,
    weights_and_positions: Annotated[
        str | None,
        typer.Option(
            help="Run every method with each of these, with commas between: published, weights, positions, both. By default "
            "with what its settings say."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
) -> None:
    """Ask CHECKPOINT questions about images, unpruned and under every method and ratio: accuracy, tokens, prefill time.

    Each run makes a folder with metrics.csv, predictions.csv, config.json, environment.json and accuracy.png. Interrupted, the
    same command goes on where it was. Finished, it makes another folder. `accelerate launch -m hivtp_hf.cli evaluate ...`
    shares the images among processes and devices.

    An error in a row stops the run and names the row.
    """
    # Imported here, as Pillow is needed for nothing else.
    from ..evaluation import evaluate_checkpoint
    from ..evaluation.processes import is_main_process

    done = evaluate_checkpoint(
        checkpoint,
        data,
        split=split,
        methods=methods,
        ratios=ratios,
        questions=questions,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
        changes=changes or (),
        weights_and_positions=weights_and_positions,
        revision=revision,
        cache_dir=cache_dir,
        say=say,
    )
    if is_main_process():
        _print_table(done.metrics)
        say(str(done.folder), "green")


def _print_table(metrics: Sequence["MetricsRow"]) -> None:
    rows = [row for row in metrics if row.question_type == "all"]
    # With stages in the language model, what a layer sees on average.
    in_layers = [row.tokens_per_layer < row.patch_tokens + row.newline_tokens - 0.5 for row in rows]
    # The first is the unpruned model, which no seed multiplies.
    table = Table(box=box.SIMPLE, caption=f"{rows[0].n} questions. Tokens of an image: patches and newlines.")
    # With line breaks, as it is to fit into 80 columns.
    for heading in ("method", "ratio", "tokens", "accuracy", "95 %\ninterval", "agree-\nment", "prefill\nms"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row, has_stages in zip(rows, in_layers, strict=True):
        table.add_row(
            "\n+ ".join((*row.method.split("+"), *[row.weights_and_positions] * (row.weights_and_positions != "published"))),
            f"{row.ratio:.3f}",
            f"{row.patch_tokens:.0f} + {row.newline_tokens:.0f}" + f"\n{row.tokens_per_layer:.0f} a layer" * has_stages,
            f"{row.accuracy:.3f}",
            f"{row.ci_low:.3f}-{row.ci_high:.3f}",
            f"{row.agreement:.3f}",
            f"{row.prefill_ms:.4g}",
        )
    Console().print(table)
