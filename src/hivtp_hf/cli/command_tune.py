"""`hivtp tune`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .printing import say

if TYPE_CHECKING:
    from ..tuning import Tuning

# So many of the best trials are printed.
_SHOWN = 5


def tune(
    checkpoint: Annotated[str, typer.Option(help="A stock or pruned checkpoint: a folder, or owner/name on the Hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="Images and questions as for `evaluate`; answers are not needed. They should not be those by which you judge "
            "the result."
        ),
    ],
    ratio: Annotated[str, typer.Option(help="The retention ratio of every trial, such as 1/9.")],
    method: Annotated[str | None, typer.Option(help="Whose settings are searched; the checkpoint's own by default.")] = None,
    split: Annotated[str | None, typer.Option(help="The split of data that has several.")] = None,
    questions: Annotated[int | None, typer.Option(help="Take so many of the first questions; 30 by default.")] = None,
    search: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="The settings to search; all of the method's by default.")
    ] = None,
    stages: Annotated[
        int, typer.Option(help="Search so many stages inside the language model besides, at the same average retention.")
    ] = 0,
    trials: Annotated[int, typer.Option(help="So many settings are measured.")] = 50,
    seed: Annotated[int, typer.Option(help="Of all draws: the same seed gives the same trials.")] = 0,
    objective: Annotated[
        str, typer.Option(help="state, answer or next-token: what of the unpruned model's pass is to stay.")
    ] = "state",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A setting that stays as it is; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Make a checkpoint here with the settings that were found.")
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Write no weights into that checkpoint, but where they are.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace that checkpoint if it exists.")] = False,
    runs: Annotated[Path, typer.Option(help="Where the run gets a folder of its own.")] = Path("tuning_output"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:1 and so on.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at once in the tower, questions at once in the language model.")] = 8,
    memory: Annotated[
        float, typer.Option(help="GiB for passes of the tower that are kept; what goes beyond runs in every trial.")
    ] = 4.0,
    answer_tokens: Annotated[int, typer.Option(help="The length of the model's own answer at most, for `answer`.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
) -> None:
    """Search the settings of a pruning method that change least of what CHECKPOINT makes of images, without right answers.

    Each run makes a folder with tuning.csv, tuning.png, study.log, config.json and environment.json. Interrupted, the same
    command goes on where it was.
    """
    # Imported here, as Pillow and Optuna are needed for nothing else.
    from ..tuning import tune_checkpoint

    done = tune_checkpoint(
        checkpoint,
        data,
        ratio,
        method=method,
        split=split,
        questions=questions,
        search=search,
        stages=stages,
        trials=trials,
        seed=seed,
        objective=objective,
        changes=changes or (),
        output=output,
        config_only=config_only,
        force=force,
        runs=runs,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        memory=memory,
        answer_tokens=answer_tokens,
        revision=revision,
        cache_dir=cache_dir,
        say=say,
    )
    _print_table(done.tuning)
    for path in (done.folder, done.checkpoint):
        if path is not None:
            say(str(path), "green")


def _print_table(tuning: "Tuning") -> None:
    from ..tuning.results import shown_setting

    start, *others = tuning.trials
    names = list(start.settings)
    best = sorted((trial for trial in others if trial.value is not None), key=lambda trial: -(trial.value or 0))
    measured = 1 + len(best)
    table = Table(
        box=box.SIMPLE,
        caption=f"{measured} trials, {len(tuning.trials) - measured} points rejected. Tokens of an image, a layer.",
    )
    for heading in ("", "objective", "tokens", *names):
        table.add_column(heading, justify="right")
    for title, trial in (("start", start), *((f"{place}.", trial) for place, trial in enumerate(best[:_SHOWN], 1))):
        values = [_rounded(shown_setting(trial.settings[name])) for name in names]
        table.add_row(title, f"{trial.value:.5f}", f"{trial.tokens_per_layer:.1f}", *values)
    Console().print(table)
    if tuning.images_kept is not None and tuning.images_kept < tuning.images:
        say(
            f"The vision tower ran once for all trials over {tuning.images_kept} of {tuning.images} images, and in every trial "
            "over the others: there was no room for more (`--memory`), or the method says during the pass what it reads."
        )
    if tuning.importance:
        say("Importance: " + ", ".join(f"{name} {share:.2f}" for name, share in tuning.importance.items()))


def _rounded(text: str) -> str:
    """Numbers with four digits, which tuning.csv has in full."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number.group()):.4g}", text)
