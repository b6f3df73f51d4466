"""`tune`: the search itself, from a model and questions about images to the settings that keep most of what it does."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..evaluation.data import EvaluationData, checked_data
from ..evaluation.question_tables import Row
from ..evaluation.run_folder import FinishedParts
from ..pruning.checked_values import checked_number, shown
from ..pruning.registry import pruning_method
from ..pruning.settings import VisualTokenPruningConfig, checked_ratio
from .calibration import CalibrationPasses, Measured
from .objectives import STATE, Objective, objective_of
from .search_space import SearchSpace
from .study import Study, Trial, check_optuna, value_of

DEFAULT_TRIALS, DEFAULT_QUESTIONS, DEFAULT_MEMORY, DEFAULT_ANSWER_TOKENS = 50, 30, 4.0, 8
# So many points in a row that mean nothing, and a search has no place to look.
_MOST_REJECTED = 500


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        settings: the best ones, with the retention ratio.
        start: those that it started from.
        value, start_value: of the objective, of both.
        trials: all of them in their order, the start first, rejected points among them.
        importance: how much of being among the better trials each parameter decides, as shares; empty for few trials.
        study: what it came from.
        images: how many there were.
        images_kept: of how many of them the vision tower ran once for all trials; None where no trial was left to run.
    """

    settings: VisualTokenPruningConfig
    start: VisualTokenPruningConfig
    value: float
    start_value: float
    trials: tuple[Trial, ...]
    importance: dict[str, float]
    study: Study
    images: int
    images_kept: int | None


@dataclass(frozen=True)
class SearchPlan:
    """What decides how a search goes, checked.

    Attributes:
        start: the settings that it starts from, with the retention ratio.
        names: of the settings to search; None for the method's own.
        fixed: names of settings that somebody has given a value, which are left alone.
        stages: how many are searched.
        trials: so many points are measured, the start among them.
        seed: of all draws.
        objective: that is maximised.
        batch_size: images at once in the vision tower, and questions at once in the language model.
        memory: how many GiB kept passes of the tower may take.
        answer_tokens: how long the unpruned model's answer may be, for objectives that need one.
    """

    start: VisualTokenPruningConfig
    names: Sequence[str] | None
    fixed: Sequence[str]
    stages: int
    trials: int
    seed: int
    objective: Objective
    batch_size: int
    memory: float
    answer_tokens: int

    def __post_init__(self) -> None:
        for name, minimum in (("trials", 2), ("seed", 0), ("batch_size", 1), ("answer_tokens", 1)):
            checked_number(name, getattr(self, name), int, minimum)
        checked_number("memory", self.memory, float, 0)
        ratio = self.start.retention_ratio
        if ratio is None or ratio == 1:
            raise ValueError(
                f"`ratio` is {shown(ratio)}; it must be above 0 and below 1: at 1 all settings are the unpruned model."
            )

        if not self.start.exact_count:
            raise ValueError(
                "`exact_count` is False, so that the number of tokens depends on what images show; all trials must keep as "
                "many. Set it to True."
            )

    def space(self, base: Any) -> SearchSpace:
        """Where it looks, given a base model."""
        num_layers = base.config.get_text_config().num_hidden_layers
        return SearchSpace(self.start, self.names, self.fixed, base.encoder_facts(), num_layers, self.stages)


def tune(
    model: Any,
    processor: Any,
    samples: Iterable[Any],
    *,
    ratio: float | Fraction,
    method: str | None = None,
    settings: Any = None,
    search: Sequence[str] | None = None,
    stages: int = 0,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    objective: str = STATE,
    batch_size: int = 8,
    memory: float = DEFAULT_MEMORY,
    answer_tokens: int = DEFAULT_ANSWER_TOKENS,
    journal: str | Path | None = None,
    show_progress: bool = True,
) -> Tuning:
    """Searches the settings of a pruning method that change least of what a model makes of questions about images.

    No right answers are needed. Every trial keeps the same share of tokens. What is compared is the model with itself: by
    default its last hidden state at the last token of the prompt, unpruned and pruned. Model and processor stay as they are;
    take the result by `model.config.pruning_config = processor.pruning_config = tuning.settings`. Needs Optuna and SciPy
    (`pip install "hivtp-hf[tune]"`).

    Args:
        model: a pruned model with a language modelling head, such as `HIVTPLlavaNextForConditionalGeneration`.
        processor: of the same family.
        samples: about 30 pairs of an image of Pillow and a question, or rows of `hivtp_hf.evaluation`.
        ratio: the retention ratio, above 0 and below 1.
        method: whose settings are searched; the model's own by default.
        settings: what the search starts from, as `pruning_config` takes them; by default the model's own where they are of
            `method`, else its defaults.
        search: names of the settings to search; by default all of the method's own that tuning does not leave alone.
        stages: how many stages inside the language model are searched besides, at the same average retention.
        trials: so many settings are measured, the start among them. Points that mean nothing do not count.
        seed: of all draws. The same seed gives the same trials, on the same machine.
        objective: "state", "answer" or "next-token".
        batch_size: images at once in the vision tower, and questions at once in the language model.
        memory: how many GiB kept passes of the vision tower may take; what goes beyond runs again in every trial.
        answer_tokens: how long the unpruned model's answer may be, for the objective "answer".
        journal: a file in which finished trials are kept, so that an interrupted call goes on after them when it is repeated.
        show_progress: whether a bar tells how far it is.

    Raises:
        ValueError: for arguments, samples and settings that cannot be used; says what was given and what to do.
        RuntimeError: where a row goes wrong; names it.
    """
    check_optuna()
    own = model.config.pruning_config
    method = own.method if method is None else pruning_method(method).name
    if settings is not None:
        start = VisualTokenPruningConfig.coerce(settings)
        if start.method != method:
            raise ValueError(f"`settings` are of the method {start.method!r}, and `method` is {method!r}. Give those of one.")
    else:
        start = own if own.method == method else VisualTokenPruningConfig(method=method)
    plan = SearchPlan(
        start.replace(retention_ratio=checked_ratio(float(ratio))),
        search,
        (),
        stages,
        trials,
        seed,
        objective_of(objective),
        batch_size,
        memory,
        answer_tokens,
    )
    plan.space(model.model)
    data = checked_data("samples", _rows(samples), None, has_answers=False)
    if journal is None:
        return search_settings(model, processor, data, plan, None, show_progress)
    finished = FinishedParts(Path(journal))
    try:
        return search_settings(model, processor, data, plan, finished, show_progress)
    finally:
        finished.close()


def search_settings(
    model: Any,
    processor: Any,
    data: EvaluationData,
    plan: SearchPlan,
    finished: FinishedParts | None,
    show_progress: bool = True,
) -> Tuning:
    """The search of a plan.

    Args:
        model, processor: as for `tune`.
        data: looked through.
        plan: of the search.
        finished: what was done before, and where trials are kept; None to keep none.
        show_progress: whether a bar tells how far it is.

    Raises:
        ValueError: where the start does not fit the model, no point means anything, and for what was kept of another search.
        RuntimeError: where a row goes wrong; names it.
    """
    space = plan.space(model.model)
    layers = space.layers if space.reads_layers else list(plan.start.scored_layers(model.model.encoder_facts()))
    passes = CalibrationPasses(
        model,
        processor,
        data,
        plan.objective,
        plan.start,
        layers,
        plan.batch_size,
        plan.memory,
        plan.answer_tokens,
    )
    passes.check(plan.start)
    study = Study(space.parameters, plan.seed)
    study.trials = _kept_trials(finished, plan, space, data)
    total, done = passes.num_questions * (plan.trials + 1), passes.num_questions * (len(study.finished) + 1)
    with tqdm(total=total, unit="pass", desc="Tuning", disable=not show_progress) as progress:
        is_left = len(study.finished) < plan.trials
        if is_left:
            passes.refer(progress.update)
        progress.update(done - progress.n)
        while len(study.finished) < plan.trials:
            trial = _next_trial(study, space, plan, passes, progress.update)
            if trial is None:  # all there is has been tried
                break
            study.trials.append(trial)
            if finished is not None:
                finished.add(len(study.trials), trial._asdict())
            progress.set_postfix_str(f"best {value_of(study.best):.4f}", refresh=False)
    best, start = study.best, study.trials[0]
    settings = plan.start if best is start or best.point is None else space.settings(best.point)
    return Tuning(
        settings,
        plan.start,
        value_of(best),
        value_of(start),
        tuple(study.trials),
        study.importance(),
        study,
        len(data.image_sizes),
        passes.num_kept if is_left else None,
    )


def _next_trial(
    study: Study, space: SearchSpace, plan: SearchPlan, passes: CalibrationPasses, advance: Callable[[int], object]
) -> Trial | None:
    """The start first, then what the study asks for; None where that is nothing new."""
    began = time.perf_counter()
    if not study.trials:
        point = space.point(plan.start)
        return _measured(point, plan.start, space, passes.measure(plan.start, advance), began)
    recent = study.trials[-_MOST_REJECTED:]
    if len(recent) == _MOST_REJECTED and all(trial.value is None for trial in recent):
        raise ValueError(
            f"{_MOST_REJECTED} points in a row mean no settings, the last one because {recent[-1].reason} Search fewer "
            "settings (`--search`), or give another `--ratio`."
        )
    point = study.next_point()
    if point is None:
        return None
    try:
        settings = space.settings(point)
        passes.check(settings)
    except ValueError as error:
        return Trial(point, {}, None, None, time.perf_counter() - began, str(error))
    return _measured(point, settings, space, passes.measure(settings, advance), began)


def _measured(
    point: dict[str, Any] | None, settings: VisualTokenPruningConfig, space: SearchSpace, found: Measured, began: float
) -> Trial:
    return Trial(point, space.changing(settings), found.value, found.tokens_per_layer, time.perf_counter() - began)


def identity(plan: SearchPlan, space: SearchSpace, data: EvaluationData) -> dict[str, Any]:
    """All that decides what comes out of a search of one model, the number of trials apart, as JSON types."""
    decided = {
        "start": plan.start.to_dict(),
        "parameters": [vars(parameter) for parameter in space.parameters],
        "seed": plan.seed,
        "objective": plan.objective.name,
        "answer_tokens": plan.answer_tokens if plan.objective.needs_answer else None,
        "batch_size": plan.batch_size,
        "data": {
            "name": data.name,
            "questions": len(data.rows),
            "images": len(data.image_sizes),
            "sha256": data.sha256,
        },
    }
    return json.loads(json.dumps(decided))


def _kept_trials(finished: FinishedParts | None, plan: SearchPlan, space: SearchSpace, data: EvaluationData) -> list[Trial]:
    """The trials of an interrupted search, after a first record that says which search it was."""
    if finished is None:
        return []
    ours = identity(plan, space, data)
    if not finished.results:
        finished.add(0, ours)
    if finished.results.get(0) != ours:
        raise ValueError(f"{finished.path} keeps trials of another search. Give another file, or delete it to begin anew.")
    return [Trial(**finished.results[number]) for number in range(1, len(finished.results))]


def _rows(samples: Iterable[Any]) -> Iterable[Row]:
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, Row):
            yield sample
            continue
        try:
            image, question = sample
        except (TypeError, ValueError):
            image = question = None
        if not isinstance(image, Image.Image) or not isinstance(question, str):
            raise ValueError(
                f"sample {number} is {shown(sample)}; it must be a pair of an image of Pillow and a question, or a row of "
                "hivtp_hf.evaluation."
            )
        yield Row(image, f"sample {number}", question, "")
