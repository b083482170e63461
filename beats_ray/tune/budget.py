"""What a sweep may take: minutes and money, over all its starts.

Time runs while the command does; money while trials hold their CPUs and GPUs. When one is used up, the trials that
run make a checkpoint and end; those that ran to their ends before are what the best is chosen from. With a larger
budget the same sweep goes on, as after any interruption.
"""

import time
from contextlib import suppress
from typing import Any

from ray.tune.stopper import Stopper

from beats_ray.config import ConfigError, SweepSettings
from beats_ray.data.storage import Place, StorageError
from beats_ray.tune.placement import TrialNeeds

BUDGET_FILE = "budget.json"
WRITE_SECONDS = 10.0
CPU_PEAK_FLOPS = 2e11
"""More than a core computes in fp32: two 16-wide fused multiply-adds a cycle at 3 GHz."""
GPU_PEAK_FLOPS = 2.5e15
"""More than a GPU computes in dense bf16 (B200)."""


class BudgetUsedUp(Exception):
    """Ends a sweep in mid-run. Tune keeps the trials as it last saved them, under way."""


class Budget(Stopper):
    """Counts as Tune's stopper, which it stops nobody as.

    What the sweep has taken is in `budget.json`, from where another start goes on counting.
    """

    def __init__(self, sweep: SweepSettings, needs: TrialNeeds, output: Place) -> None:
        self._sweep = sweep
        self._needs = needs
        self._file = output / BUDGET_FILE
        found = self._read()
        self._seconds_before = float(found.get("seconds", 0.0))
        self._trial_seconds: dict[str, float] = dict(found.get("trial_seconds", {}))
        self._started = time.monotonic()
        self._written = self._started

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result.get("done"):  # Tune shows the last report again when a trial has ended
            return False
        # The sum of what each report took: `time_total_s` begins anew with a trial that goes on after an interruption.
        self.add(trial_id, float(result.get("time_this_iter_s", 0.0)))
        return False

    def add(self, trial_id: str, seconds: float) -> None:
        """A trial has run for so long beyond what was counted."""
        self._trial_seconds[trial_id] = self.seconds_of(trial_id) + seconds
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def stop_all(self) -> bool:
        return False

    @property
    def seconds(self) -> float:
        """That the command has run, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    def seconds_of(self, trial_id: str) -> float:
        """That a trial has run, up to its last report or failure, over all starts of the sweep."""
        return self._trial_seconds.get(trial_id, 0.0)

    @property
    def cost_per_second(self) -> float:
        """Of one trial."""
        return cost_of(self._sweep, self._needs, 1.0)

    @property
    def cost(self) -> float:
        """Of all trials so far."""
        return self.cost_per_second * sum(self._trial_seconds.values())

    @property
    def used_up(self) -> str | None:
        """The field whose budget is used up; None while there is some left."""
        if self._sweep.max_minutes is not None and self.seconds / 60 >= self._sweep.max_minutes:
            return "sweep.max_minutes"
        if self._sweep.max_cost is not None and self.cost >= self._sweep.max_cost:
            return "sweep.max_cost"
        return None

    def as_record(self) -> dict[str, Any]:
        """For the leaderboard."""
        return {"minutes": self.seconds / 60, "cost": self.cost, "used_up": self.used_up}

    def write(self) -> None:
        """Puts down what was taken so far."""
        self._written = time.monotonic()
        with suppress(StorageError):  # a little that is forgotten ends no sweep
            self._file.write_json({"seconds": self.seconds, "trial_seconds": self._trial_seconds})

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._file.read_json()
        except FileNotFoundError:
            return {}
        return found


def cost_of(sweep: SweepSettings, needs: TrialNeeds, seconds: float) -> float:
    """What a trial costs that holds its resources for so long."""
    return seconds / 3600 * (needs.gpus * sweep.price_per_gpu_hour + needs.cpus * sweep.price_per_cpu_hour)


def check_budget(sweep: SweepSettings, needs: TrialNeeds, trial_flops: float) -> None:
    """ConfigError where not even one trial fits, whatever the machine. trial_flops: model FLOPs of all its runs.

    That is certain, not likely: by the arithmetic alone, at a rate that no machine reaches.
    """
    rate = needs.gpus * GPU_PEAK_FLOPS or needs.num_workers * max(1.0, needs.worker["CPU"]) * CPU_PEAK_FLOPS
    seconds = trial_flops / rate
    advice = "raise it, or lower finetune.train.steps or sweep.repeats"
    if sweep.max_minutes is not None and seconds / 60 > sweep.max_minutes:
        raise ConfigError(
            f"sweep.max_minutes={sweep.max_minutes:g}: a trial takes at least {seconds / 60:.2g} minutes for its "
            f"{trial_flops / 1e15:.2g} PFLOP; {advice}"
        )
    cost = cost_of(sweep, needs, seconds)
    if sweep.max_cost is not None and cost > sweep.max_cost:
        raise ConfigError(f"sweep.max_cost={sweep.max_cost:g}: a trial costs at least {cost:.2g}; {advice}")
