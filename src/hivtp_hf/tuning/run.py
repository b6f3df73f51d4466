"""`tune_checkpoint`: a search over a checkpoint's settings with a folder of its own, and the checkpoint that comes of it."""

import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from .._version import __version__
from ..checkpoints import CheckpointSource, convert_checkpoint, open_source
from ..checkpoints.convert import folders_of
from ..checkpoints.placing import checked_device, checked_dtype
from ..evaluation.data import EvaluationData, checked_data
from ..evaluation.environment import checkpoint_identity, code_sha256, slug, this_environment
from ..evaluation.question_tables import rows_of_source
from ..evaluation.run_folder import PARTS, FinishedParts, check_output, run_folder
from ..evaluation.variants import parsed_ratio, settings_of_methods
from ..figures.plotting import can_plot
from ..files import atomic_write, checked_target
from ..pruning.registry import pruning_method
from .calibration import UNPRUNED
from .objectives import STATE, objective_of
from .results import draw_tuning, write_trials
from .search import (
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_MEMORY,
    DEFAULT_QUESTIONS,
    DEFAULT_TRIALS,
    SearchPlan,
    Tuning,
    identity,
    search_settings,
)
from .study import check_optuna

TABLE, FIGURE, JOURNAL = "tuning.csv", "tuning.png", "study.log"


class TunedCheckpoint(NamedTuple):
    """A finished search of a checkpoint's settings.

    Attributes:
        tuning: what it found.
        folder: with its results.
        checkpoint: that has the settings; None where none was asked for.
    """

    tuning: Tuning
    folder: Path
    checkpoint: Path | None


def tune_checkpoint(
    checkpoint: str,
    data: str | Path,
    ratio: str,
    *,
    method: str | None = None,
    split: str | None = None,
    questions: int | None = None,
    search: str | None = None,
    stages: int = 0,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    objective: str = STATE,
    changes: Sequence[str] = (),
    output: Path | None = None,
    config_only: bool = False,
    force: bool = False,
    runs: Path = Path("tuning_output"),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    memory: float = DEFAULT_MEMORY,
    answer_tokens: int = DEFAULT_ANSWER_TOKENS,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    say: Callable[[str], object] = print,
) -> TunedCheckpoint:
    """Searches the settings of a checkpoint's pruning method that change least of what it makes of questions about images.

    A run has a folder of its own in `runs`, with config.json, environment.json, tuning.csv, study.log (a journal of Optuna's)
    and, where matplotlib is installed, tuning.png. Interrupted, it goes on when it is called again in the same way, and ends
    with the same trials, times apart. Called again after it has finished, it makes another folder.

    Args:
        checkpoint: a stock or pruned one of a supported family: a folder, or `owner/name` on the Hub.
        data: as for `evaluate_checkpoint`; a column of answers is not needed.
        ratio: the retention ratio of every trial, as a decimal or a fraction.
        method: whose settings are searched; the checkpoint's own by default.
        split: of data that has several.
        questions: so many of the first ones; None for 30, or all where there are fewer.
        search: names of settings, separated by commas; None for all of the method's own that tuning does not leave alone.
        changes: settings "METHOD.NAME=VALUE" that stay as they are, on top of the defaults, or of the checkpoint's own for its
            own method.
        output: the folder of a checkpoint to make with the settings that were found.
        config_only, force: as for `convert_checkpoint`, for `output`.
        runs: where folders of runs lie.
        device, dtype, revision, token, cache_dir: as for `evaluate_checkpoint`.
        stages, trials, seed, objective, batch_size, memory, answer_tokens: as for `tune`.
        say: told what a person should know.

    Raises:
        ValueError: for arguments, data, a checkpoint or settings that cannot be used; says what was given and what to do.
        RuntimeError: where a row goes wrong; names it.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the checkpoint cannot be downloaded.
    """
    check_optuna()
    share, wanted = _ratio(ratio), objective_of(objective)
    names = None if search is None else [name.strip() for name in search.split(",")]
    place = checked_device(device, timed=True)
    checked_dtype(dtype)
    if method is not None:
        pruning_method(method)
    check_output(runs)
    source = open_source(checkpoint, revision=revision, token=token, cache_dir=cache_dir)
    if output is not None:
        checked_target(output, apart_from=folders_of(source), force=force)
    own = source.settings()
    method = own.method if method is None else method
    start = settings_of_methods([method], own, changes).get(method, UNPRUNED)
    fixed = [change.partition("=")[0].partition(".")[2].strip() for change in changes]
    plan = SearchPlan(
        start.replace(retention_ratio=float(share)),
        names,
        fixed,
        stages,
        trials,
        seed,
        wanted,
        batch_size,
        memory,
        answer_tokens,
    )
    # Whatever does not fit is found before weights are loaded.
    base = source.base_without_weights(UNPRUNED)
    space = plan.space(base)
    asked = _questions(data, questions, split)

    processor = source.load_processor(UNPRUNED)
    model = source.load_model(UNPRUNED, dtype=dtype, device_map={"": str(place)})
    environment = this_environment(place, model.dtype)
    config = {
        "checkpoint": checkpoint_identity(source),
        "ratio": float(share),
        "trials": trials,
        **identity(plan, space, asked),
        "code_sha256": code_sha256(),
    }
    what = f"tuning_{slug(config['checkpoint']['name'].rpartition('/')[2])}_{slug(asked.name)}_{slug(method)}"
    folder = run_folder(runs, what, config, environment, results=TABLE)
    finished = FinishedParts(folder / PARTS)
    try:
        if len(finished.results) > 1:
            say(f"Going on in {folder}: {len(finished.results) - 1} trials are there.")
        tuning = search_settings(model, processor, asked, plan, finished)
        write_trials(folder / TABLE, tuning)
        atomic_write(folder / JOURNAL, tuning.study.save)
        title = f"{config['checkpoint']['name']}, {method}, ratio {float(share):.4g}: {len(asked.rows)} questions, "
        title += environment.date
        if can_plot():
            atomic_write(folder / FIGURE, lambda unfinished: draw_tuning(unfinished, tuning, title, wanted.meaning))
        else:
            say('No figure was drawn, as matplotlib is not installed (`pip install "hivtp-hf[tune]"`).')
        made = None
        if output is not None:
            made = convert_checkpoint(
                checkpoint,
                output,
                tuning.settings.to_dict(),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                config_only=config_only,
                force=force,
                tuned_on=_note(tuning, plan, asked, source, environment.date),
            )
        # Last of all: where it is missing, a run is finished.
        finished.path.unlink()
    except BaseException:
        if len(finished.results) < 2:
            shutil.rmtree(folder)  # nothing in it is worth going on from
        raise
    finally:
        finished.close()
    return TunedCheckpoint(tuning, folder, made)


def _ratio(text: str) -> Fraction:
    try:
        return parsed_ratio(text)
    except ValueError as error:
        raise ValueError(f"`--ratio`: {error}") from None


def _questions(data: str | Path, number: int | None, split: str | None) -> EvaluationData:
    """The first rows of some data; 30 where no number is given, or all where there are fewer."""
    if number is not None and number < 1:
        raise ValueError(f"`--questions` is {number}; it must be a whole number from 1. Leave it out for {DEFAULT_QUESTIONS}.")
    name, rows = rows_of_source(data, split, has_answers=False)
    if number is None:
        rows = (row for _, row in zip(range(DEFAULT_QUESTIONS), rows, strict=False))
    return checked_data(name, rows, number, has_answers=False)


def _note(tuning: Tuning, plan: SearchPlan, data: EvaluationData, source: CheckpointSource, date: str) -> str:
    """How the settings were found, for a model card."""
    searched = ", ".join(f"`{name}`" for name in tuning.trials[0].settings)
    measured = sum(trial.value is not None for trial in tuning.trials)
    layers = ", on average over the layers of the language model," if plan.stages else ""
    return (
        f"`hivtp tune` of hivtp_hf {__version__} found {searched} on {date}, without right answers: {measured} trials (seed "
        f"{plan.seed}) on {len(data.rows)} questions about {len(data.image_sizes)} images of the data `{data.name}` (SHA-256 "
        f"`{data.sha256[:16]}`), each at a retention ratio of {plan.start.retention_ratio:.4g}{layers} by the objective "
        f"`{plan.objective.name}`: {plan.objective.meaning}. It is {tuning.value:.4f} with these settings, and was "
        f"{tuning.start_value:.4f} with those that the search started from. That says how much of the unpruned model's pass is "
        "left, and not whether answers are right."
    )
