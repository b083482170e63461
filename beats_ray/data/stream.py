"""The stream: the Ray Data graph from shards to micro-batches, in the order of the plan.

    windows of the plan -> read row groups (range reads, wanted columns only) -> decode, crop, pad -> blocks of several
    micro-batches of one worker, dealt to the workers in turn

With `preserve_order` (see `execution_options`) Ray's `streaming_split(equal=True)` hands block i to worker i % n, so
the global batch of a step holds the same clips for any number of workers; `iterate_micro_batches` checks it. Every
block costs Ray the same time whatever its size, so a block holds as many micro-batches as fit `BLOCK_CLIPS`, and a run
on many GPUs has several such streams (`data/lanes.py`).

    (stream,) = build_streams(dataset, manifest, settings, dealing=Dealing(64, 8, num_workers=2),
                              seed=0, start_step=0, stop_step=1000)
    shares = stream.streaming_split(2, equal=True)      # `train/streaming.py` hands them to Ray Train's workers
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from beats_ray.config import StreamSettings, UserError
from beats_ray.data.batches import MicroBatch, iterate_eval_batches, iterate_micro_batches
from beats_ray.data.clips import ExampleSpec, clip_samples_of, example_decoder
from beats_ray.data.lanes import Dealing, Lane
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.pacing import PauseWhileFull
from beats_ray.data.parts import ClipPart, plan_of_part
from beats_ray.data.plan import (
    SAMPLE_RATE_HZ,
    ClipPlan,
    ClipWeights,
    LengthBuckets,
    RowGroupRef,
    Rows,
    balancing_weights,
)
from beats_ray.data.shards import WindowReader, check_labels, check_schema, clip_labels
from beats_ray.data.storage import Place, with_retries

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = [
    "MicroBatch",
    "build_eval_stream",
    "build_streams",
    "execution_options",
    "iterate_eval_batches",
    "iterate_micro_batches",
    "read_alone",
    "required_cpus",
    "share_cpus",
    "training_streams",
]

logger = logging.getLogger(__name__)

DATA_NODE_LABELS = {"beats-ray/role": "data"}
"""Label of the nodes of a cluster that read and decode and do not train."""
BLOCK_CLIPS, BLOCK_BYTES = 256, 24 * 2**20  # at most, in one block, if a micro-batch has less
TASK_CLIPS, TASK_BYTES = 1024, 96 * 2**20  # at most, of all workers, decoded and dealt by one call
LONE_WORKER_BLOCKS = 2  # decoded by one call where a single worker gets them all: a task costs Ray more than a block
READ_CPUS = 0.25  # a read task waits for storage nearly all of its time
MAX_READ_TASKS = 4096  # each costs a fraction of a millisecond before the first batch; longer runs get longer tasks
DEFAULTS = StreamSettings()
TABLE_FILL = 7  # eighths of the mean size of a table at which it leaves a read task
TABLE_CLIPS = 64  # compressed clips that travel together from a read task, where the decode tasks do not say


def training_streams(num_streams: int) -> list[str]:
    """The names of a run's streams of training clips, by lane."""
    return ["train"] if num_streams == 1 else [f"train-{lane}" for lane in range(num_streams)]


def build_streams(
    dataset: Place,
    manifest: DatasetManifest,
    settings: StreamSettings,
    *,
    dealing: Dealing,
    seed: int,
    start_step: int,
    stop_step: int,
    labels: Place | None = None,
    augment_crop: bool = True,
    part: ClipPart | None = None,
) -> list["Dataset"]:
    """For each lane the clips of steps [start_step, stop_step), in blocks of consecutive micro-batches of one worker.

    Columns: position int64, clip_id string, audio int16 (S,), num_samples int32, targets uint8 (C,) and, with labels,
    patch_labels int16 (N,). Which clips a step holds depends on seed, part, sampling and shuffle_window_clips, with
    length buckets on clip_seconds and the global batch size too, with several lanes on the global batch size and their
    number, never on the number of workers or on start_step. The last blocks may go on a little beyond stop_step. part:
    the clips, by default those of the settings' folds and splits. UserError where no clip matches or the labels are not
    those of this data set.
    """
    with_retries(lambda: check_schema(dataset, manifest), settings.retry_seconds)
    plan = plan_of_part(
        dataset,
        manifest,
        part or wanted_part(settings),
        settings.retry_seconds,
        seed=seed,
        shuffle_window_clips=settings.shuffle_window_clips,
        weigh=weigher(dataset, manifest, settings),
        buckets=length_buckets(settings, dealing.lane_clips),
    )
    reader = open_reader(dataset, manifest, plan, settings, labels)
    spec = example_spec(manifest, settings, plan, seed if augment_crop else None)
    start, stop = start_step * dealing.lane_clips, stop_step * dealing.lane_clips
    lanes = [Lane(plan, index, dealing) for index in range(dealing.num_lanes)]
    return [_lane_stream(replace(reader, plan=lane), spec, settings, dealing, start, stop) for lane in lanes]


def _lane_stream(
    reader: WindowReader, spec: ExampleSpec, settings: StreamSettings, dealing: Dealing, start: int, stop: int
) -> "Dataset":
    """The clips of places [start, stop) of a lane, for its workers."""
    micro_batch_size, num_workers = dealing.micro_batch_size, dealing.lane_workers
    round_clips = micro_batch_size * num_workers
    rounds = rounds_of_a_block(micro_batch_size, num_workers, stop - start, spec.bytes_per_clip)
    stop = start + -(-(stop - start) // (rounds * round_clips)) * rounds * round_clips  # whole blocks for every worker
    decode = example_decoder(spec, (micro_batch_size, num_workers) if rounds > 1 else None)
    task_clips = rounds * round_clips if rounds > 1 else micro_batch_size
    if rounds > 1 and num_workers == 1:
        task_clips *= min(LONE_WORKER_BLOCKS, max(1, (stop - start) // task_clips))
    rows = read_windows(reader, settings, start, stop, task_clips)
    stream = _in_blocks(rows, decode, settings, task_clips, rounds * micro_batch_size)
    stream.context.execution_options = execution_options(settings, num_workers)
    return stream


def rounds_of_a_block(micro_batch_size: int, num_workers: int, clips: int, bytes_per_clip: int) -> int:
    """Micro-batches in a block; a task decodes as many for each worker. At least one, at most what `clips` needs."""
    block_clips = min(BLOCK_CLIPS, BLOCK_BYTES // bytes_per_clip)
    task_clips = min(TASK_CLIPS, TASK_BYTES // bytes_per_clip, clips)
    rounds = max(1, min(block_clips // micro_batch_size, task_clips // (micro_batch_size * num_workers)))
    return 1 << (rounds.bit_length() - 1)  # such blocks fill the windows, which mostly have 2^n clips


def read_alone(
    dataset: Place,
    manifest: DatasetManifest,
    settings: StreamSettings,
    *,
    batch_size: int,
    num_steps: int,
    seed: int = 0,
) -> Iterator[MicroBatch]:
    """The micro-batches of the first steps for a single consumer, as a training worker gets them, without a trainer."""
    dealing = Dealing(batch_size, batch_size, num_workers=1)
    (stream,) = build_streams(
        dataset, manifest, settings, dealing=dealing, seed=seed, start_step=0, stop_step=num_steps
    )
    return iterate_micro_batches(
        stream.streaming_split(1, equal=True), dealing, 0, settings.prefetch_blocks, first_step=0,
        stop_step=num_steps, bucket_samples=bucket_samples_of(settings),
    )  # fmt: skip


def build_eval_stream(
    dataset: Place,
    manifest: DatasetManifest,
    settings: StreamSettings,
    micro_batch_size: int,
    *,
    num_workers: int | None = None,
    labels: Place | None = None,
    part: ClipPart | None = None,
) -> "Dataset":
    """Each chosen clip once, in the manifest's order, its middle where it is too long; positions are 0, 1, 2, ...

    With num_workers the last clips are followed by repetitions (positions from the number of clips on), so that every
    worker gets as many blocks; `iterate_eval_batches` drops them again.
    """
    plan = plan_of_part(
        dataset,
        manifest,
        part or wanted_part(settings),
        settings.retry_seconds,
        shuffle_window_clips=settings.shuffle_window_clips,
        shuffled=False,
    )
    reader = open_reader(dataset, manifest, plan, settings, labels)
    spec = example_spec(manifest, settings, plan, None)
    unit = micro_batch_size * num_workers if num_workers else 1
    stop = -(-plan.clips_per_epoch // unit) * unit
    rows = read_windows(reader, settings, 0, stop)
    return _in_blocks(rows, example_decoder(spec), settings, micro_batch_size, micro_batch_size)


def execution_options(settings: StreamSettings = DEFAULTS, num_workers: int = 1) -> ExecutionOptions:
    """What keeps the order and bounds the memory; also turns Ray Data's progress bars off in this process."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    limit = ExecutionResources(object_store_memory=settings.buffer_mib * 2**20 * num_workers)
    return ExecutionOptions(preserve_order=True, resource_limits=limit, verbose_progress=False)


def wanted_part(settings: StreamSettings) -> ClipPart:
    """All clips that `data.folds` and `data.splits` name."""
    return ClipPart(settings.folds, settings.splits)


def required_cpus(settings: StreamSettings, num_streams: int = 1) -> float:
    """Logical CPUs that must stay free beside the training workers, or so many streams cannot move."""
    return num_streams * (settings.read_tasks * READ_CPUS + settings.decode_cpus)


def share_cpus(
    streams: Sequence["Dataset"], settings: StreamSettings, taken_elsewhere: float, to_leave: float, runs: int = 1
) -> None:
    """Keeps the tasks of each stream from taking all logical CPUs of the nodes that they may run on.

    A task whose blocks nobody fetches keeps its CPU, so a stream that waits could starve another one. taken_elsewhere:
    CPUs of all training workers, which do not run on data nodes. to_leave: those that other streams of this run need.
    runs: how many read side by side, each of which does as this one does.
    """
    labels = data_node_labels(settings)
    cpus = sum(
        node["Resources"].get("CPU", 0.0)
        for node in ray.nodes()
        if node["Alive"] and labels.items() <= (node.get("Labels") or {}).items()
    )
    rest = (cpus - (0.0 if labels else taken_elsewhere)) / runs - to_leave
    for stream in streams:
        options = stream.context.execution_options
        share = max(required_cpus(settings), rest / len(streams))
        options.resource_limits = options.resource_limits.copy(cpu=share)


def start_bookkeepers() -> None:
    """Has Ray Data start the actors in which it keeps statistics and asks for nodes, on this process's node.

    They stay for as long as the cluster, on the node of whoever runs a first data set. Where that is a trial's, on a
    node that the autoscaler has started, it would never be idle.
    """
    rows = ray.data.from_items([{"row": 0}])
    rows.context.enable_progress_bars = False
    for _ in rows.iter_batches():
        pass


def weigher(
    dataset: Place, manifest: DatasetManifest, settings: StreamSettings
) -> Callable[[tuple[RowGroupRef, ...], Rows | None], ClipWeights] | None:
    """What `build_plan` needs for `data.sampling`. UserError for balanced sampling of a set without labels."""
    if settings.sampling == "uniform":
        return None
    if not manifest.label_names:
        raise UserError(f"data.sampling=balanced: {dataset.uri} has no labels; use uniform")
    return lambda groups, rows: balancing_weights(
        clip_labels(dataset, groups, manifest.versions, settings.retry_seconds), len(manifest.label_names), rows
    )


def open_reader(
    dataset: Place, manifest: DatasetManifest, plan: ClipPlan, settings: StreamSettings, labels: Place | None
) -> WindowReader:
    """The reader of a plan's windows; UserError where the labels are not those of this data set."""
    labels_version = check_labels(labels, manifest, dataset) if labels else ""
    clip_bytes = sum(shard.bytes for shard in manifest.shards) // max(1, manifest.clips)
    return WindowReader(dataset, labels, plan, manifest.versions, labels_version, settings.retry_seconds, clip_bytes)


def example_spec(
    manifest: DatasetManifest, settings: StreamSettings, plan: ClipPlan, crop_seed: int | None
) -> ExampleSpec:
    """How this data set's clips become examples."""
    return ExampleSpec(
        clip_samples=clip_samples_of(settings.clip_seconds),
        num_classes=len(manifest.label_names),
        clips_per_epoch=plan.clips_per_epoch,
        crop_seed=crop_seed,
    )


def length_buckets(settings: StreamSettings, batch_clips: int) -> LengthBuckets | None:
    """What `build_plan` needs for `data.length_bucket_seconds`; batch_clips: of a step and lane."""
    samples = bucket_samples_of(settings)
    return LengthBuckets(samples, clip_samples_of(settings.clip_seconds), batch_clips) if samples else None


def bucket_samples_of(settings: StreamSettings) -> int:
    """Samples of `data.length_bucket_seconds`; 0 where clips are not brought together by length."""
    return round(settings.length_bucket_seconds * SAMPLE_RATE_HZ)


def read_windows(
    reader: WindowReader, settings: StreamSettings, start: int, stop: int, table_clips: int = TABLE_CLIPS
) -> "Dataset":
    """Shard rows of positions, of a lane places, [start, stop), with their position, still compressed, in order.

    table_clips: rows that travel together, see `WindowReader.read`.
    """
    warn_without_data_nodes(settings)
    source = PlanSource(reader, start, stop, table_clips)
    rows = ray.data.read_datasource(
        source,
        override_num_blocks=source.num_tasks,
        concurrency=min(settings.read_tasks, source.num_tasks),
        num_cpus=READ_CPUS,
        **task_placement(settings),
    )
    context = rows.context
    # Ray collects tables until they are larger than this, and cuts what is more than half as large again.
    context.target_max_block_size = max(1, TABLE_FILL * table_clips * reader.clip_bytes // 8)
    context.downstream_capacity_backpressure_ratio = None  # `buffer_mib` alone bounds the memory
    context.custom_execution_callback_classes = [PauseWhileFull]
    context.execution_options = execution_options(settings)
    return rows


def _in_blocks(
    rows: "Dataset",
    decode: Callable[[pa.Table], dict[str, np.ndarray]],
    settings: StreamSettings,
    task_clips: int,
    block_clips: int,
) -> "Dataset":
    """Decoded clips in blocks of exactly block_clips; a call of `decode` gets task_clips, put together where needed."""
    resources: Any = {"num_cpus": settings.decode_cpus} | task_placement(settings)
    examples = rows.map_batches(decode, batch_size=task_clips, batch_format="pyarrow", **resources)
    blocks = examples.repartition(target_num_rows_per_block=block_clips, strict=True)
    # Ray runs both steps in one task where they ask for the same resources; `repartition` has no argument for them.
    repartition: Any = blocks._logical_plan.dag
    repartition.ray_remote_args.update(resources)
    return blocks


def data_node_labels(settings: StreamSettings) -> dict[str, str]:
    """The labels of the nodes on which the tasks of the stream must run; empty where any node will do.

    `auto` looks for nodes with `DATA_NODE_LABELS` in the cluster as it is; `data-nodes` asks for them in any case, so
    that an autoscaler starts them.
    """
    if settings.placement == "anywhere":
        return {}
    if settings.placement == "data-nodes":
        return dict(DATA_NODE_LABELS)
    return dict(DATA_NODE_LABELS) if ray.is_initialized() and _has_data_nodes() else {}


def warn_without_data_nodes(settings: StreamSettings) -> None:
    """Logs what a stream waits for that must run on data nodes while the cluster has none: Ray itself says nothing."""
    if settings.placement == "data-nodes" and ray.is_initialized() and not _has_data_nodes():
        name, value = next(iter(DATA_NODE_LABELS.items()))
        logger.warning(
            "data.placement=data-nodes: no node of the cluster has the label %s=%s; reading waits until one joins "
            "(an autoscaler may start it); give a node that label, or set data.placement=anywhere", name, value
        )  # fmt: skip


def _has_data_nodes() -> bool:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return any(DATA_NODE_LABELS.items() <= (node.get("Labels") or {}).items() for node in nodes)


def task_placement(settings: StreamSettings) -> dict[str, Any]:
    """Arguments of a Ray Data step that keep its tasks on the nodes of `data_node_labels`."""
    labels = data_node_labels(settings)
    return {"label_selector": labels} if labels else {}


class PlanSource(Datasource):
    """A Ray Data source whose read tasks follow the windows of a plan."""

    def __init__(self, reader: WindowReader, start: int, stop: int, table_clips: int) -> None:
        super().__init__()
        self._reader = reader
        self._table_clips = table_clips
        self._start = start
        self._stop = stop
        self._windows = reader.plan.windows_between(start, stop)

    @property
    def num_tasks(self) -> int:
        return max(1, min(len(self._windows), MAX_READ_TASKS))

    def get_name(self) -> str:
        return "Clips"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        del per_task_row_limit, data_context  # nothing limits the rows of this stream
        reader = ray.put(self._reader)  # a plan can be long: the tasks share one
        bounds = [len(self._windows) * task // parallelism for task in range(parallelism + 1)]
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [
            ReadTask(
                partial(_read, reader, self._windows[first:last], self._start, self._stop, self._table_clips), metadata
            )
            for first, last in pairwise(bounds)
            if first < last
        ]


def _read(
    reader: "ray.ObjectRef[WindowReader]", windows: Sequence[int], start: int, stop: int, table_clips: int
) -> Iterator[pa.Table]:
    yield from ray.get(reader).read(windows, start, stop, table_clips)
