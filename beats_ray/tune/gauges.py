"""What a sweep shows while it runs: its trials by state and the best value so far, to Prometheus.

    RunConfig(..., callbacks=sweep_callbacks("first/sweep", "validation/accuracy", validations=20))

Everything is counted from Tune's own trials at each of its steps, so a sweep that was restored shows all of them.
"""

from collections import Counter
from typing import Any

from ray.tune import Callback
from ray.tune.logger import TBXLoggerCallback

from beats_ray.telemetry import SWEEP_BEST, SWEEP_TRIALS

STATES = ("pending", "running", "paused", "complete", "stopped", "failed")
"""Labels `state` of `sweep/trials`; `stopped` is a trial that the scheduler ended before its last step."""
_STATES_OF_TUNE = {"PENDING": "pending", "RUNNING": "running", "PAUSED": "paused", "ERROR": "failed"}


def sweep_callbacks(run: str, metric: str, validations: int, mode: str = "max") -> list[Callback]:
    """What a sweep's RunConfig needs: `SweepGauges`, and nothing of TensorBoard from Tune.

    run: the sweep's label, `run_name(output.uri)`. metric: what `sweep/best` is the `mode` of. validations: of a
    trial that ran to its end.
    """
    return [SweepGauges(run, metric, validations, mode), NoTuneTensorBoard()]


class NoTuneTensorBoard(TBXLoggerCallback):
    """Stands where Tune would put its own TensorBoard logger.

    That one describes the whole experiment to the HParams plugin, which then shows nothing of what the trials' own
    files say (`train/tensorboard.py`).
    """

    def __init__(self) -> None:
        """Opens nothing."""

    def log_trial_start(self, trial: Any) -> None:
        """Writes nothing."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Writes nothing."""

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Writes nothing."""


class SweepGauges(Callback):
    """Exports `sweep/trials` for every state and `sweep/best`; validations: of a trial that ran to its end."""

    def __init__(self, run: str, metric: str, validations: int, mode: str = "max") -> None:
        self._run, self._metric, self._validations, self._mode = run, metric, validations, mode

    def on_step_end(self, iteration: int, trials: list[Any], **_info: Any) -> None:
        """Called by Tune after each turn of its own loop."""
        del iteration
        self._export(trials)

    def on_experiment_end(self, trials: list[Any], **_info: Any) -> None:
        """Called by Tune once no trial is left."""
        self._export(trials)

    def _export(self, trials: list[Any]) -> None:
        counts = Counter(self._state(trial) for trial in trials)
        for state in STATES:
            SWEEP_TRIALS.set(counts[state], run=self._run, state=state)
        found = [trial.metric_analysis[self._metric][self._mode] for trial in trials if self._reports(trial)]
        if found:
            SWEEP_BEST.set(max(found) if self._mode == "max" else min(found), run=self._run, metric=self._metric)

    def _state(self, trial: Any) -> str:
        if trial.status in _STATES_OF_TUNE:
            return _STATES_OF_TUNE[trial.status]
        newest = trial.run_metadata.last_result or {}  # `trial.last_result` would ask the trial's actor
        return "complete" if newest.get("validations", 0) >= self._validations else "stopped"

    def _reports(self, trial: Any) -> bool:
        return self._metric in trial.metric_analysis
