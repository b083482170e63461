"""From Ray Train's controller to Ray Tune: the validations of a trial that is a Ray Train run."""

from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback

from beats_ray.tune.trial import Reports


class ReportToTune(TuneReportCallback):
    """Reports each validation but the last as the trial's; other reports of the run stay in its own records."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train with what each worker reported, by rank; the first one's are of all workers."""
        first = metrics[0]
        is_last = first.get("step") == self._reports.config.train.steps  # which the trial reports when all is written
        if self._reports.choose_by in first and not is_last:
            super().after_report(run_context, [self._reports.of(int(first["step"]), first)], checkpoint)
