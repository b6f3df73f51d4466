"""`evaluate_checkpoint`: the accuracy of a checkpoint under pruning methods and ratios, beside the unpruned model."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..checkpoints import CheckpointSource, open_source
from ..checkpoints.placing import checked_device, checked_dtype
from ..figures.plotting import can_plot
from ..files import atomic_write
from ..pruning.evidence import Evidence
from ..pruning.features import check_pruning_fits_encoder
from ..pruning.settings import VisualTokenPruningConfig
from .answering import PartWork
from .data import RULE, EvaluationData, ImageGroup, load_data
from .environment import RunEnvironment, checkpoint_identity, code_sha256, slug, this_environment
from .metrics import MetricsRow, answers_of_variants, metrics_rows, write_metrics, write_predictions
from .plot import draw_accuracy
from .processes import Processes
from .prompts import prompts_of
from .run_folder import METRICS, PARTS, PLOT, PREDICTIONS, FinishedParts, check_output, run_folder
from .variants import (
    BASE_ONLY,
    DEFAULT_RATIOS,
    SEEDS,
    Variant,
    chosen_methods,
    chosen_weights_and_positions,
    parsed_ratios,
    planned_variants,
    settings_of_methods,
)

_UNPRUNED = VisualTokenPruningConfig(method="none")


class Evaluation(NamedTuple):
    """A finished run: its folder, and the rows of its metrics.csv."""

    folder: Path
    metrics: list[MetricsRow]


def evaluate_checkpoint(
    checkpoint: str,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    methods: str | None = None,
    ratios: str = DEFAULT_RATIOS,
    questions: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 8,
    output: Path = Path("evaluation_output"),
    changes: Sequence[str] = (),
    weights_and_positions: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    say: Callable[[str], object] = print,
) -> Evaluation:
    """Asks a checkpoint questions about images, unpruned and under every method and ratio, and writes what comes out.

    Answers are decoded greedily and compared with the right ones in lower case, without blanks at both ends and without
    punctuation at the end. The method "random" runs with the seeds 0, 1 and 2, whose answers are pooled: three for every
    question. Every image is encoded once for all methods and ratios (smaller images of "downsample" are encoded beside).

    A run has a folder of its own in `output`, with config.json, environment.json, metrics.csv, predictions.csv and, where
    matplotlib is installed, accuracy.png. Interrupted, it goes on when it is called again in the same way, and ends with the
    same predictions and metrics, times apart. Called again after it has finished, it makes another folder, whose name ends in
    a number.

    Args:
        checkpoint: a stock or pruned one of a supported family: a folder, or `owner/name` on the Hub.
        data: a folder with a table `questions.csv` or `questions.jsonl`, or written by the library `datasets`, or a data set
            on the Hub, as `owner/name` or `owner/name@revision`; with columns image, question, answer, and if wanted
            question_type. None for the held-out questions of examples/shapes_vqa, in a clone of the project.
        split: of data that has several.
        methods: names of methods, "base-only" and "downsample", separated by commas; None for all of these that fit the
            checkpoint. "downsample+" and a method's name make the image smaller and prune that, and leave the ratio in all.
        ratios: shares of patch tokens to keep, separated by commas, as decimals or fractions; 1 is the unpruned model.
        questions: so many of the first ones; None for all (of the project's own: 2,000).
        device: "auto", "cpu", "cuda" or "cuda:" and a number. "auto" and "cuda" are each process's share of the devices.
        dtype: "auto" for the checkpoint's own, "float32", "bfloat16" or "float16".
        batch_size: images at once in the vision tower, and questions at once in the language model.
        max_new_tokens: per answer.
        output: where folders of runs lie.
        changes: settings "METHOD.NAME=VALUE" on top of the defaults, or of the checkpoint's own for its own method.
        weights_and_positions: some of "published", "weights", "positions" and "both", separated by commas: every method runs
            with each, so that they can be compared. "weights" are "cluster_size" unless the settings name others. None for what
            the settings say of `token_weights` and `positions`.
        revision, token, cache_dir: for a checkpoint on the Hub, as for `huggingface_hub.snapshot_download`.
        say: told what a person should know.

    Raises:
        ValueError: for arguments, data, a checkpoint or settings that cannot be used; says what was given and what to do.
        RuntimeError: where a row goes wrong, in any process: names the row, its image and question, the method and the ratio.
            No metrics are written then.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the checkpoint cannot be downloaded.
    """
    processes = Processes(device)
    if not processes.is_main:
        say = _silently

    def prepared() -> _Prepared:
        asked_methods, shares = chosen_methods(methods), parsed_ratios(ratios)
        told = chosen_weights_and_positions(weights_and_positions)
        place = checked_device(processes.device, timed=True)
        checked_dtype(dtype)
        for name, number in (("batch-size", batch_size), ("max-new-tokens", max_new_tokens)):
            if number < 1:
                raise ValueError(f"`--{name}` is {number}; it must be a whole number from 1.")
        check_output(output)
        asked = load_data(data, questions, split)

        source = open_source(checkpoint, revision=revision, token=token, cache_dir=cache_dir)
        base = source.base_without_weights(_UNPRUNED)
        chosen = _that_fit(asked_methods, base, methods is None, say)
        settings = settings_of_methods(chosen, source.settings(), changes, told)
        plan = planned_variants(chosen, shares, settings, _cells_a_side(base), told)
        _check_settings(base, settings, plan)
        processor = source.load_processor(_UNPRUNED)
        prompts = prompts_of(processor, asked)

        model = source.load_model(_UNPRUNED, dtype=dtype, device_map={"": str(place)})
        environment = this_environment(place, model.dtype)
        work = PartWork(model, processor, plan, asked, prompts, batch_size, max_new_tokens)
        all_shares = [float(share) for share in shares]
        config = functools.partial(_config, source, asked, plan, settings, all_shares, batch_size, max_new_tokens)
        return _Prepared(asked, plan, work, asked.parts(batch_size), config, environment)

    return _run(processes, processes.agreed(prepared), output, say)


class _Prepared(NamedTuple):
    """All that a process needs for its share of a run; `config` is for the one that writes."""

    asked: EvaluationData
    plan: list[Variant]
    work: PartWork
    parts: list[list[ImageGroup]]
    config: Callable[[], dict[str, Any]]
    environment: RunEnvironment


def _silently(text: str) -> None:
    """What processes that others speak for say."""


def _run(processes: Processes, prepared: _Prepared, output: Path, say: Callable[[str], object]) -> Evaluation:
    """Shares the parts among the processes, one each at a time; the main one alone has a folder, and writes."""
    asked, plan, work, parts, config_of_run, environment = prepared
    opened: list[_OpenRun] = []  # in the main process

    def open_run() -> tuple[Path, list[int]]:
        opened.append(_OpenRun(output, config_of_run(), environment, processes.number))
        return opened[0].folder, sorted(opened[0].finished.results)

    def write() -> list[MetricsRow]:
        return opened[0].write(asked, plan, parts, say)

    try:
        folder, done = processes.from_main(open_run)
        if done:
            say(f"Going on in {folder}: {len(done)} of {len(parts)} parts are finished.")
        waiting = [number for number in range(len(parts)) if number not in set(done)]

        def answers_to(part: Sequence[ImageGroup]) -> int:
            return len(plan) * sum(len(group.rows) for group in part)

        with tqdm(
            total=len(asked.rows) * len(plan), unit="answer", desc="Evaluating", disable=not processes.is_main
        ) as progress:
            progress.update(sum(answers_to(parts[number]) for number in done))
            for start in range(0, len(waiting), processes.number):
                share = waiting[start + processes.index : start + processes.index + 1]
                of_all = processes.gathered(functools.partial(_results, work, parts, share, progress.update))
                for results in of_all:
                    for number, of_part in results.items():
                        if opened:
                            opened[0].finished.add(number, of_part)
                        if number not in share:
                            progress.update(answers_to(parts[number]))
        metrics = processes.from_main(write)
    except BaseException:
        for run in opened:
            run.abandon()
        raise
    finally:
        for run in opened:
            run.finished.close()
    return Evaluation(folder, metrics)


def _results(
    work: PartWork, parts: Sequence[Sequence[ImageGroup]], share: Sequence[int], advance: Callable[[int], object]
) -> dict[int, Any]:
    """What comes out of some parts, by their numbers."""
    return {number: work.results(parts[number], advance) for number in share}


class _OpenRun:
    """The folder of a run that is being written.

    Args:
        output: where the folders of runs lie.
        config: of the run.
        environment: of this process.
        processes: how many share the run.

    Raises:
        ValueError: while another run writes the folder.
    """

    def __init__(self, output: Path, config: dict[str, Any], environment: RunEnvironment, processes: int):
        self._config, self._environment = config, environment
        what = f"{slug(config['checkpoint']['name'].rpartition('/')[2])}_{slug(config['data']['name'])}"
        self.folder = run_folder(output, what, config, environment, processes)
        self.finished = FinishedParts(self.folder / PARTS)

    def write(
        self,
        asked: EvaluationData,
        plan: Sequence[Variant],
        parts: Sequence[Sequence[ImageGroup]],
        say: Callable[[str], object],
    ) -> list[MetricsRow]:
        """Writes all results, from the parts, which are all finished."""
        folder = self.folder
        table = answers_of_variants(plan, parts, self.finished.results)
        metrics = metrics_rows(asked, plan, table)
        write_predictions(folder / PREDICTIONS, asked, plan, table)
        write_metrics(folder / METRICS, metrics)
        if can_plot():
            name, date = self._config["checkpoint"]["name"], self._environment.date
            title = f"{name}, {asked.name}: {len(asked.rows)} questions, {date}"
            atomic_write(folder / PLOT, lambda unfinished: draw_accuracy(unfinished, metrics, title))
        else:
            say('No figure was drawn, as matplotlib is not installed (`pip install "hivtp-hf[plots]"`).')
        # Last of all: where it is missing, a run is finished.
        self.finished.path.unlink()
        return metrics

    def abandon(self) -> None:
        """Leaves what a later run can go on from, and nothing where that is nothing."""
        if not self.finished.results:
            shutil.rmtree(self.folder)


def _that_fit(methods: Sequence[str], base: Any, is_default: bool, say: Callable[[str], object]) -> list[str]:
    """The methods without those that mean nothing for a model, and of the default ones without those that it cannot follow."""
    chosen = list(methods)
    if BASE_ONLY in chosen and not hasattr(base, "image_newline"):
        chosen.remove(BASE_ONLY)
        say(f"{BASE_ONLY} is left out: images of this model have one view, which the unpruned model sees.")
    if is_default and Evidence.CLASS_ATTENTION not in base.provided_evidence:
        chosen.remove("cls_attention")
        say("cls_attention is left out: the vision tower has no class token.")
    return chosen


def _cells_a_side(base: Any) -> int | None:
    """Of a tile; None where images have sizes of their own."""
    vision = base.config.vision_config
    size = getattr(vision, "image_size", None)
    return None if size is None else size // vision.patch_size


def _config(
    source: CheckpointSource,
    data: EvaluationData,
    plan: Sequence[Variant],
    settings: dict[str, VisualTokenPruningConfig],
    ratios: Sequence[float],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """All that decides what comes out of a run, as JSON types; a run goes on only where all of it is the same."""
    # Ratios and seeds are others in every variant.
    varied = ("method", "retention_ratio", "token_budget", "seed")
    # Of every method of the registry, in the order of the plan: what its variants have of weights and positions.
    told = {
        method: list(dict.fromkeys(variant.weights_and_positions for variant in plan if variant.selector == method))
        for method in settings
    }
    of_methods = {
        method: {name: value for name, value in pruning.to_dict().items() if name not in varied}
        for method, pruning in settings.items()
    }
    config = {
        "checkpoint": checkpoint_identity(source),
        "data": {
            "name": data.name,
            "questions": len(data.rows),
            "images": len(data.image_sizes),
            "sha256": data.sha256,
        },
        "methods": list(dict.fromkeys(variant.method for variant in plan)),
        "ratios": ratios,
        "settings": of_methods,
        "weights_and_positions": told,
        "seeds": {"random": list(SEEDS)},
        "downsample_cells": [variant.grid for variant in plan if variant.grid is not None],
        "answers": {"decoding": "greedy", "max_new_tokens": max_new_tokens, "compared": RULE},
        "batch_size": batch_size,
        "code_sha256": code_sha256(),
    }
    return json.loads(json.dumps(config))


def _check_settings(base: Any, settings: dict[str, VisualTokenPruningConfig], plan: Sequence[Variant]) -> None:
    """A ValueError where some method's settings do not fit the vision tower, or a variant's the family."""
    for method, pruning in settings.items():
        try:
            check_pruning_fits_encoder(pruning, base.encoder_facts(), base.provided_evidence)
        except ValueError as error:
            raise ValueError(f"{error} Here: `--set {method}.NAME=VALUE`, or leave {method} out of `--methods`.") from error
    for variant in plan:
        if variant.settings is not None:
            base.family.check_pruning(variant.settings)
