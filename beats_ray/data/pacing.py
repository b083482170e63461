"""Keeps Ray Data's scheduling loop from turning at full speed while a stream is full.

The loop sleeps until a task has something to hand over. A task whose block may not be fetched yet, because the buffers
are full, has something all the time: while workers train, the coordinator of a stream would take a whole core.
"""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

PAUSE_SECONDS = 0.05
"""Between two looks of a loop that has nothing to do: short beside the time for which full buffers last."""


class PauseWhileFull(ExecutionCallback):
    """Sleeps after each round of the loop in which no task was started and no block fetched; Ray makes one a stream."""

    def __init__(self) -> None:
        self._done = 0
        self._round_began = time.perf_counter()

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray after each round."""
        counts = [operator.metrics for operator in executor._topology]
        done = sum(one.num_tasks_submitted + one.num_task_outputs_generated + one.num_tasks_finished for one in counts)
        # A round that has waited for its tasks was no busy one.
        if done == self._done and time.perf_counter() - self._round_began < PAUSE_SECONDS:
            time.sleep(PAUSE_SECONDS)
        self._done = done
        self._round_began = time.perf_counter()
