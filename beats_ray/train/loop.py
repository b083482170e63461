"""The training loop: fetch, prepare, forward, backward, step, log, validate, checkpoint.

One loop serves every task. A task turns a micro-batch into inputs and says how many targets they hold *before* the
forward pass, so that each worker's loss is divided by the number of targets of the whole global batch: the gradient
is that of the mean over all targets, however unevenly they fall on workers and micro-batches.

Everything random is drawn from generators that are seeded by (seed, step, place), never carried over, so a run that is
restored at a checkpoint goes on exactly as if it had not stopped.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import Place, with_retries
from beats_ray.train.checkpoint import ResumeCheckpoints
from beats_ray.train.context import WorkerContext
from beats_ray.train.engine import Engine
from beats_ray.train.faults import Notices, SkippedSteps, count_recoveries
from beats_ray.train.loggers import Logger
from beats_ray.train.meter import Meter
from beats_ray.train.metrics import MetricMeans, MetricsLog, MetricSums

HeldOut = Literal["validation", "test"]


@dataclass(frozen=True)
class Prepared:
    """Inputs of one forward pass, on the training device."""

    inputs: tuple[Any, ...]
    num_targets: torch.Tensor
    """How many terms the loss sums over, scalar."""
    clip_ids: tuple[str, ...] = ()


class Task(Protocol):
    """One training objective. `module(*inputs)` returns `(loss_sum, metrics)`: a scalar and (sum, count) pairs."""

    @property
    def module(self) -> nn.Module:
        """What the engine trains."""
        ...

    def depths(self) -> Mapping[str, int]:
        """Depth of each parameter, for layer-wise learning-rate decay."""
        ...

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        """The inputs for a micro-batch, which is on the training device already."""
        ...

    def publish(self, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes the published model made of these weights to a local folder."""
        ...


class BatchSource(Protocol):
    """Where micro-batches come from."""

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches on its device from step `first_step` on, in the order of the plan."""
        ...

    def held_out(self, part: HeldOut) -> Iterable[MicroBatch] | None:
        """This rank's part of the validation or test clips, each once; None where the run has none."""
        ...


def run_training(  # noqa: C901, PLR0912  # the whole order of a run, in one place
    task: Task,
    source: BatchSource,
    settings: TrainSettings,
    context: WorkerContext,
    output: Place,
    *,
    validate_every_steps: int | None = None,
    choose_by: str = "validation/accuracy",
    flops_per_clip: int = 0,
    build_loggers: Callable[[int], Sequence[Logger]] | None = None,
) -> dict[str, float]:
    """Trains `task` to `settings.steps` and publishes the model to `output/model`; resumes by itself.

    Returns the last reported metrics. Every worker calls it with the same arguments but its own `context` and `source`.
    choose_by: the metric whose best checkpoint stays on storage.
    flops_per_clip: model FLOPs of a clip in a training step, for `perf/mfu`; 0 leaves that metric out.
    build_loggers: gives the loggers of a run that goes on from a step; TensorBoard's where there is none.
    """
    torch.manual_seed(settings.seed)
    checkpoints = ResumeCheckpoints(
        output / "checkpoints", context, settings.keep_checkpoints, settings.storage_retry_seconds
    )
    recoveries = count_recoveries(output, context, settings.storage_retry_seconds)
    engine = Engine(task.module, settings, task.depths())
    first_step = checkpoints.restore(engine)
    batches = source.training(first_step)
    log = None
    if context.rank == 0:
        log = MetricsLog(output, first_step, build_loggers(first_step) if build_loggers else None)
    notices = Notices(output, context)
    skipped = SkippedSteps(output, settings.max_bad_steps, context)
    meter = Meter(settings, context, first_step, flops_per_clip)
    metrics: dict[str, float] = {}

    for step in range(first_step, settings.steps):
        _seed_dropout(settings.seed, step, context.rank)
        prepared = [
            _fetch(task, batches, settings, context, meter)
            for _ in range(settings.accumulation_steps(context.world_size))
        ]
        results = _train_step(engine, prepared, step, context)
        if results is not None:
            skipped.count = 0
            for sums in results:
                meter.add(sums)
        elif settings.precision != "fp16":  # whose loss scale is lowered by such steps
            skipped.record(step, [part.clip_ids for part in prepared])

        done = step + 1
        last = done == settings.steps
        validates = validate_every_steps is not None and (done % validate_every_steps == 0 or last)
        noticed = notices.new()
        saves = (done % settings.checkpoint_every_steps == 0 or noticed) and not last
        # With each checkpoint a report, or the next one would speak of other steps in a run that was resumed there.
        if done % settings.log_every_steps == 0 or last or validates or saves:
            metrics = meter.report(done, engine) | {
                "train/skipped_steps": skipped.total,
                "train/recoveries": recoveries,
                "perf/checkpoint_seconds": checkpoints.blocked_seconds,
            }
            if validates:
                metrics |= evaluate(task, engine, source, context, "validation")
            if last:
                metrics |= evaluate(task, engine, source, context, "test")
        reports = metrics.get("step") == done
        if log and reports:
            log.write(metrics)
        if saves:
            if log:  # first: a resumed run drops records beyond its checkpoint, but cannot invent missing ones
                with_retries(log.flush, settings.storage_retry_seconds)
            checkpoints.save(engine, done, metrics.get(choose_by) if validates else None)
            if noticed:  # there may be no next step
                checkpoints.wait()
        if reports and not last:
            context.report(done, metrics)

    notices.close()
    checkpoints.wait()
    publish(task, engine, context, output)
    if log:
        with_retries(log.close, settings.storage_retry_seconds)
    context.report(settings.steps, metrics)
    return metrics


def _train_step(engine: Engine, prepared: list[Prepared], step: int, context: WorkerContext) -> list[MetricSums] | None:
    """One optimizer step; the sums of its micro-batches, or None where it was skipped for what is no finite number."""
    num_targets = context.all_reduce(torch.stack([part.num_targets for part in prepared]).sum().double())
    results: list[MetricSums] = []
    for index, part in enumerate(prepared):
        loss_sum, sums = engine(*part.inputs)
        engine.backward(loss_sum / num_targets.clamp(min=1).to(loss_sum.dtype))
        moved = engine.step(step, last_micro_batch=index == len(prepared) - 1)
        results.append({"train/loss": (loss_sum, part.num_targets), **sums})
    return results if moved else None


def evaluate(
    task: Task, engine: Engine, source: BatchSource, context: WorkerContext, part: HeldOut
) -> dict[str, float]:
    """Metrics over all held-out clips, exact over workers; names begin with `validation/` or `test/`.

    Of the averaged weights, where `train.ema_decay` keeps them: those that are published.
    """
    clips = source.held_out(part)
    if clips is None:
        return {}
    means = MetricMeans()
    generator = torch.Generator(context.device)
    with engine.evaluating():
        for batch in clips:
            generator.manual_seed(0)
            prepared = task.prepare(batch, generator, training=False)
            loss_sum, sums = task.module(*prepared.inputs)
            means.add({"train/loss": (loss_sum, prepared.num_targets), **sums})
    return {name.replace("train/", f"{part}/", 1): value for name, value in means.reduce(context).items()}


def publish(task: Task, engine: Engine, context: WorkerContext, output: Place) -> None:
    """Writes the published model to `output/model`; every rank must call it."""
    state_dict = engine.full_state_dict()
    if context.rank == 0:
        with tempfile.TemporaryDirectory(prefix="beats-ray-publish-") as scratch:
            folder = Path(scratch) / "model"
            task.publish(state_dict, folder)
            (output / "model").upload(folder)
    context.gather(None)  # nobody goes on before the model is there


def _fetch(
    task: Task, batches: Iterator[MicroBatch], settings: TrainSettings, context: WorkerContext, meter: Meter
) -> Prepared:
    batch = next(batches)
    meter.fetched(batch)
    generator = torch.Generator(context.device).manual_seed(seed_of(settings.seed, batch.first_position))
    return replace(task.prepare(batch, generator, training=True), clip_ids=batch.clip_ids)


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; nearby numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(seed_of(seed, step, rank))
