"""Who stops trials, in Ray Tune's words. Time is counted in validations, which all trials have alike.

With several encoders each has a scheduler of its own: a weak encoder's trials compete among themselves, so that none
of its settings is stopped for being behind another encoder's, and pairs of finished trials remain to compare.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from beats_ray.config import SweepSettings
from beats_ray.tune.space import clip_to_space, tune_domains
from beats_ray.tune.trial import ENCODER, SETTING

TIME = "validations"


def build_scheduler(sweep: SweepSettings, total_validations: int, encoders: tuple[str, ...] = ("",)) -> TrialScheduler:
    """The scheduler of `sweep.scheduler`. total_validations: of a trial that runs to its end."""

    def build() -> TrialScheduler:
        return _BUILDERS[sweep.scheduler](sweep, total_validations)

    if len(encoders) == 1:
        return build()
    return SeparateSchedulers({name: build() for name in encoders})


def _asha(sweep: SweepSettings, total: int, brackets: int = 1) -> TrialScheduler:
    return _RepeatedBrackets(
        sweep.seed,
        time_attr=TIME,
        max_t=total,
        grace_period=min(sweep.grace_validations, total),
        reduction_factor=sweep.reduction_factor,
        brackets=brackets,
    )


class _RepeatedBrackets(AsyncHyperBandScheduler):
    """Ray's draws a trial's bracket from numpy's global generator; here each setting has its own.

    So a sweep that goes on finds trials in the brackets where they were, and encoders compete on equal terms.
    """

    def __init__(self, seed: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seed = seed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        before = np.random.get_state()
        np.random.seed(zlib.crc32(f"{self._seed}/{trial.config[SETTING]}".encode()))
        try:
            super().on_trial_add(tune_controller, trial)
        finally:
            np.random.set_state(before)


def _hyperband(sweep: SweepSettings, total: int) -> TrialScheduler:
    rungs = int(math.log(total / min(sweep.grace_validations, total)) / math.log(sweep.reduction_factor)) + 1
    return _asha(sweep, total, min(sweep.brackets, rungs))  # a bracket without a rung would stop nobody


def _median(sweep: SweepSettings, _total: int) -> TrialScheduler:
    # With no time slice at all a trial would be paused for each one that waits, and set up again from its checkpoint.
    return MedianStoppingRule(time_attr=TIME, grace_period=sweep.grace_validations, min_time_slice=10**9)


def _population(sweep: SweepSettings, _total: int) -> TrialScheduler:
    mutations = {
        name: list(parameter.values) if parameter.distribution == "choice" else domain
        for (name, parameter), domain in zip(sweep.space.items(), tune_domains(sweep.space).values(), strict=True)
    }
    return PopulationBasedTraining(
        time_attr=TIME,
        perturbation_interval=sweep.grace_validations,
        hyperparam_mutations=mutations,
        custom_explore_fn=_Clipped(sweep),
        log_config=False,  # to files of Ray's; the leaderboard has what became of each member
    )


class _Clipped:
    """Keeps a changed setting within the space; a class, since it travels with the experiment's state."""

    def __init__(self, sweep: SweepSettings) -> None:
        self._sweep = sweep

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return clip_to_space(config, self._sweep.space)


_BUILDERS: Mapping[str, Callable[[SweepSettings, int], TrialScheduler]] = {
    "asha": _asha,
    "hyperband": _hyperband,
    "median": _median,
    "pbt": _population,
    "none": lambda _sweep, _total: FIFOScheduler(),
}


@dataclass(frozen=True)
class _Past:
    """A trial of which only its reports are left."""

    trial_id: str
    config: Mapping[str, Any]


def replay(
    scheduler: TrialScheduler, sweep: SweepSettings, histories: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Lets successive halving know what trials reported before the sweep was interrupted: Tune saves no scheduler.

    histories: each trial's reports, oldest first, with Tune's `config`. The median rule and populations begin anew.
    """
    if sweep.scheduler not in ("asha", "hyperband"):
        return
    controller: Any = None  # which these schedulers never ask
    for trial_id, reports in histories.items():
        past: Any = _Past(trial_id, reports[0]["config"])
        scheduler.on_trial_add(controller, past)
        for report in reports:
            scheduler.on_trial_result(controller, past, dict(report))


class SeparateSchedulers(FIFOScheduler):
    """Trials in the order in which they came; each judged by the scheduler of its encoder."""

    def __init__(self, schedulers: dict[str, TrialScheduler]) -> None:
        super().__init__()
        self._schedulers = schedulers

    def _of(self, trial: Any) -> TrialScheduler:
        return self._schedulers[trial.config[ENCODER]]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        super().set_search_properties(metric, mode, **spec)
        return all(one.set_search_properties(metric, mode, **spec) for one in self._schedulers.values())

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)
