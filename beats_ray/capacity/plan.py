"""`beats-ray plan`: how long a run of all iterations takes on a cluster, what it needs there, and what it costs.

    estimates = estimate_run(config, rows)
    sum(one.hours for one in estimates)

A stage goes as fast as the slowest of four: its workers (model FLOPs over what a GPU sustains), the cores that decode,
object storage, and, for the stream of a training, Ray's coordinator. Where nodes are taken away (spot), its hours are
divided by the goodput of Daly's formula. Left out are `prepare`, the probe's regression, the baselines, and the minutes
that nodes take to start.
"""

import math
from dataclasses import dataclass
from typing import Literal

from beats_ray.capacity.intervals import daly_interval, expected_goodput, mtbf_seconds
from beats_ray.capacity.settings import ClusterSettings, MeasuredSettings, PlanConfig
from beats_ray.capacity.sizing import DataPlane, Load, cache_mib, clips_of_a_block, coordinator_limit, data_plane
from beats_ray.config import (
    ConfigError,
    CrossValidateConfig,
    EvaluateConfig,
    Job,
    StreamSettings,
    SweepConfig,
    TokenizeConfig,
    TrainSettings,
    replace,
)
from beats_ray.data.manifest import NO_FOLD, DatasetManifest, RowGroup, Shard
from beats_ray.data.plan import build_plan
from beats_ray.iterate_plan import Row, Training, training_of
from beats_ray.models.config import FBANK_MEAN, FBANK_STD

HOUR_SECONDS = 3600.0
Limit = Literal["GPUs", "decoding", "storage", "coordinator"]


@dataclass(frozen=True)
class Work:
    """One stage as the cluster sees it."""

    label: str
    setting: str
    """Where its number of workers is set."""
    clips: int
    clip_seconds: float
    """That go through the model; the length of a clip after cropping and padding."""
    flops: float
    workers: int
    cpus_per_worker: float
    clips_per_block: int | None
    """Of a training stream; a batch job hands out row groups, at a cost that was not measured."""
    cached_seconds: float | None = None
    """Sound that is decoded once and kept, as the trials of a sweep share it; None where clips are streamed."""
    train: TrainSettings | None = None
    """Of a stage that trains."""
    streams: int = 1
    """Of the training clips."""
    parallel_runs: int = 1
    """Trials, or folds, at one time, each with its share of the workers."""
    bytes_per_clip: float = 0.0
    """In the shards."""

    @property
    def audio_hours(self) -> float:
        """Hours of sound that go through the model, a clip as often as it does."""
        return self.clips * self.clip_seconds / HOUR_SECONDS


@dataclass(frozen=True)
class Estimate:
    """What a stage takes."""

    work: Work
    worker_nodes: int
    data_nodes: int
    wanted_clips_per_s: float
    """That its workers could take."""
    clips_per_s: float
    """That they get."""
    limit: Limit
    needs: DataPlane
    """So that its workers never wait."""
    goodput: float
    """Share of its time that is training which counts."""
    best_checkpoint_steps: int | None
    """Daly's distance between two checkpoints, in steps; None where nothing fails."""
    hours: float
    cost: float | None
    """None where no prices are given."""


def planned_manifest(config: PlanConfig) -> DatasetManifest:
    """The manifest that a data set which is not prepared yet would have, as far as a plan needs it."""
    planned = config.planned_data
    assert planned.hours is not None
    seconds = planned.hours * HOUR_SECONDS
    clips = max(1, round(seconds / planned.clip_seconds))
    group = RowGroup(clips=clips, fold=NO_FOLD, split="")
    shard = Shard(file="planned", sha256="", bytes=round(seconds * planned.bytes_per_second), row_groups=(group,))
    return DatasetManifest(
        name="planned",
        label_names=tuple(f"class {index}" for index in range(planned.num_classes)),
        multi_label=planned.multi_label,
        clips=clips,
        clips_by_fold={},
        clips_by_split={},
        seconds=seconds,
        fbank_mean=FBANK_MEAN,
        fbank_std=FBANK_STD,
        source="planned_data",
        source_files=clips,
        quarantined=0,
        shards=(shard,),
    )


def as_planned(config: PlanConfig) -> PlanConfig:
    """The run on that data set, which has no parts to be named; tasks, which read sets of their own, are left out."""
    return replace(config, {"data.folds": [], "data.splits": [], "finetune.folds": {}, "tasks": {}})


def work_of(row: Row, config: PlanConfig) -> Work | None:
    """The stage in figures; None where no model runs or nothing is left to do."""
    stage, job = row.stage, row.stage.job
    if not row.clips or not row.flops:
        return None
    manifest, training = stage.manifest, training_of(stage)
    bytes_per_clip = sum(shard.bytes for shard in manifest.shards) / max(manifest.clips, 1)
    if training is None:
        assert isinstance(job, TokenizeConfig | EvaluateConfig), stage.label
        return Work(
            label=stage.label,
            setting="inference.num_workers",
            clips=row.clips,
            clip_seconds=manifest.seconds / max(manifest.clips, 1),
            flops=row.flops,
            workers=job.num_workers,
            cpus_per_worker=1.0,
            clips_per_block=None,
            bytes_per_clip=bytes_per_clip,
        )
    train, data = training.config.train, training.config.data
    parallel = _parallel_runs(job, training, config.cluster)
    shares_clips = isinstance(job, SweepConfig | CrossValidateConfig)
    return Work(
        label=stage.label,
        setting=f"{training.section}.train.num_workers",
        clips=row.clips,
        clip_seconds=data.clip_seconds,
        flops=row.flops,
        workers=math.ceil(round(_workers_of_a_run(job, training) * parallel, 6)),
        cpus_per_worker=train.cpus_per_worker,
        clips_per_block=clips_of_a_block(
            max(1, train.max_workers // data.streams), train.micro_batch_size, data.clip_seconds
        ),
        streams=data.streams,
        cached_seconds=_seconds_read(data, manifest) if shares_clips else None,
        train=train,
        parallel_runs=parallel,
        bytes_per_clip=bytes_per_clip,
    )


def _parallel_runs(job: Job | None, training: Training, cluster: ClusterSettings) -> int:
    """Trials of a sweep, or folds and seeds, at one time."""
    runs = training.runs
    if isinstance(job, SweepConfig):
        runs = job.sweep.num_trials  # the repeats of a trial run one after the other
        most = job.sweep.max_concurrent_trials
    elif isinstance(job, CrossValidateConfig):
        most = job.cross_validation.max_concurrent_runs
    else:
        return 1
    room = runs
    if cluster.max_worker_nodes is not None:
        share = _workers_of_a_run(job, training)
        room = math.floor(round(cluster.max_worker_nodes * cluster.workers_per_node / share, 6))
    return max(1, min(runs, room, most or runs))


def _workers_of_a_run(job: Job | None, training: Training) -> float:
    """Whole workers that a run comes to: trials may share a GPU."""
    share = job.sweep.gpus_per_worker if isinstance(job, SweepConfig) else 1.0
    return training.config.train.max_workers * share


def _seconds_read(data: StreamSettings, manifest: DatasetManifest) -> float:
    """Of sound in the folds and splits that a run reads."""
    plan = build_plan(manifest, folds=data.folds, splits=data.splits)
    return manifest.seconds * sum(group.clips for group in plan.row_groups) / max(manifest.clips, 1)


def estimate_run(config: PlanConfig, rows: list[Row]) -> list[Estimate]:
    """An estimate for each stage that has work left. ConfigError where the cluster has too few nodes for one."""
    works = [work for row in rows if (work := work_of(row, config)) is not None]
    return [estimate(work, config) for work in works]


def estimate(work: Work, config: PlanConfig) -> Estimate:
    """What one stage takes on `config.cluster`. ConfigError where that has too few nodes."""
    cluster, measured = config.cluster, config.measured
    worker_nodes = _worker_nodes(work, cluster)
    wanted = work.workers * cluster.tflops_per_worker * 1e12 / (work.flops / work.clips)
    load = Load(wanted, work.clip_seconds, work.bytes_per_clip, work.workers, work.clips_per_block, work.streams)
    needs = data_plane(load, config.data.buffer_mib, measured)
    limits: dict[Limit, float] = {"GPUs": wanted}
    data_nodes = 0
    if work.cached_seconds is not None:
        needs = DataPlane(0.0, 0.0, 0.0, cache_mib(work.cached_seconds), None)
    else:
        free_cores = worker_nodes * cluster.worker_node_cores - work.workers * work.cpus_per_worker
        data_nodes = _data_nodes(needs.decode_cores, free_cores, cluster)
        cores = data_nodes * cluster.data_node_cores if data_nodes else free_cores
        if cores <= 0:
            raise ConfigError(
                f"cluster.worker_node_cores={cluster.worker_node_cores} leaves no core to decode for {work.label}, and "
                f"cluster.max_data_nodes={cluster.max_data_nodes} none beside; raise cluster.max_data_nodes"
            )
        limits["decoding"] = wanted * cores / needs.decode_cores
        if cluster.storage_mib_per_s is not None:
            limits["storage"] = wanted * cluster.storage_mib_per_s / needs.storage_mib_per_s
        if work.clips_per_block is not None:
            limits["coordinator"] = coordinator_limit(work.clips_per_block, measured, work.streams)
    limit = min(limits, key=lambda name: limits[name])
    rate = limits[limit]
    goodput, best_steps = _faults(work, rate, cluster, measured) if work.train else (1.0, None)
    seconds = measured.start_seconds + work.clips / rate
    hours = seconds / goodput / HOUR_SECONDS if goodput else math.inf
    prices = _node_prices(worker_nodes, data_nodes, cluster)
    return Estimate(
        work, worker_nodes, data_nodes, wanted, rate, limit, needs, goodput, best_steps, hours,
        None if prices is None else prices * hours,
    )  # fmt: skip


def _worker_nodes(work: Work, cluster: ClusterSettings) -> int:
    nodes = -(-work.workers // cluster.workers_per_node)
    if cluster.max_worker_nodes is not None and nodes > cluster.max_worker_nodes:
        room = cluster.max_worker_nodes * cluster.workers_per_node
        raise ConfigError(
            f"cluster.max_worker_nodes={cluster.max_worker_nodes} nodes of {cluster.workers_per_node} workers have no "
            f"room for the {work.workers} workers of {work.label}; use {nodes}, or lower {work.setting}"
            f"{' or the runs at one time' if work.parallel_runs > 1 else ''} so that at most {room} run"
        )
    return nodes


def _data_nodes(decode_cores: float, free_cores: float, cluster: ClusterSettings) -> int:
    """0 where the worker nodes can decode; else as many as do all of it, as `data.placement=auto` places it."""
    if decode_cores <= free_cores:
        return 0
    nodes = math.ceil(decode_cores / cluster.data_node_cores)
    return nodes if cluster.max_data_nodes is None else min(nodes, cluster.max_data_nodes)


def _faults(work: Work, rate: float, cluster: ClusterSettings, measured: MeasuredSettings) -> tuple[float, int | None]:
    """(goodput, Daly's distance between checkpoints in steps) of a training on nodes that are taken away."""
    assert work.train is not None
    run_workers = work.train.max_workers
    mtbf = mtbf_seconds(cluster.hourly_preemption, -(-run_workers // cluster.workers_per_node))
    step_seconds = work.train.global_batch_size / (rate / work.parallel_runs)
    interval = work.train.checkpoint_every_steps * step_seconds
    pause = measured.checkpoint_pause_seconds
    waits = work.train.min_workers == work.train.max_workers  # an elastic run goes on with the nodes that are left
    recovery = measured.recovery_seconds + (60.0 * cluster.replacement_minutes if waits else 0.0)
    goodput = expected_goodput(interval, pause, mtbf, recovery)
    if math.isinf(mtbf):
        return goodput, None
    return goodput, max(1, round(daly_interval(pause, mtbf) / step_seconds))


def _node_prices(worker_nodes: int, data_nodes: int, cluster: ClusterSettings) -> float | None:
    """Of an hour of all nodes."""
    if cluster.worker_node_price is None:
        return None
    data_node, head_node = cluster.data_node_price or 0.0, cluster.head_node_price or 0.0
    return worker_nodes * cluster.worker_node_price + data_nodes * data_node + head_node
