"""What becomes of a run whose workers fail: judged in Ray Train's controller, where every worker's error arrives.

A mistake of the user's ends the run at once and in its own words, whichever worker met it: another attempt would end
alike. Anything else (a worker that is gone, a store that was away for too long) costs one of `train.max_failures`, and
all of those are there again as soon as a newer checkpoint is committed: a run of weeks may lose a worker every day.
Ray Train counts failures over the whole run, so its own count is turned off.

The controller is a process of its own: this imports no torch.
"""

import logging
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray.exceptions
import ray.train

from beats_ray.config import TrainSettings
from beats_ray.data.storage import Place, StorageError, with_retries
from beats_ray.errors import UserError, find_user_error
from beats_ray.train.committed import newest_sound_step

logger = logging.getLogger(__name__)


class RunFailed(Exception):
    """The workers failed too often without any progress; the message has the last failure with its trace."""


def failure_rules(checkpoints: Place, settings: TrainSettings) -> dict[str, Any]:
    """What Ray Train's RunConfig says about failures; the budget's count stands in place of Ray's."""
    budget = FailureBudget(checkpoints, settings.max_failures, settings.storage_retry_seconds)
    return {"failure_config": ray.train.FailureConfig(max_failures=-1), "callbacks": [budget]}


class FailureBudget(ray.train.UserCallback):
    """Ends a run for a user's mistake on any worker, or for more than `max_failures` failures without progress.

    What it raises ends the run; `ended_in_its_own_words` gives it to the driver. retry_seconds: how long the look at
    `checkpoints` is tried again while the object store fails.
    """

    def __init__(self, checkpoints: Place, max_failures: int, retry_seconds: float) -> None:
        self._checkpoints = checkpoints
        self._max_failures = max_failures
        self._retry_seconds = retry_seconds
        self._failures = 0
        self._newest_step = 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called by Ray Train with each failed worker's error, by rank, before it makes another attempt."""
        del run_context
        mistakes = [find_user_error(worker_exceptions[rank]) for rank in sorted(worker_exceptions)]
        mistake = next((found for found in mistakes if found and not _may_pass(found)), None)
        if mistake is not None:
            raise mistake
        if any(_was_announced(error) for error in worker_exceptions.values()):
            return
        self._count()
        if self._failures > self._max_failures:
            raise next((found for found in mistakes if found), None) or RunFailed(self._verdict(worker_exceptions))

    def _count(self) -> None:
        try:
            newest = with_retries(partial(newest_sound_step, self._checkpoints), self._retry_seconds)
        except StorageError as error:
            logger.warning("no look at the checkpoints, so the failure counts as one without progress: %s", error)
            newest = self._newest_step
        self._failures = 1 if newest > self._newest_step else self._failures + 1
        self._newest_step = newest

    def _verdict(self, worker_exceptions: Mapping[int, Exception]) -> str:
        rank = min(worker_exceptions)
        trace = "".join(traceback.format_exception(worker_exceptions[rank]))
        return (
            f"train.max_failures={self._max_failures}: the workers failed {self._failures} times without a checkpoint "
            f"newer than that of step {self._newest_step}; the same command goes on from there once the cause is gone. "
            f"The last failure, of worker {rank}:\n{trace}"
        )


class ended_in_its_own_words:
    """Raises what ended a run in Ray Train's controller, `FailureBudget`'s verdict for one, without Ray's wrapping."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ray.train.ControllerError):
            raise error.controller_failure from None


def _may_pass(mistake: UserError) -> bool:
    """A store that is away is nothing the user did, even where it stayed away for longer than it was waited for."""
    return isinstance(mistake, StorageError) and mistake.passing


def _was_announced(error: Exception) -> bool:
    """The worker's node had been drained: Ray Train has a count of its own for these, without a limit."""
    lost = getattr(error, "health_check_failure", error)
    return isinstance(lost, ray.exceptions.RayActorError) and bool(lost.preempted)
