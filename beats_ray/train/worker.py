"""What runs inside a training process: the run's task, its batches, and the loop."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from beats_ray.config import fingerprint
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import open_place, with_retries
from beats_ray.inference import load_published
from beats_ray.models import describe_model
from beats_ray.train.checks import run_identity, training_folds
from beats_ray.train.context import WorkerContext, ray_train_context, single_process_context
from beats_ray.train.faults import explained
from beats_ray.train.flops import step_flops_per_clip
from beats_ray.train.jobs import Run
from beats_ray.train.loggers import Logger, build_loggers, flat_settings
from beats_ray.train.loop import BatchSource, HeldOut, Task, run_training


def train(run: Run, context: WorkerContext | None = None) -> dict[str, float]:
    """Runs this worker's part of `run`; the context is Ray Train's unless given."""
    context = context or ray_train_context()
    task, published = _build_seeded(run)
    source: BatchSource = CachedBatches(run, context) if run.cache is not None else StreamedBatches(run, context)
    validate_every = run.config.validate_every_steps if run.kind == "finetune" else None
    flops = step_flops_per_clip(run.kind, run.config, published, len(run.manifest.label_names))
    with explained(run.train, context):
        return run_training(
            task, source, run.train, context, run.output,
            validate_every_steps=validate_every, flops_per_clip=flops, build_loggers=partial(_build_loggers, run),
        )  # fmt: skip


def train_trial(run: Run, report: Callable[[dict[str, float]], None]) -> None:
    """A Tune trial's run, alone in its process: every validation is reported to Tune with its number."""

    def report_validations(step: int, metrics: dict[str, float]) -> None:
        if "validation/accuracy" in metrics:
            report({**metrics, "validations": -(-step // run.config.validate_every_steps)})

    train(run, single_process_context(report_validations, run.train.use_gpu))


def _build_loggers(run: Run, resumed_step: int) -> list[Logger]:
    identity = fingerprint(run_identity(run.config) | {"output": run.output.uri})
    name = "/".join(run.output.uri.rstrip("/").rsplit("/", 2)[-2:])
    return build_loggers(run.train.loggers, run.output, name, identity, flat_settings(run.config), resumed_step)


def _build_seeded(run: Run) -> tuple[Task, dict[str, Any]]:
    """As `build_task`, tried again while storage fails; every try begins with the run's initial weights."""

    def build() -> tuple[Task, dict[str, Any]]:
        torch.manual_seed(run.train.seed)
        return build_task(run)

    return with_retries(build, run.train.storage_retry_seconds)


def build_task(run: Run) -> tuple[Task, dict[str, Any]]:
    """The task object of a run, and the description of the published model it starts from, fetched from storage."""
    config = run.config
    if run.kind == "pretrain":
        from beats_ray.train.pretrain import PretrainTask, num_codes_of

        tokenizer: Any = load_published(open_place(config.tokenizer))
        task = PretrainTask(config, num_codes_of(tokenizer), None if config.labels else tokenizer)
        return task, describe_model(tokenizer)
    if run.kind == "distill":
        from beats_ray.train.distill import DistillTask

        teacher: Any = load_published(open_place(config.teacher))
        return DistillTask(config, teacher), describe_model(teacher)
    from beats_ray.train.finetune import FinetuneTask

    encoder: Any = load_published(open_place(config.encoder))
    return FinetuneTask(config, encoder, run.manifest), describe_model(encoder)


class StreamedBatches:
    """Batches of Ray Data's stream; this worker's share of it comes from Ray Train."""

    def __init__(self, run: Run, context: WorkerContext) -> None:
        self._run = run
        self._context = context

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        import ray.train

        from beats_ray.data.batches import iterate_micro_batches
        from beats_ray.data.stream import bucket_samples_of

        settings = self._run.train
        return iterate_micro_batches(
            ray.train.get_dataset_shard("train"),
            micro_batch_size=settings.micro_batch_size,
            prefetch_blocks=self._run.data.prefetch_blocks,
            first_step=first_step,
            stop_step=settings.steps,
            global_batch_size=settings.global_batch_size,
            rank=self._context.rank,
            world_size=self._context.world_size,
            bucket_samples=bucket_samples_of(self._run.data),
            device=self._context.device,
        )

    def held_out(self, part: HeldOut) -> Iterable[MicroBatch] | None:
        return None


class CachedBatches:
    """Batches of clips that lie decoded in the object store."""

    def __init__(self, run: Run, context: WorkerContext) -> None:
        self._run = run
        self._context = context

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        settings = self._run.train
        batches: Iterator[MicroBatch] = self._run.cache.batches(
            folds=training_folds(self._run.config, self._run.manifest),
            seed=settings.seed,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            start_step=first_step,
            stop_step=settings.steps,
            rank=self._context.rank,
            world_size=self._context.world_size,
        )
        return batches

    def held_out(self, part: HeldOut) -> Iterable[MicroBatch] | None:
        folds = self._run.config.folds
        fold = folds.validation_fold if part == "validation" else folds.test_fold
        if fold == -1:
            return None
        batches: Iterable[MicroBatch] = self._run.cache.eval_batches(
            folds=(fold,),
            micro_batch_size=self._run.train.micro_batch_size,
            rank=self._context.rank,
            world_size=self._context.world_size,
        )
        return batches
