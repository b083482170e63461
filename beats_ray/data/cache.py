"""Decoded clips of a small data set in Ray's object store: read and decoded once, shared by every process of a node.

    cache = materialize_clips(dataset, manifest, settings)       # on the driver, through Ray Data
    for batch in cache.batches(seed=0, part=ClipPart(folds=(3, 4)), ...):    # in any task, actor, trial or worker

The handle is small and pickles; processes see the same memory and copy only the micro-batch they train on. The order
and the content of the batches are those of `build_streams`, bit for bit. The clips live as long as the driver.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from beats_ray.config import StreamSettings, UserError
from beats_ray.data.batches import MicroBatch, to_micro_batch
from beats_ray.data.clips import Clip, ExampleSpec, clip_samples_of, decode_whole_clips, make_examples
from beats_ray.data.columns import list_views
from beats_ray.data.lanes import Dealing, Lane
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.parts import ClipPart, rows_of_part
from beats_ray.data.plan import (
    SAMPLE_RATE_HZ,
    ClipPlan,
    ClipWeights,
    RowGroupRef,
    Rows,
    balancing_weights,
    build_plan,
)
from beats_ray.data.shards import check_schema
from beats_ray.data.storage import Place, with_retries
from beats_ray.data.stream import (
    bucket_samples_of,
    example_spec,
    length_buckets,
    open_reader,
    read_windows,
    task_placement,
    wanted_part,
)

DECODE_CLIPS = 64  # clips of one call in a decode task
STORE_FRACTION = 0.4  # of the object store, the rest is for what passes through it


@dataclass(frozen=True)
class ClipCache:
    """Handle on decoded clips in the object store."""

    manifest: DatasetManifest
    settings: StreamSettings
    plan: ClipPlan
    """What is held, in the manifest's order."""
    tables: "tuple[ray.ObjectRef[pa.Table], ...]"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # not the opened clips

    def batches(
        self,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        part: ClipPart | None = None,
        rank: int = 0,
        world_size: int = 1,
        augment_crop: bool = True,
        pin_memory: bool = False,
    ) -> Generator[MicroBatch]:
        """A rank's micro-batches of steps [start_step, stop_step): what the stream with these settings would bring.

        part: the clips, by default those of the settings' folds and splits. pin_memory: for a GPU, which then copies
        them beside the host.
        """
        dealing = Dealing(global_batch_size, micro_batch_size, world_size, self.settings.streams)
        plan = self._plan(
            part,
            seed=seed,
            weigh=self._weigh if self.settings.sampling == "balanced" else None,
            buckets=length_buckets(self.settings, dealing.lane_clips),
        )
        spec = example_spec(self.manifest, self.settings, plan, seed if augment_crop else None)
        lanes = {index: Lane(plan, index, dealing) for index in dealing.lanes_of(rank)}
        read = {index: self._reader(lane, spec, pin_memory) for index, lane in lanes.items()}
        for index in range(dealing.num_micro_batches(stop_step - start_step)):
            lane, start = dealing.micro_batch(start_step, index, rank)
            yield read[lane](start, start + micro_batch_size)

    def eval_batches(
        self,
        *,
        micro_batch_size: int,
        part: ClipPart | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[MicroBatch]:
        """A rank's part of the clips, in the manifest's order: over all ranks each clip once, its middle if too long.

        The last batch may be smaller; a rank may get no batch at all.
        """
        plan = self._plan(part, shuffled=False)
        spec = example_spec(self.manifest, self.settings, plan, None)
        clips = plan.clips_per_epoch
        starts = range(rank * micro_batch_size, clips, world_size * micro_batch_size)
        read = self._reader(plan, spec)
        for start in starts:
            yield read(start, min(start + micro_batch_size, clips))

    def _plan(self, part: ClipPart | None, **options: Any) -> ClipPlan:
        part = part or wanted_part(self.settings)

        def choose(groups: tuple[RowGroupRef, ...]) -> Rows:
            ids = [[clip.clip_id for clip in clips] for clips in self._clips_of(groups)]
            return rows_of_part(part, ids, self._labels_of(groups))

        return build_plan(
            self.manifest,
            folds=part.folds,
            splits=part.splits,
            shuffle_window_clips=self.settings.shuffle_window_clips,
            choose=None if part.draw is None else choose,
            **options,
        )

    def _weigh(self, groups: tuple[RowGroupRef, ...], rows: Rows | None) -> ClipWeights:
        return balancing_weights(self._labels_of(groups), len(self.manifest.label_names), rows)

    def _labels_of(self, groups: tuple[RowGroupRef, ...]) -> list[list[list[int]]]:
        return [[[int(label) for label in clip.label_ids] for clip in clips] for clips in self._clips_of(groups)]

    def _clips_of(self, groups: tuple[RowGroupRef, ...]) -> list[list[Clip]]:
        self._check_held(groups)
        firsts = [self._first_clip[_key(group)] for group in groups]
        return [self._clips[first : first + group.clips] for first, group in zip(firsts, groups, strict=True)]

    def _check_held(self, groups: tuple[RowGroupRef, ...]) -> None:
        missing = [group for group in groups if _key(group) not in self._first_clip]
        if missing:
            raise UserError(
                f"data.folds={list(self.settings.folds)}, data.splits={list(self.settings.splits)}: the cached clips "
                f"lack row group {missing[0].index} of {missing[0].file}; widen them to all clips that the run uses"
            )

    def _reader(
        self, plan: ClipPlan | Lane, spec: ExampleSpec, pin_memory: bool = False
    ) -> Callable[[int, int], MicroBatch]:
        """What gives the examples of positions, of a lane places, [start, stop)."""
        self._check_held(plan.row_groups)

        @lru_cache(maxsize=2)  # a micro-batch can straddle two windows
        def clips_of(ordinal: int) -> tuple[int, np.ndarray]:
            window = plan.window(ordinal)
            first_G = np.array([self._first_clip[group.file, group.index] for group in window.row_groups])
            num_samples_P = self._num_samples[first_G[window.slots_P] + window.rows_P]
            window = plan.by_length(window, num_samples_P)
            return window.first_position, first_G[window.slots_P] + window.rows_P

        def read(start: int, stop: int) -> MicroBatch:
            begun = time.perf_counter()
            clips: list[Clip] = []
            for ordinal in plan.windows_between(start, stop):
                first, index_P = clips_of(ordinal)
                clips += [self._clips[i] for i in index_P[max(0, start - first) : stop - first]]
            columns = make_examples(clips, plan.positions(start, stop), spec)
            batch = to_micro_batch(columns, pin_memory, bucket_samples_of(self.settings))
            return replace(batch, wait_seconds=time.perf_counter() - begun)

        return read

    @cached_property
    def _first_clip(self) -> dict[tuple[str, int], int]:
        """For each row group that is held, the place of its first clip in `_clips`."""
        return dict(zip(map(_key, self.plan.row_groups), _first_of(self.plan.row_groups), strict=True))

    @cached_property
    def _num_samples(self) -> np.ndarray:
        return np.array([clip.num_samples for clip in self._clips])

    @cached_property
    def _clips(self) -> list[Clip]:
        """Every clip that is held; the waveforms are views of the object store."""
        clips = [clip for table in ray.get(list(self.tables)) for clip in _open_table(table)]
        assert len(clips) == self.plan.clips_per_epoch, (len(clips), self.plan.clips_per_epoch)
        return clips


def materialize_clips(
    dataset: Place,
    manifest: DatasetManifest,
    settings: StreamSettings,
    *,
    labels: Place | None = None,
    limit_mib: float | None = None,
) -> ClipCache:
    """Reads and decodes the clips of the settings' folds and splits once, through Ray Data, into the object store.

    limit_mib: default 40 % of the cluster's object store. UserError where the decoded clips need more.
    """
    clip_samples_of(settings.clip_seconds)
    plan = build_plan(
        manifest,
        folds=settings.folds,
        splits=settings.splits,
        shuffle_window_clips=settings.shuffle_window_clips,
        shuffled=False,
    )
    with_retries(lambda: check_schema(dataset, manifest), settings.retry_seconds)
    reader = open_reader(dataset, manifest, plan, settings, labels)
    needed_mib = decoded_mib(manifest, plan)
    limit_mib = cache_limit_mib() if limit_mib is None else limit_mib
    if needed_mib > limit_mib:
        raise UserError(
            f"{dataset.uri}: its clips need about {needed_mib:.0f} MiB decoded, {limit_mib:.0f} MiB of the object "
            f"store may hold them; set ray.object_store_mib={int(needed_mib / STORE_FRACTION) + 1}, choose folds, or "
            "let `finetune` stream them with data.cache=never"
        )
    rows = read_windows(reader, settings, 0, plan.clips_per_epoch)
    rows.context.execution_options.resource_limits = ray.data.ExecutionResources()  # the clips are meant to stay
    resources: Any = {"num_cpus": settings.decode_cpus} | task_placement(settings)
    decoded = rows.map_batches(decode_whole_clips, batch_size=DECODE_CLIPS, batch_format="pyarrow", **resources)
    return ClipCache(manifest, settings, plan, tuple(decoded.materialize().to_arrow_refs()))


def is_cached(manifest: DatasetManifest, settings: StreamSettings) -> bool:
    """Whether a run that can stream keeps its decoded clips instead (`data.cache`); asks the cluster for its memory."""
    if settings.cache != "auto":
        return settings.cache == "always"
    return (
        decoded_mib(manifest, build_plan(manifest, folds=settings.folds, splits=settings.splits)) <= cache_limit_mib()
    )


def cache_limit_mib() -> float:
    """What decoded clips may take of the cluster's object store."""
    return STORE_FRACTION * float(ray.cluster_resources().get("object_store_memory", 0.0)) / 2**20


def decoded_mib(manifest: DatasetManifest, plan: ClipPlan) -> float:
    """What the plan's clips take as int16 samples, by the data set's mean clip length, MiB."""
    return 2 * SAMPLE_RATE_HZ * manifest.seconds * plan.clips_per_epoch / max(1, manifest.clips) / 2**20


def _key(group: RowGroupRef) -> tuple[str, int]:
    return group.file, group.index


def _first_of(groups: Sequence[RowGroupRef]) -> list[int]:
    clips_G = np.array([group.clips for group in groups])
    return [int(first) for first in np.cumsum(clips_G) - clips_G]


def _open_table(table: pa.Table) -> Iterator[Clip]:
    """Clips of one block; numpy views, no copies."""
    names = [name for name in ("wave", "labels", "patch_labels") if name in table.schema.names]
    columns = {name: list_views(table.column(name)) for name in names}
    for row, clip_id in enumerate(table.column("clip_id").to_pylist()):
        patch_labels = columns["patch_labels"][row] if "patch_labels" in columns else None
        yield Clip(clip_id, columns["wave"][row], columns["labels"][row], patch_labels)
