"""The training loop: forward, backward, fetch and prepare what comes next, step, log, validate, checkpoint.

One loop serves every task. A task turns a micro-batch into inputs and says how many targets they hold *before* the
forward pass, so that each worker's loss is divided by the number of targets of the whole global batch: the gradient
is that of the mean over all targets, however unevenly they fall on workers and micro-batches.

Everything random is drawn from generators that are seeded by (seed, step, place), never carried over, so a run that is
restored at a checkpoint goes on exactly as if it had not stopped.
"""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import nn

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import Place, with_retries
from beats_ray.train.checkpoint import ResumeCheckpoints
from beats_ray.train.context import WorkerContext
from beats_ray.train.engine import Engine
from beats_ray.train.faults import Notices, SkippedSteps, count_recoveries, is_bad_step
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

    def frozen_steps(self) -> Mapping[str, int]:
        """First optimizer steps in which a parameter stays as it is, where there are any."""
        ...

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step (0-based), when its micro-batches are prepared already."""
        ...

    def end_step(self, moved: bool) -> None:
        """Called after each optimizer step, alike on all workers: for state of the module that no gradient moves.

        moved: whether the weights moved; of a step that was left out nothing may stay.
        """
        ...

    @property
    def can_resume(self) -> bool:
        """Whether a checkpoint may follow: parameters and buffers are all the state there is. Alike on all workers."""
        ...

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        """The inputs for a micro-batch, which is on the training device already.

        They depend on nothing that a step changes: those of the next step are made before this one ends.
        """
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


def run_training(  # noqa: C901, PLR0912, PLR0915  # the whole order of a run, in one place
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
    engine = Engine(task.module, settings, task.depths(), task.frozen_steps())
    first_step = checkpoints.restore(engine)
    with contextlib.ExitStack() as running:
        batches = source.training(first_step)
        if isinstance(batches, Generator):
            running.callback(batches.close)
        log = None
        if context.rank == 0:
            loggers = build_loggers(first_step) if build_loggers else None
            log = running.enter_context(MetricsLog(output, first_step, loggers, settings.storage_retry_seconds))
        notices = running.enter_context(contextlib.closing(Notices(output, context)))
        skipped = SkippedSteps(output, settings, context, first_step)
        meter = Meter(settings, context, first_step, flops_per_clip)
        # Those of a run that had only to publish its model are on record already.
        metrics: dict[str, float] = (
            context.gather(log.newest if log else None)[0] if first_step == settings.steps else {}
        )

        ahead = _Ahead(task, batches, settings, context, meter)
        for step in range(first_step, settings.steps):
            prepared = ahead.take()
            _begin_step(task, settings.seed, step, context.rank)
            look_due = notices.due()
            prepare_next = ahead.prepare if step + 1 < settings.steps else None
            results, is_bad, look_due = _train_step(engine, prepared, step, context, look_due, prepare_next)
            task.end_step(moved=results is not None)
            if results is not None:
                skipped.count = 0
                for sums in results:
                    meter.add(sums)
            elif is_bad:
                skipped.record(step, [part.clip_ids for part in prepared])

            done = step + 1
            last = done == settings.steps
            validates = validate_every_steps is not None and (done % validate_every_steps == 0 or last)
            noticed = notices.new(look_due)
            saves = task.can_resume and _saves(settings, done, noticed)
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

        checkpoints.wait()
        publish(task, engine, context, output, settings.storage_retry_seconds)
        if log:
            with_retries(log.close, settings.storage_retry_seconds)
    context.report(settings.steps, metrics)
    return metrics


def _saves(settings: TrainSettings, done: int, noticed: bool) -> bool:
    """Whether a checkpoint follows step `done`.

    The last step makes one too, in a run that makes any: when publishing the model fails, for as long as the store is
    away or because a worker is lost, what is left to do again is to publish it.
    """
    last = done == settings.steps
    if settings.steps <= settings.checkpoint_every_steps:
        return noticed and not last
    return last or noticed or done % settings.checkpoint_every_steps == 0


@dataclass
class _Ahead:
    """The micro-batches of one step after the other, those of the next prepared while the device computes this one."""

    task: Task
    batches: Iterator[MicroBatch]
    settings: TrainSettings
    context: WorkerContext
    meter: Meter
    _coming: list[Prepared] = field(default_factory=list)
    _error: Exception | None = None

    def take(self) -> list[Prepared]:
        """Those of the step that begins."""
        if not self._coming and self._error is None:
            self.prepare()
        if self._error is not None:
            raise self._error
        coming, self._coming = self._coming, []
        return coming

    def prepare(self) -> None:
        """Fetches and prepares those that come next; what goes wrong `take` raises, when the step before is whole."""
        count = self.settings.accumulation_steps(self.context.world_size)
        try:
            self._coming = [self._prepare_one() for _ in range(count)]
        except Exception as error:  # noqa: BLE001  # it is raised
            self._error = error

    def _prepare_one(self) -> Prepared:
        batch = next(self.batches)
        self.meter.fetched(batch)
        if self.settings.compile:  # a compiled step has one shape, however much of it is padding
            batch = replace(batch, host_num_samples_B=None)
        seed = seed_of(self.settings.seed, batch.first_position)
        generator = torch.Generator(self.context.device).manual_seed(seed)
        return replace(self.task.prepare(batch, generator, training=True), clip_ids=batch.clip_ids)


def _train_step(
    engine: Engine,
    prepared: list[Prepared],
    step: int,
    context: WorkerContext,
    look_due: bool,
    prepare_next: Callable[[], None] | None,
) -> tuple[list[MetricSums] | None, bool, bool]:
    """One optimizer step: its micro-batches' sums, or None where it was left out; and whether it was a bad one.

    The last result is whether `look_due` is true on any worker.
    """
    scale_can_fall = engine.loss_scale_can_fall
    num_targets = torch.stack([part.num_targets for part in prepared]).sum().double()
    num_targets, looks_due = context.all_reduce(
        torch.stack([num_targets, torch.full_like(num_targets, float(look_due))])  # filled there, without a wait
    ).unbind()
    results: list[MetricSums] = []
    moved = False
    for index, part in enumerate(prepared):
        loss_sum, sums = engine(*part.inputs)
        engine.backward(loss_sum / num_targets.clamp(min=1).to(loss_sum.dtype))
        last = index == len(prepared) - 1
        prepared[index] = replace(part, inputs=())  # the next step's come into their memory
        if last and prepare_next:  # the device has work to do, and the engine is about to wait for it
            prepare_next()
        moved = engine.step(step, last_micro_batch=last)
        results.append({"train/loss": (loss_sum, part.num_targets), **sums})
    # The engine has just waited for the device, to know whether the gradient is finite: this costs no further wait.
    is_due = bool(looks_due > 0)
    if moved:
        return results, False, is_due
    return None, is_bad_step(_losses_are_finite(results, context), scale_can_fall), is_due


def _losses_are_finite(results: list[MetricSums], context: WorkerContext) -> bool:
    """Of all micro-batches of a step, on all workers; the host waits for the device here."""
    loss_sums = [cast("tuple[torch.Tensor, torch.Tensor]", sums["train/loss"])[0] for sums in results]
    return all(context.gather(all(bool(loss_sum.isfinite()) for loss_sum in loss_sums)))


def evaluate(
    task: Task, engine: Engine, source: BatchSource, context: WorkerContext, part: HeldOut
) -> dict[str, float]:
    """Metrics over all held-out clips, exact over workers; names begin with `validation/` or `test/`.

    Of the averaged weights where there are any (`train.ema_decay`, `train.average_last`): those that are published.
    """
    clips = source.held_out(part)
    if clips is None:
        return {}
    means = MetricMeans()
    generator = torch.Generator(context.device)
    shared = _in_step(clips, context) if engine.forward_is_collective else ((batch, True) for batch in clips)
    with engine.evaluating():
        for batch, counts in shared:
            generator.manual_seed(0)
            prepared = task.prepare(batch, generator, training=False)
            loss_sum, sums = task.module(*prepared.inputs)
            if counts:
                means.add({"train/loss": (loss_sum, prepared.num_targets), **sums})
    return {name.replace("train/", f"{part}/", 1): value for name, value in means.reduce(context).items()}


def _in_step(batches: Iterable[MicroBatch], context: WorkerContext) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's batches, and more until every rank has had as many as the one with most; False marks those.

    Workers share clips out unevenly, and one that has no batch left must still take part in the others' forward passes.
    """
    remaining = iter(batches)
    spare: MicroBatch | None = None
    batch = next(remaining, None)
    while any(has_batch := context.gather(batch is not None)):
        if spare is None and not all(has_batch):  # a clip of another worker's: some may have none of their own
            giver = has_batch.index(True)
            own = batch.first(1).to("cpu") if batch is not None and context.rank == giver else None
            spare = context.gather(own)[giver].to(context.device)
        if batch is not None:
            yield batch, True
        elif spare is not None:
            yield spare, False
        batch = next(remaining, None)


def publish(task: Task, engine: Engine, context: WorkerContext, output: Place, retry_seconds: float = 0.0) -> None:
    """Writes the published model to `output/model`; every rank must call it."""
    state_dict = engine.full_state_dict()
    if context.rank == 0:
        with tempfile.TemporaryDirectory(prefix="beats-ray-publish-") as scratch:
            folder = Path(scratch) / "model"
            task.publish(state_dict, folder)
            with_retries(partial((output / "model").upload, folder), retry_seconds)
    context.gather(None)  # nobody goes on before the model is there


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; nearby numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _begin_step(task: Task, seed: int, step: int, rank: int) -> None:
    """Seeds what draws from PyTorch's own generator, dropout and layer drop, and tells the task."""
    torch.manual_seed(seed_of(seed, step, rank))
    task.begin_step(step)
