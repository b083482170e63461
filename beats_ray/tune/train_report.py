"""From Ray Train's controller to the trial that has started it: the validations of a run."""

from typing import Any

from ray.train import UserCallback
from ray.util.queue import Queue

from beats_ray.tune.trial import Reports


class ReportToTrial(UserCallback):
    """Hands each validation but the last to the trial's process; other reports of the run stay in its own records.

    The trial's process reports it to Tune (`trial.py`), with a checkpoint where members of a population exchange them;
    Ray's own callback can hand over no such thing. The run waits while the last validation but one has not been taken.
    """

    def __init__(self, queue: Queue, reports: Reports) -> None:
        self._queue = queue
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train with what each worker reported, by rank; the first one's are of all workers."""
        del run_context, checkpoint
        first = metrics[0]
        is_last = first.get("step") == self._reports.config.train.steps  # which the trial reports when all is written
        if self._reports.choose_by in first and not is_last:
            self._queue.put((int(first["step"]), first))
