"""What runs inside a training process: the run's task, its batches, and the loop."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch

from beats_ray.config import fingerprint
from beats_ray.data.batches import MicroBatch, read_ahead
from beats_ray.data.parts import ClipPart, count_clips
from beats_ray.data.storage import open_place, with_retries
from beats_ray.inference import load_published
from beats_ray.models import describe_model
from beats_ray.telemetry import run_name
from beats_ray.train.checks import training_part
from beats_ray.train.context import WorkerContext, ray_train_context, single_process_context
from beats_ray.train.faults import STOP_REQUEST, explained
from beats_ray.train.flops import step_flops_per_clip
from beats_ray.train.jobs import Run
from beats_ray.train.loggers import Logger, build_loggers, flat_settings
from beats_ray.train.loop import BatchSource, HeldOut, Task, run_training


def train(
    run: Run, context: WorkerContext | None = None, share: Callable[[str], Any] | None = None
) -> dict[str, float]:
    """Runs this worker's part of `run`; the context, and its share of a stream, are Ray Train's unless given."""
    context = context or ray_train_context()
    task, published = _build_seeded(run)
    is_cached = run.cache is not None
    source: BatchSource = CachedBatches(run, context) if is_cached else StreamedBatches(run, context, share)
    validate_every = run.config.validate_every_steps if run.kind == "finetune" else None
    flops = step_flops_per_clip(run.kind, run.config, published, len(run.manifest.label_names))
    with explained(run.train, context):
        return run_training(
            task, source, run.train, context, run.output,
            validate_every_steps=validate_every, choose_by=run.choose_by, flops_per_clip=flops,
            build_loggers=partial(_build_loggers, run),
        )  # fmt: skip


def train_trial(run: Run, report: Callable[[int, dict[str, float]], None], gpu_share: float = 1.0) -> None:
    """A Tune trial's run, alone in its process: `report(step, metrics)` gets every validation."""

    def report_validations(step: int, metrics: dict[str, float]) -> None:
        if run.choose_by in metrics:
            report(step, metrics)

    with_retries((run.output / STOP_REQUEST).delete, run.train.storage_retry_seconds)  # of an earlier Ctrl-C
    train(run, single_process_context(report_validations, run.train.use_gpu, gpu_share))


def _build_loggers(run: Run, resumed_step: int) -> list[Logger]:
    identity = fingerprint(run.identity | {"output": run.output.uri})
    name, settings = run_name(run.output.uri), flat_settings(run.config)
    return build_loggers(run.train.loggers, run.output, name, identity, settings, resumed_step)


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
        from beats_ray.train.pretrain import PretrainTask, build_random_projection, num_codebooks_of, num_codes_of

        tokenizer: Any = (
            load_published(open_place(config.tokenizer))
            if config.tokenizer
            else build_random_projection(config.random_projection)
        )
        on_the_fly = None if config.labels else tokenizer
        initial: Any = load_published(open_place(config.initial)) if config.initial else None
        task = PretrainTask(config, num_codes_of(tokenizer), on_the_fly, initial, num_codebooks_of(tokenizer))
        return task, describe_model(tokenizer)
    if run.kind == "distill":
        from beats_ray.train.distill import DistillTask

        teacher: Any = load_published(open_place(config.teacher))
        return DistillTask(config, teacher), describe_model(teacher)
    from beats_ray.train.finetune import FinetuneTask
    from beats_ray.train.provenance import describe_data

    encoder: Any = load_published(open_place(config.encoder))
    trained_on = describe_data(config, run.manifest)
    return FinetuneTask(config, encoder, run.manifest, trained_on), describe_model(encoder)


class StreamedBatches:
    """Batches of Ray Data's streams; this worker's share of them comes from Ray Train."""

    def __init__(self, run: Run, context: WorkerContext, share: Callable[[str], Any] | None = None) -> None:
        """share: gives this worker's share of a stream by name: one of `training_streams`, `validation` or `test`."""
        self._run = run
        self._context = context
        self._share = share or _share_of_ray_train
        self._held_out: dict[HeldOut, tuple[Any, int]] = {}

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        from beats_ray.data.batches import iterate_micro_batches
        from beats_ray.data.lanes import Dealing
        from beats_ray.data.stream import bucket_samples_of, training_streams

        settings = self._run.train
        context, num_lanes = self._context, self._run.data.streams
        dealing = Dealing(settings.global_batch_size, settings.micro_batch_size, context.world_size, num_lanes)
        shares = [self._share(name) for name in training_streams(num_lanes)]  # all workers must ask for all of them
        return iterate_micro_batches(
            [shares[lane] for lane in dealing.lanes_of(context.rank)],
            dealing,
            context.rank,
            self._run.data.prefetch_blocks,
            first_step=first_step,
            stop_step=settings.steps,
            bucket_samples=bucket_samples_of(self._run.data),
            device=self._context.device,
        )

    def held_out(self, part: HeldOut) -> Iterable[MicroBatch] | None:
        from beats_ray.data.batches import iterate_eval_batches
        from beats_ray.data.stream import bucket_samples_of

        clips = self._run.held_out(part)
        if clips is None:
            return None
        if part not in self._held_out:
            self._held_out[part] = (self._share(part), self._count(clips))
        share, num_clips = self._held_out[part]
        return iterate_eval_batches(
            share,
            self._run.train.micro_batch_size,
            self._run.data.prefetch_blocks,
            num_clips=num_clips,
            bucket_samples=bucket_samples_of(self._run.data),
            device=self._context.device,
        )

    def _count(self, part: ClipPart) -> int:
        """Clips of a part: the first worker counts them, since that may mean reading their ids."""
        run, number = self._run, 0
        if self._context.rank == 0:
            number = count_clips(open_place(run.data.path), run.manifest, part, run.data.retry_seconds)
        return int(self._context.gather(number)[0])


def _share_of_ray_train(name: str) -> Any:
    import ray.train

    return ray.train.get_dataset_shard(name)


class CachedBatches:
    """Batches of clips that lie decoded in the object store, moved to this worker's device."""

    def __init__(self, run: Run, context: WorkerContext) -> None:
        self._run = run
        self._context = context

    def training(self, first_step: int) -> Iterator[MicroBatch]:
        settings, on_gpu = self._run.train, self._context.device.type == "cuda"
        batches = self._run.cache.batches(
            part=training_part(self._run.config, self._run.manifest),
            seed=settings.seed,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            start_step=first_step,
            stop_step=settings.steps,
            rank=self._context.rank,
            world_size=self._context.world_size,
            pin_memory=on_gpu,
        )
        with closing(read_ahead(batches) if on_gpu else batches) as made:
            for batch in made:
                yield batch.to(self._context.device)

    def held_out(self, part: HeldOut) -> Iterable[MicroBatch] | None:
        clips = self._run.held_out(part)
        if clips is None:
            return None
        batches = self._run.cache.eval_batches(
            part=clips,
            micro_batch_size=self._run.train.micro_batch_size,
            rank=self._context.rank,
            world_size=self._context.world_size,
        )
        return (batch.to(self._context.device) for batch in batches)
