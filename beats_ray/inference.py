"""Batch inference over a prepared data set: Ray Data reads and decodes row groups, a pool of actors runs a model.

    for table in map_clips(dataset, manifest, EmbedWorker, model=open_place("s3://bucket/encoder"), ...):
        ...                                      # columns: shard, row, clip_id and what the worker returns

Two stages: light tasks fetch row groups and decode FLAC, so that they may run on CPU nodes, and `num_workers` actors,
each with the published model loaded once, map batches of clips. Between the stages audio travels as int16 samples.
Results arrive in the order in which they are done; `shard` and `row` say where each belongs.
"""

import fcntl
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from beats_ray.config import InferenceSettings, StreamSettings, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, Shard
from beats_ray.data.plan import RowGroupRef
from beats_ray.data.shards import COLUMNS, read_row_group
from beats_ray.data.storage import Place, with_retries
from beats_ray.models.config import RELEASED_SUFFIXES

if TYPE_CHECKING:  # reading tasks import this module too: without PyTorch they start in a second
    import torch

CPUS_PER_READER = 0.5  # half of a reader's time is waiting for storage
READERS_PER_CPU = 0.5  # a process that decodes keeps two CPU actors busy; each more costs seconds of start-up
READERS_PER_GPU = 8
MAX_READ_TASKS = 256  # row groups are dealt into at most so many tasks' inputs
TOKENIZER_KINDS = ("random_projection_tokenizer", "self_distilled_tokenizer")
KINDS = ("encoder", "classifier", *TOKENIZER_KINDS)
DEFAULTS = StreamSettings()
KEPT_MODELS = 6  # downloaded models that stay on a node's disk: a sweep may compare several


class ClipWorker(Protocol):
    """What an actor does with clips: built once with the model (None where no model is given), called per batch."""

    def __call__(self, wave_BS: "torch.Tensor", num_samples_B: "torch.Tensor") -> dict[str, Any]:
        """int16 waveforms, padded with zeros, and their lengths -> columns of B entries: arrays, or lists of arrays."""
        ...


@dataclass(frozen=True)
class RowGroupSpan:
    """Where one row group lies, and which rows of its shard it holds."""

    file: str
    shard: int
    row_group: int
    first_row: int
    """Row of the shard at which the group starts."""
    clips: int
    fold: int


def row_group_spans(
    manifest: DatasetManifest,
    folds: Iterable[int] = (),
    splits: Iterable[str] = (),
    shards: Iterable[int] | None = None,
) -> list[RowGroupSpan]:
    """The row groups of the given folds, splits and shards, in storage order; an empty choice means all."""
    folds, splits = set(folds), set(splits)
    wanted = None if shards is None else set(shards)
    spans = []
    for shard_index, shard in enumerate(manifest.shards):
        first_row = 0
        for index, group in enumerate(shard.row_groups):
            chosen = (not folds or group.fold in folds) and (not splits or group.split in splits)
            if chosen and (wanted is None or shard_index in wanted):
                spans.append(RowGroupSpan(shard.file, shard_index, index, first_row, group.clips, group.fold))
            first_row += group.clips
    return spans


def map_clips(
    dataset: Place,
    manifest: DatasetManifest,
    worker_class: Callable[..., ClipWorker],
    *,
    model: Place | None = None,
    worker_options: dict[str, Any] | None = None,
    row_groups: list[RowGroupSpan] | None = None,
    batch_clips: int = 16,
    num_workers: int = 2,
    use_gpu: bool = False,
    retry_seconds: float = DEFAULTS.retry_seconds,
) -> Iterator[pa.Table]:
    """Yields tables of `shard, row, clip_id, clip_labels, fold` and the worker's columns, every chosen clip once.

    `worker_class(model, **worker_options)` is built in each of `num_workers` actors of one CPU (and one GPU with
    `use_gpu`). UserError where the cluster is too small.
    """
    import ray

    spans = row_group_spans(manifest) if row_groups is None else row_groups
    if not spans:
        return
    num_workers = num_actors(spans, batch_clips, num_workers)
    check_actors(num_workers, use_gpu)
    # Any: Ray's hints of map_batches do not know generators with further arguments.
    graph: Any = ray.data.from_items(
        [asdict(span) for span in spans], override_num_blocks=min(len(spans), MAX_READ_TASKS)
    )
    graph = graph.map_batches(
        _read_row_groups,
        fn_args=(dataset, manifest.versions, retry_seconds),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=CPUS_PER_READER,
        compute=ray.data.TaskPoolStrategy(
            size=math.ceil(num_workers * (READERS_PER_GPU if use_gpu else READERS_PER_CPU))
        ),
    ).map_batches(
        _ClipActor,
        fn_constructor_kwargs={"worker_class": worker_class, "model": model, "options": worker_options or {}},
        batch_size=batch_clips,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    # The caller shows progress: Ray Data stays silent, and does not warn of it either.
    graph.context.enable_progress_bars = False
    graph.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for batch in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        if batch.num_rows:
            yield batch


def missing_shards(manifest: DatasetManifest, output: Place) -> list[int]:
    """Shards of the data set that have no file of results below `output` yet."""
    present = {place.name for place in (output / "shards").list()}
    return [index for index, shard in enumerate(manifest.shards) if shard.file not in present]


def map_shards(
    dataset: Place,
    manifest: DatasetManifest,
    worker_class: Callable[..., ClipWorker],
    shards: list[int],
    *,
    console: Console,
    **pool: Any,
) -> Iterator[tuple[int, pa.Table]]:
    """Yields (index, rows in their order) of each of the shards as soon as it is whole; `pool` goes to `map_clips`."""
    import pyarrow.compute as pc

    clips = [sum(group.clips for group in shard.row_groups) for shard in manifest.shards]
    waiting: dict[int, list[pa.Table]] = {index: [] for index in shards}
    done = manifest.clips - sum(clips[index] for index in shards)
    console.progress(done, manifest.clips)
    spans = row_group_spans(manifest, shards=shards)
    for table in map_clips(dataset, manifest, worker_class, row_groups=spans, **pool):
        done += table.num_rows
        for index in sorted(set(table["shard"].to_pylist())):
            waiting[index].append(table.filter(pc.equal(table["shard"], index)))
            if sum(part.num_rows for part in waiting[index]) == clips[index]:
                yield index, pa.concat_tables(waiting.pop(index)).sort_by("row")
        console.progress(done, manifest.clips)
    assert not waiting, f"shards without all their rows: {sorted(waiting)}"


def write_shard(output: Place, shard: Shard, rows: pa.Table) -> None:
    """Writes the results of one shard under its name, in row groups of the same clips."""
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    first = 0
    with pq.ParquetWriter(buffer, rows.schema, compression="zstd") as writer:
        for group in shard.row_groups:  # written one by one: their sizes differ where a fold ends
            writer.write_table(rows.slice(first, group.clips), row_group_size=group.clips)
            first += group.clips
    (output / "shards" / shard.file).write_bytes(buffer.getvalue().to_pybytes())


def num_actors(spans: Iterable[RowGroupSpan], batch_clips: int, num_workers: int) -> int:
    """Actors that `map_clips` starts for these clips: no more than there are batches."""
    return min(num_workers, sum(-(-span.clips // batch_clips) for span in spans))


def check_pool(spans: Iterable[RowGroupSpan], settings: InferenceSettings) -> None:
    """UserError where the cluster has not what `map_clips` needs for these clips: for a command, before it writes."""
    check_actors(num_actors(spans, settings.batch_clips, settings.num_workers), settings.use_gpu)


def check_actors(num_workers: int, use_gpu: bool, section: str = "") -> None:
    """ConfigError where the cluster has not the CPUs or GPUs of so many actors, nor may start them.

    section: of the setting, with a dot.
    """
    import ray

    from beats_ray.launch import most_resources, refuse_or_wait

    if not ray.is_initialized():
        return
    resources = most_resources()
    for name, needed in (("CPU", num_workers + CPUS_PER_READER), ("GPU", num_workers if use_gpu else 0)):
        if resources.get(name, 0) < needed:
            refuse_or_wait(
                f"{section}num_workers={num_workers} needs {needed:g} {name}s, the cluster has "
                f"{resources.get(name, 0):g}; lower num_workers or add nodes"
            )


# --- inside the cluster -----------------------------------------------------------------------------------------------


def _read_row_groups(
    spans: pa.Table, dataset: Place, versions: dict[str, str], retry_seconds: float
) -> Iterator[pa.Table]:
    """Fetches row groups, again while storage fails, and decodes their FLAC; one output table per row group."""
    from beats_ray.data.clips import decode_clips

    for span in spans.to_pylist():
        place = dataset / "shards" / span["file"]
        group = RowGroupRef(span["file"], span["row_group"], span["clips"])
        read = partial(read_row_group, place, versions[group.file], group, [*COLUMNS, "fold"])
        rows = with_retries(read, retry_seconds)
        first = span["first_row"]
        yield pa.table(
            {
                "shard": pa.array(np.full(rows.num_rows, span["shard"], np.int32)),
                "row": pa.array(np.arange(first, first + rows.num_rows, dtype=np.int32)),
                "clip_id": rows["clip_id"],
                "clip_labels": rows["labels"],
                "fold": rows["fold"],
                "samples": pa.array([clip.wave_S.tobytes() for clip in decode_clips(rows)], pa.large_binary()),
            }
        )


class _ClipActor:
    """One process of the pool: loads the model once, pads batches, and turns the worker's results into columns."""

    def __init__(self, worker_class: Callable[..., ClipWorker], model: Place | None, options: dict[str, Any]) -> None:
        import ray
        import torch

        assigned = ray.get_runtime_context().get_assigned_resources()
        torch.set_num_threads(max(1, int(assigned.get("CPU", 1))))
        self._device = torch.device("cuda" if assigned.get("GPU") else "cpu")
        module = None if model is None else load_published(model).to(self._device)
        self._worker = worker_class(module, **options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        import torch

        wave_BS, num_samples_B = pad_clips(batch["samples"].to_pylist())
        with torch.inference_mode():
            columns = self._worker(wave_BS.to(self._device), num_samples_B.to(self._device))
        table = batch.drop_columns(["samples"])
        for name, values in columns.items():
            table = table.append_column(name, _column(values))
        return table


def pad_clips(clips: list[bytes]) -> "tuple[torch.Tensor, torch.Tensor]":
    """Clips of int16 samples as one zero-padded batch: wave_BS (int16) and num_samples_B (int64)."""
    import torch

    waves = [np.frombuffer(clip, np.int16) for clip in clips]
    num_samples_B = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    padded = np.zeros((len(waves), max(len(wave) for wave in waves)), np.int16)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = wave
    return torch.from_numpy(padded), num_samples_B


def _column(values: Any) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])
    return pa.array(values)


# --- published models on a node ---------------------------------------------------------------------------------------


def load_published(model: Place, field: str = "model") -> "torch.nn.Module":
    """A published model folder, or a released `.pt` file, in eval mode.

    A remote one is downloaded once per node, however many processes ask for it. UserError, which names the config's
    `field`, where it cannot be loaded.
    """
    try:
        return _load_local(model.path) if not model.is_remote else _load_remote(model)
    except ValueError as error:
        raise UserError(f"{field}={model.uri}: {error}") from None


def _load_local(path: str) -> "torch.nn.Module":
    from beats_ray.models import load_model

    return load_model(path)


def _load_remote(model: Place) -> "torch.nn.Module":
    cache = Path(tempfile.gettempdir()) / f"beats_ray_models_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / hashlib.sha256(f"{model.uri} {_state_of(model)}".encode()).hexdigest()[:24]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held while loading too, so that no other process prunes what is being read
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
            for place in _files_of(model):
                place.download(partial / place.name)
            partial.rename(folder)
        os.utime(folder)
        module = _load_local(str(folder / model.name))
        stored = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
        for old in stored[KEPT_MODELS:]:
            shutil.rmtree(old)
    return module


def _files_of(model: Place) -> list[Place]:
    """What to fetch: the model's folder, or a released file with the settings that ESPnet keeps beside it."""
    if not is_released_file(model):
        return [model]
    beside = model.parent / "config.yaml"
    return [model, beside] if beside.exists() else [model]


def _state_of(model: Place) -> list[tuple[str, int, int]]:
    """Changes whenever a file of the published model was written again."""
    what: Any = [model.path]
    if not is_released_file(model):
        what = pa.fs.FileSelector(model.path, recursive=True, allow_not_found=True)
    infos = model.filesystem.get_file_info(what)
    return sorted((info.path, info.size or 0, info.mtime_ns or 0) for info in infos)


def is_released_file(model: Place) -> bool:
    """Whether a model is a single file of another project's format rather than a folder of ours."""
    return model.name.endswith(RELEASED_SUFFIXES)


def model_sha256(model: Place) -> str:
    """Changes with any byte of a published model."""
    digest = hashlib.sha256()
    files = {"": model}
    if not is_released_file(model):
        files = {f"/{name}": model / name for name in model.sizes(recursive=True)}
    for name, place in files.items():
        digest.update(name.encode() + b"\0" + place.read_bytes())
    return digest.hexdigest()


def publish(module: "torch.nn.Module", model: Place) -> None:
    """Writes a module as a published model (see `models/checkpoints.py`)."""
    from beats_ray.models import save_model

    with tempfile.TemporaryDirectory(prefix="beats-ray-publish-") as scratch:
        save_model(module, Path(scratch) / "model")
        model.upload(Path(scratch) / "model")


def check_published(model: Place, field: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What the `config.json` of a published model says, of one of these kinds; a released file is described alike.

    UserError naming the config field for another kind, and where there is no model that can be read.
    """
    if is_released_file(model):
        from beats_ray.models import describe_model

        return describe_model(load_checked(model, field, kinds))
    config = _read_description(model, field)
    _check_kind(config, model, field, kinds)
    return config


def load_checked(model: Place, field: str, kinds: tuple[str, ...] = KINDS) -> "torch.nn.Module":
    """As `load_published`, of one of these kinds, a folder checked before it is read; errors as `check_published`."""
    from beats_ray.models import describe_model

    if not is_released_file(model):
        check_published(model, field, kinds)
    module = load_published(model, field)
    _check_kind(describe_model(module), model, field, kinds)
    return module


def _check_kind(config: dict[str, Any], model: Place, field: str, kinds: tuple[str, ...]) -> None:
    kind = config.get("kind")
    if kind not in kinds:
        raise UserError(f"{field}={model.uri}: holds kind={kind!r}; give a model of kind {' or '.join(kinds)}")


def _read_description(model: Place, field: str) -> dict[str, Any]:
    try:
        config = (model / "config.json").read_json()
    except FileNotFoundError:
        raise UserError(
            f"{field}={model.uri}: no published model there (no config.json); give a `model` folder or a released .pt"
        ) from None
    except ValueError as error:
        raise UserError(f"{field}={model.uri}: config.json is not valid JSON: {error}") from None
    return dict(config) if isinstance(config, dict) else {}
