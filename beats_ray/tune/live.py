"""The leaderboard of a sweep that is under way, from Ray Tune's own view of its trials."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.tune import Callback

from beats_ray.config import SweepConfig
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.reporting.reading import json_lines
from beats_ray.stage import is_complete
from beats_ray.train.committed import sound_steps
from beats_ray.train.faults import STOP_REQUEST
from beats_ray.train.leftovers import is_released, wait_until_released
from beats_ray.tune.budget import Budget, BudgetUsedUp
from beats_ray.tune.leaderboard import Outcome, leaderboard, write_board
from beats_ray.tune.trial import run_places

logger = logging.getLogger(__name__)

ENDED = ("TERMINATED", "ERROR")
CHECKPOINT_SECONDS = 20.0
"""How long a sweep that ends before its trials do waits for their checkpoints."""
WRITE_SECONDS = 10.0
"""Between two boards: each is a file on storage, written while trials wait for an answer."""


class LiveBoard(Callback):
    """Keeps what trials report and writes the leaderboard now and then; `write` does so at once."""

    def __init__(self, config: SweepConfig, manifest: DatasetManifest, budget: Budget) -> None:
        self._config = config
        self._manifest = manifest
        self._budget = budget
        self._trials: Sequence[Any] = ()
        self._histories: dict[str, list[dict[str, Any]]] = {}
        self._ended: set[str] | None = None
        """Trials that ended by themselves or by the scheduler: Tune says nothing of those that the budget ends."""
        self._since: dict[str, float] = {}
        """When each running trial started or last reported: what one takes that fails before a report counts too."""
        self._written = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        del iteration
        self._trials = trials  # an interruption may come before the first report
        if self._ended is None:
            self._ended = {trial.trial_id for trial in trials if trial.status in ENDED}
        if self._budget.used_up is not None:
            self.checkpoint_running()
            raise BudgetUsedUp(self._budget.used_up)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        del iteration, trials
        self._since[trial.trial_id] = time.monotonic()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        del iteration
        self._since[trial.trial_id] = time.monotonic()
        self._history_of(trial.trial_id).append(dict(result))
        self._look(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        del iteration
        if self._ended is not None:
            self._ended.add(trial.trial_id)
        self._look(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        del iteration
        self._count_failed(trial)
        self._look(trials)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        del iteration, trials
        self._count_failed(trial)

    def _count_failed(self, trial: Any) -> None:
        since = self._since.pop(trial.trial_id, None)
        if since is not None:
            self._budget.add(trial.trial_id, time.monotonic() - since)

    def _look(self, trials: list[Any]) -> None:
        self._trials = trials
        if time.monotonic() - self._written < WRITE_SECONDS:
            return
        with suppress(StorageError):  # the next one will do
            self.write("running")

    def write(self, status: str, trials: Sequence[Any] | None = None) -> dict[str, Any]:
        """Writes the board of these trials, by default those last seen, and returns it."""
        self._trials = self._trials if trials is None else trials
        board = leaderboard(
            self._config,
            self._manifest,
            [self._outcome(trial, status) for trial in self._trials if _has_begun(trial)],
            status,
            self._budget.as_record(),
            self._budget.cost_per_second,
        )
        write_board(self._config, self._manifest, board)
        self._written = time.monotonic()
        return board

    def checkpoint_running(self) -> None:
        """Asks the trials that run for a checkpoint, and waits for it a while."""
        running = [
            place
            for trial in self._trials
            if trial.status == "RUNNING"
            for place in run_places(self._config, trial.trial_id)
        ]
        with suppress(StorageError):  # they lose what they did since their last one
            running = [place for place in running if place.exists() and not is_complete(place)]
            before = {place: sound_steps(place / "checkpoints") for place in running}
            for place in running:
                (place / STOP_REQUEST).write_json({})
            deadline = time.monotonic() + CHECKPOINT_SECONDS
            while running and time.monotonic() < deadline:
                running = [place for place in running if sound_steps(place / "checkpoints") == before[place]]
                time.sleep(0.2)

    def _outcome(self, trial: Any, status: str) -> Outcome:
        has_ended = trial.status in ENDED
        unfinished = "budget" if has_ended or self._budget.used_up else "interruption"
        return Outcome(
            trial_id=trial.trial_id,
            parameters=dict(trial.config),
            metrics={} if trial.last_result is None else dict(trial.last_result),
            history=self._history_of(trial.trial_id),
            error=_error_of(trial) if trial.status == "ERROR" else None,
            is_running=not has_ended and status == "running",
            stopped_by="scheduler" if has_ended and trial.trial_id in (self._ended or ()) else unfinished,
            seconds=self._budget.seconds_of(trial.trial_id),
        )

    def _history_of(self, trial_id: str) -> list[dict[str, Any]]:
        """What the trial has reported, before the sweep was started again too."""
        if trial_id not in self._histories:
            self._histories[trial_id] = read_history(open_place(self._config.output), trial_id)
        return self._histories[trial_id]

    def get_state(self) -> dict[str, Any] | None:
        """Nothing that a sweep which goes on would need: its files have it."""
        return None


class ReleaseWorkers(Callback):
    """Gives back what is left of the Ray Train runs of trials that have ended (`train/leftovers.py`)."""

    def __init__(self, config: SweepConfig) -> None:
        self._config = config
        self._left: set[Place] = set()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        del iteration, trials
        self._left.update(run_places(self._config, trial.trial_id))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        del iteration, trials
        for place in list(self._left):
            with suppress(StorageError):  # it is asked again
                if is_released(place):
                    self._left.remove(place)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """Of all trials: those too that the end of the sweep has ended."""
        for place in [place for trial in trials for place in run_places(self._config, trial.trial_id)]:
            try:
                wait_until_released(place)
            except (TimeoutError, StorageError) as error:  # the sweep has its result
                logger.warning("%s", error)

    def get_state(self) -> dict[str, Any] | None:
        """Nothing that a sweep which goes on would need: a trial waits for what it had itself."""
        return None


def _has_begun(trial: Any) -> bool:
    """Whether it ever ran: one that waits to go on has reported."""
    return trial.status != "PENDING" or "step" in (trial.last_result or {})


def read_history(output: Place, trial_id: str) -> list[dict[str, Any]]:
    """The reports of a trial that Ray Tune has logged, oldest first."""
    try:
        return json_lines(output / "tune" / "trials" / trial_id / "result.json")
    except FileNotFoundError:
        return []


def read_histories(output: Place) -> dict[str, list[dict[str, Any]]]:
    """The same of every trial that has reported, by trial id; nothing where the sweep has not begun."""
    folder = output / "tune" / "trials"
    names = {name.split("/")[0] for name in folder.sizes(recursive=True) if name.endswith("/result.json")}
    found = {name: read_history(output, name) for name in sorted(names)}
    return {name: history for name, history in found.items() if history}


def _error_of(trial: Any) -> BaseException | str:
    try:
        error = trial.get_pickled_error()
    except Exception as unreadable:  # noqa: BLE001  # an error of a class that cannot be unpickled is one all the same
        error = unreadable
    return error or str(trial.get_error() or "the trial failed and left no reason")
