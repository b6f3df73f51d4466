"""`Study`: the trials of a search so far, and the next point to try, by Optuna's Gaussian-process sampler.

A point is drawn from a seed and from what was tried before, and from nothing else. So a study that goes on after an
interruption is the one that it would have been without.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .search_space import Parameter

# So many points are drawn at random before the sampler learns from them.
_AT_RANDOM = 10
# So many points in a row that mean no settings, and one is drawn at random.
_REJECTED_IN_A_ROW = 5
# So many draws of a point that has been tried, and there is no other.
_DRAWS = 200
# Of so many finished trials at least the importance of settings says something.
_ENOUGH_FOR_IMPORTANCE = 10


class Trial(NamedTuple):
    """One point and what became of it.

    Attributes:
        point: values by the names of parameters; None for the settings that a search starts from, where no point means them.
        settings: what changes from point to point, by its name; what is rejected has none.
        value: of the objective; None where the point was rejected.
        tokens_per_layer: of an image, on average; None where the point was rejected.
        seconds: that it took.
        reason: why it was rejected.
    """

    point: dict[str, Any] | None
    settings: dict[str, Any]
    value: float | None
    tokens_per_layer: float | None
    seconds: float
    reason: str | None = None


def check_optuna() -> None:
    """A ValueError where what a search needs is missing."""
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tuning needs Optuna and SciPy, of which one cannot be imported: {error}. Install them with `pip install "
            '"hivtp-hf[tune]"`.'
        ) from error


class Study:
    """The trials of a search.

    Args:
        parameters: of a point.
        seed: of all draws.

    Attributes:
        trials: in their order, rejected points among them.
    """

    def __init__(self, parameters: Sequence[Parameter], seed: int):
        self._parameters, self._seed = parameters, seed
        self.trials: list[Trial] = []

    @property
    def finished(self) -> list[Trial]:
        """The trials that have a value."""
        return [trial for trial in self.trials if trial.value is not None]

    @property
    def best(self) -> Trial:
        """The trial of the highest value, the first one of several."""
        return max(self.finished, key=value_of)

    def next_point(self) -> dict[str, Any] | None:
        """A point that was not tried before; None where there is none, as far as many draws tell."""
        tried = [trial.point for trial in self.trials]
        learns = len(self.finished) >= _AT_RANDOM and any(
            trial.value is not None for trial in self.trials[-_REJECTED_IN_A_ROW:]
        )
        for draw in range(_DRAWS):
            point = self._drawn(draw, by_process=learns and draw == 0)
            if point not in tried:
                return point
        return None

    def importance(self) -> dict[str, float]:
        """How much of being among the better trials each parameter decides, as shares, largest first; empty for few trials."""
        points = [trial for trial in self.finished if trial.point is not None]
        if len(points) < _ENOUGH_FOR_IMPORTANCE or len({trial.value for trial in points}) < 2:
            return {}
        with _quietly() as optuna:
            study = self._optuna_study(optuna, None, optuna.storages.InMemoryStorage(), imputes=False)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))

    def save(self, path: Path) -> None:
        """Writes the study as a journal that Optuna's own tools read, by the name "hivtp"."""
        with _quietly() as optuna:
            backend = optuna.storages.journal.JournalFileBackend(str(path))
            self._optuna_study(optuna, None, optuna.storages.JournalStorage(backend), imputes=False)

    def _drawn(self, draw: int, by_process: bool) -> dict[str, Any]:
        seed = int(np.random.SeedSequence([self._seed, len(self.trials), draw]).generate_state(1)[0])
        with _quietly() as optuna:
            samplers = optuna.samplers
            sampler = samplers.GPSampler(seed=seed, n_startup_trials=1) if by_process else samplers.RandomSampler(seed=seed)
            # A random draw looks at no trial.
            trials = self.trials if by_process else []
            study = self._optuna_study(optuna, sampler, optuna.storages.InMemoryStorage(), imputes=True, trials=trials)
            return dict(study.ask(self._distributions(optuna)).params)

    def _optuna_study(
        self, optuna: Any, sampler: Any, storage: Any, imputes: bool, trials: Sequence[Trial] | None = None
    ) -> Any:
        """The trials as a study of Optuna's.

        Args:
            imputes: whether points that were rejected count as the worst value there is, from which the sampler learns to stay
                away; else they are pruned trials.
        """
        study = optuna.create_study(study_name="hivtp", storage=storage, sampler=sampler, direction="maximize")
        distributions, trials = self._distributions(optuna), self.trials if trials is None else trials
        worst = min(map(value_of, self.finished), default=0.0)
        states = optuna.trial.TrialState
        for trial in trials:
            if trial.point is None:
                continue
            is_rejected = trial.value is None
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.point,
                    distributions=distributions,
                    value=None if is_rejected and not imputes else worst if is_rejected else trial.value,
                    state=states.PRUNED if is_rejected and not imputes else states.COMPLETE,
                    user_attrs={"settings": trial.settings, "reason": trial.reason},
                )
            )
        return study

    def _distributions(self, optuna: Any) -> dict[str, Any]:
        return {parameter.name: _distribution(optuna.distributions, parameter) for parameter in self._parameters}


def value_of(trial: Trial) -> float:
    """The value of a trial that has one."""
    value: Any = trial.value
    return value


def _distribution(distributions: Any, parameter: Parameter) -> Any:
    if parameter.choices:
        return distributions.CategoricalDistribution(parameter.choices)
    if parameter.is_whole:
        return distributions.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.is_logarithmic)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.is_logarithmic)


@contextlib.contextmanager
def _quietly() -> Iterator[Any]:
    """Optuna, which within this says nothing of trials."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)
