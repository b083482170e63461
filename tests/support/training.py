"""A real engine on batches of synthetic sound: one small pre-training run, in one process or several."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from beats_ray.data.batches import MicroBatch, to_micro_batch
from beats_ray.data.lanes import Dealing
from beats_ray.data.storage import open_place
from beats_ray.train.checkpoint import THREAD_NAME
from beats_ray.train.context import WorkerContext
from beats_ray.train.faults import explained
from beats_ray.train.loop import Prepared, Task, run_training
from tests.support.tasks import TASKS

ROOT = Path(__file__).parents[2]
CLIPS, SAMPLES = 24, 16_000


class SyntheticBatches:
    """Noise clips of different lengths, in the order of their positions, as a BatchSource.

    held_out_batches: of all ranks together, dealt out one by one; the last has one clip fewer.
    """

    def __init__(
        self, micro_batch_size: int, clips_per_step: int, rank: int = 0, world_size: int = 1, held_out_batches: int = 0
    ) -> None:
        rng = np.random.default_rng(0)
        self._audio = (rng.normal(size=(CLIPS, SAMPLES)) * 3000).astype(np.int16)
        self._lengths = rng.integers(SAMPLES // 4, SAMPLES + 1, CLIPS)
        self._micro_batch_size = micro_batch_size
        self._clips_per_step = clips_per_step
        self._rank, self._world_size = rank, world_size
        self._held_out_batches = held_out_batches

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        size = self._micro_batch_size
        dealing = Dealing(self._clips_per_step, size, self._world_size)
        for index in itertools.count():
            _, start = dealing.micro_batch(first_step, index, self._rank)
            yield self._batch(np.arange(start, start + size))

    def held_out(self, part: str) -> Iterable[MicroBatch] | None:
        if not self._held_out_batches:
            return None
        size, end = self._micro_batch_size, self._held_out_batches * self._micro_batch_size - 1
        starts = range(self._rank * size, end, self._world_size * size)
        return (self._batch(np.arange(start, min(start + size, end))) for start in starts)

    def _batch(self, positions: np.ndarray) -> MicroBatch:
        index = positions % CLIPS
        audio = self._audio[index].copy()
        for row, length in enumerate(self._lengths[index]):
            audio[row, length:] = 0
        return to_micro_batch(
            {
                "audio": audio,
                "num_samples": self._lengths[index],
                "targets": np.eye(3, dtype=np.uint8)[index % 3],
                "position": positions,
                "clip_id": np.array([f"clip-{i}" for i in index]),
            }
        )


class Pretraining:
    """A small run, of pre-training unless another task is named, to be called again and again with other settings."""

    def run(
        self,
        output: Path,
        report: Callable[[int, dict[str, float]], None] | None = None,
        *,
        poisoned_step: int | None = None,
        ranks: tuple[int, int] = (0, 1),
        seen: list[float] | None = None,
        kind: str = "pretrain",
        held_out_batches: int = 0,
        **train: object,
    ) -> list[float]:
        """Trains and returns the loss of every step that ran; NaN for a step that was left out.

        poisoned_step: the 0-based step whose first micro-batch gives a loss that is no number. ranks: this process's
        rank and the number of processes, whose group is there already. seen: where losses are collected, for a run
        that is interrupted. kind: a name of `TASKS`. held_out_batches: see
        `SyntheticBatches`.
        """
        fields = {"steps": 10, "warmup_steps": 2, "global_batch_size": 4, "micro_batch_size": 4, "log_every_steps": 1}
        fields |= {"epsilon": 1e-8, "zero_stage": 1, "learning_rate": 1e-3}
        losses = [] if seen is None else seen

        def record(step: int, metrics: dict[str, float]) -> None:
            losses.append(metrics.get("train/loss", math.nan))
            if report is not None:
                report(step, metrics)

        torch.manual_seed(int(str(train.get("seed", 0))))
        task, settings = TASKS[kind](fields | train)
        if poisoned_step is not None:
            _poison(task, poisoned_step * settings.train.global_batch_size)
        source = SyntheticBatches(
            settings.train.micro_batch_size, settings.train.global_batch_size, *ranks, held_out_batches
        )
        context = WorkerContext(*ranks, torch.device("cpu"), record)
        try:
            with explained(settings.train, context):
                run_training(task, source, settings.train, context, open_place(str(output)))
        finally:
            wait_for_uploads()  # where a test interrupts a run, its last checkpoint is whole
        return losses


def wait_for_uploads() -> None:
    """Returns when the checkpoints that runs of this process have begun are whole."""
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join()


def _poison(task: Task, position: int) -> None:
    """Makes the filterbank of the micro-batch that begins at a position no number."""
    prepare = task.prepare

    def poisoned(batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        prepared = prepare(batch, generator, training)
        if batch.first_position == position:
            prepared.inputs[0].fill_(math.nan)
        return prepared

    task.prepare = poisoned  # type: ignore[method-assign]


# --- several processes ------------------------------------------------------------------------------------------------


def run_group(
    folder: Path, world_size: int, runs: list[dict[str, Any]], timeout_seconds: float = 1800.0
) -> list[list[float]]:
    """The losses of runs, one after the other, of a new group of so many processes.

    runs: keyword arguments of `Pretraining.run` with `name`, below `folder`; `stop` ends a run after so many steps.
    """
    results = folder / f"losses-{uuid.uuid4().hex}.json"
    with group(folder, world_size, runs, results, timeout_seconds) as processes:
        statuses = [process.wait(timeout=300) for process in processes]
    assert statuses == [0] * world_size, statuses
    losses: list[list[float]] = json.loads(results.read_text())
    return losses


@contextlib.contextmanager
def group(
    folder: Path, world_size: int, runs: list[dict[str, Any]], results: Path, timeout_seconds: float = 1800.0
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of such a group, which are gone after the block.

    `hang` among a run's arguments: the step after whose report the last process stops for good. timeout_seconds: of a
    collective operation.
    """
    store = folder / f"store-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "tests.support.training", str(store), str(results), json.dumps(runs)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(timeout_seconds)],
            cwd=ROOT, env=os.environ | {"LOCAL_RANK": "0"}, stderr=subprocess.PIPE if timeout_seconds < 60 else None,
            text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Stopped(Exception):
    """The run has come as far as was asked for."""


def _observer(rank: int, stop: int | None, hang: int | None) -> Callable[[int, dict[str, float]], None]:
    def report(done: int, _metrics: dict[str, float]) -> None:
        if done == stop:
            raise Stopped
        if done == hang and rank > 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    return report


def _take_part(store: str, results: str, runs: str, rank: int, world_size: int, timeout_seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )  # fmt: skip
    losses: list[list[float]] = []
    for run in json.loads(runs):
        name, stop, hang = run.pop("name"), run.pop("stop", None), run.pop("hang", None)
        seen: list[float] = []
        with contextlib.suppress(Stopped):
            Pretraining().run(
                Path(results).parent / name, _observer(rank, stop, hang), ranks=(rank, world_size), seen=seen, **run
            )
        losses.append(seen)
    if rank == 0:
        Path(results).write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    _take_part(*sys.argv[1:4], *map(int, sys.argv[4:6]), float(sys.argv[6]))  # type: ignore[call-arg]
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort a process that ends while another one still leaves the group
