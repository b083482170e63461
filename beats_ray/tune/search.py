"""Who proposes the next trial: one Optuna study behind Ray Tune's searcher interface.

Tune's own Optuna wrapper takes neither known evaluations nor first points of a space with conditions, and tells the
study a stopped trial's last value as if it were a final one. Here a stopped trial is told as what it is, with its
values by validation, which is what lets TPE rank it below those that came further (the idea of BOHB, Falkner et al.
2018). Of several encoders each setting is handed out once for each, one after the other, and its value is their mean:
encoders are compared on the same settings, whatever the searcher has learned.

    search = SettingsSearch(sweep, objectives, encoders=("first", "second"))
    search.suggest("a1")  # {"train.learning_rate": 3e-4, "encoder": "first", "setting": 0}
"""

import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from beats_ray.config import SweepSettings
from beats_ray.tune.space import combinations, distribution_of, draw
from beats_ray.tune.trial import ENCODER, SETTING

STARTUP_TRIALS = 10  # Optuna's default; a sweep of eight trials would be nothing but random draws

Objectives = Mapping[str, str]
"""max or min for each metric; the first one stops trials and chooses the best."""


@dataclass
class _Handed:
    """A setting that trials have been started with."""

    number: int
    trial: Any
    """Optuna's."""
    waiting: list[str]
    """Encoders that have no trial of it yet."""
    drawn: dict[str, Any]
    running: int = 0
    finals: list[tuple[float, ...] | None] = field(default_factory=list)
    """The values of each trial that ended; None of a failed one."""
    is_stopped: bool = False
    histories: list[dict[int, float]] = field(default_factory=list)
    """Of each trial the first objective's value by validation."""


class SettingsSearch(Searcher):
    """Ray Tune's searcher for `sweep.search`; see the module. total_validations: of a trial that runs to its end."""

    def __init__(
        self,
        sweep: SweepSettings,
        objectives: Objectives,
        total_validations: int,
        encoders: tuple[str, ...] = ("encoder",),
        known: tuple[tuple[dict[str, Any], float], ...] = (),
    ) -> None:
        """known: (parameters, value) of trials of an earlier sweep; see `warm_start.py`."""
        super().__init__(metric=next(iter(objectives)), mode=next(iter(objectives.values())))
        self._sweep = sweep
        self._names = tuple(objectives)
        self._total = total_validations
        self._encoders = encoders
        self._handed: list[_Handed] = []
        self._of: dict[str, tuple[_Handed, dict[int, float]]] = {}
        self._ended: set[str] = set()
        self._study = build_study(sweep, objectives)
        for parameters, value in known:
            self._study.add_trial(_finished(sweep, parameters, value))

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:  # noqa: ARG002
        """Tune's settings repeat what this was built with."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next setting, or the last one for the next encoder."""
        if not self._handed or not self._handed[-1].waiting:
            trial = self._study.ask()
            handed = _Handed(len(self._handed), trial, list(self._encoders), draw(trial, self._sweep))
            self._handed.append(handed)
        handed = self._handed[-1]
        handed.running += 1
        self._of[trial_id] = handed, {}
        return {**handed.drawn, ENCODER: handed.waiting.pop(0), SETTING: handed.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value = result.get(self._names[0])
        if value is not None and math.isfinite(value):
            self._of[trial_id][1][int(result["validations"])] = float(value)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study once all encoders' trials of the setting have ended."""
        if trial_id in self._ended:  # it failed, the sweep was started again, and so was it
            return
        self._ended.add(trial_id)
        handed, history = self._of[trial_id]
        if result and not error:
            self.on_trial_result(trial_id, result)
        values = tuple(float((result or {}).get(name, math.nan)) for name in self._names)
        has_failed = error or not all(map(math.isfinite, values))
        handed.finals.append(None if has_failed else values)
        handed.histories.append(history)
        handed.is_stopped |= not has_failed and int((result or {}).get("validations", 0)) < self._total
        handed.running -= 1
        if not handed.running and not handed.waiting:
            self._tell(handed)

    def _tell(self, handed: _Handed) -> None:
        from optuna.trial import TrialState

        finals = [values for values in handed.finals if values is not None]
        if len(finals) < len(handed.finals):
            self._study.tell(handed.trial, state=TrialState.FAIL)
        elif handed.is_stopped:
            if len(self._names) == 1:
                for step in sorted(set.intersection(*(set(history) for history in handed.histories))):
                    handed.trial.report(_mean([history[step] for history in handed.histories]), step)
            self._study.tell(handed.trial, state=TrialState.PRUNED)
        else:
            self._study.tell(handed.trial, [_mean(values) for values in zip(*finals, strict=True)])

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))  # noqa: S301  # of our own output


def build_study(sweep: SweepSettings, objectives: Objectives) -> Any:
    """An Optuna study in memory, its first points enqueued."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that groups of parameters are experimental
        study = optuna.create_study(
            sampler=_sampler(sweep),
            directions=["maximize" if mode == "max" else "minimize" for mode in objectives.values()],
        )
    for point in sweep.start:
        study.enqueue_trial(dict(point))
    if sweep.search == "grid":
        grid = list(combinations(sweep))
        for number in range(num_settings(sweep)):
            study.enqueue_trial(grid[number % len(grid)])
    return study


def _sampler(sweep: SweepSettings) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    if sweep.search in ("random", "grid"):
        return RandomSampler(seed=sweep.seed)
    startup = max(2, min(STARTUP_TRIALS, sweep.num_trials // 3))
    if sweep.search == "bohb":
        return TPESampler(seed=sweep.seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
    return TPESampler(seed=sweep.seed, n_startup_trials=startup)


def num_settings(sweep: SweepSettings) -> int:
    """How many settings are tried; a grid is gone through whole, again only where other parameters are drawn beside."""
    if sweep.search != "grid":
        return sweep.num_trials
    size = len(list(combinations(sweep)))
    is_drawn = any(parameter.distribution != "grid" for parameter in sweep.space.values())
    return size * (sweep.num_trials // size if is_drawn else 1)


def _finished(sweep: SweepSettings, parameters: Mapping[str, Any], value: float) -> Any:
    import optuna

    shared = {name: distribution_of(sweep.space[name]) for name in parameters}
    return optuna.trial.create_trial(params=dict(parameters), distributions=shared, value=value)


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values) / len(values))
