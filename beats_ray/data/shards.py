"""Reading shards one row group at a time: range reads of the wanted columns, patch labels joined by clip id.

The tasks of the stream run this, so it imports pyarrow and numpy only.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beats_ray.data.columns import binary_views
from beats_ray.data.lanes import Lane
from beats_ray.data.manifest import DatasetManifest, Shard, shards_fingerprint
from beats_ray.data.plan import ClipPlan, RowGroupRef, Window
from beats_ray.data.storage import Place, read_table, storage_errors, with_retries
from beats_ray.errors import UserError

COLUMNS = ["clip_id", "audio", "num_samples", "labels"]
READ_THREADS = 8  # row groups in flight in one task: object stores answer late and in parallel
OPEN_FOOTERS = 1024
LABEL_THREADS = 32


@dataclass(frozen=True)
class WindowReader:
    """Reads whole windows of a plan; small enough to be sent to every read task."""

    dataset: Place
    labels: Place | None
    plan: ClipPlan | Lane
    versions: dict[str, str]
    """sha256 of each shard: footers are remembered by it, so a data set prepared again is read afresh."""
    labels_version: str = ""
    """What `check_labels` returned: the same for the labels' footers."""
    retry_seconds: float = 0.0
    """How long a read is tried again while storage fails."""
    clip_bytes: int = 0
    """Mean size of a clip in its shard."""

    def read(self, ordinals: Sequence[int], start: int, stop: int, table_clips: int) -> Iterator[pa.Table]:
        """The rows of positions, of a lane places, [start, stop) that lie in these windows, in the plan's order.

        A table holds at most table_clips rows and begins, unless a window does, a multiple of it after `start`. Two
        columns are added: `position`, and `read_seconds`, the time that this task waited for storage, per clip.
        """
        with ThreadPoolExecutor(READ_THREADS) as threads:
            for ordinal in ordinals:
                window = self.plan.window(ordinal)
                begun = time.perf_counter()
                tables = list(threads.map(self.read_group, window.row_groups))
                seconds = (time.perf_counter() - begun) / max(1, len(window.rows_P))
                rows = _WindowRows(self.plan, window, tables, seconds)
                first, last = max(start, window.first_position), min(stop, window.stop_position)
                cuts = range(first + (start - first) % table_clips, last, table_clips)
                for begin, end in pairwise(sorted({first, *cuts, last})):
                    yield rows.between(begin, end)

    def read_group(self, group: RowGroupRef) -> pa.Table:
        """The wanted columns of one row group, `patch_labels` among them where the stream has labels."""
        rows = self._read(self.dataset, self.versions[group.file], group, COLUMNS)
        if self.labels is None:
            return rows
        place = self.labels / "shards" / group.file
        try:
            labels = self._read(self.labels, self.labels_version, group, ["clip_id", "labels"])
        except FileNotFoundError:
            raise UserError(f"{place.uri}: missing; run `beats-ray tokenize` again") from None
        if not labels.column("clip_id").equals(rows.column("clip_id")):
            raise UserError(
                f"{place.uri}: row group {group.index} holds labels of other clips than {group.file} of "
                f"{self.dataset.uri}; run `beats-ray tokenize` again"
            )
        return rows.append_column("patch_labels", labels.column("labels"))

    def _read(self, folder: Place, version: str, group: RowGroupRef, columns: list[str]) -> pa.Table:
        place = folder / "shards" / group.file
        return with_retries(lambda: read_row_group(place, version, group, columns), self.retry_seconds)


def clip_labels(
    dataset: Place, groups: Sequence[RowGroupRef], versions: dict[str, str], retry_seconds: float
) -> list[list[list[int]]]:
    """The label ids of each clip, by row group: one small column of every shard is read, no audio.

    versions: see `WindowReader`.
    """
    return [columns["labels"] for columns in _read_small(dataset, groups, versions, retry_seconds, ["labels"])]


def clip_ids_and_labels(
    dataset: Place, groups: Sequence[RowGroupRef], versions: dict[str, str], retry_seconds: float
) -> tuple[list[list[str]], list[list[list[int]]]]:
    """The same with the ids of the clips before them."""
    found = _read_small(dataset, groups, versions, retry_seconds, ["clip_id", "labels"])
    return [columns["clip_id"] for columns in found], [columns["labels"] for columns in found]


def _read_small(
    dataset: Place, groups: Sequence[RowGroupRef], versions: dict[str, str], retry_seconds: float, names: list[str]
) -> list[dict[str, list[Any]]]:
    def read(group: RowGroupRef) -> dict[str, list[Any]]:
        place = dataset / "shards" / group.file
        table = with_retries(lambda: read_row_group(place, versions[group.file], group, names), retry_seconds)
        return table.to_pydict()

    with ThreadPoolExecutor(LABEL_THREADS) as threads:
        return list(threads.map(read, groups))


def check_schema(dataset: Place, manifest: DatasetManifest) -> None:
    """UserError for a data set that would fail in mid-epoch: before a run starts, and without reading audio.

    Every shard must be there with its size, the first and the last with the columns of this format; by the index, no
    clip id may occur twice and no label lie outside the vocabulary. `beats-ray prepare --verify` reads everything.
    """
    sizes = (dataset / "shards").sizes()
    for shard in manifest.shards:
        if sizes.get(shard.file) != shard.bytes:
            found = f"{sizes[shard.file]} bytes" if shard.file in sizes else "missing"
            raise UserError(
                f"{dataset.uri}/shards/{shard.file}: {found}, dataset.json says {shard.bytes} bytes; copy it again or "
                "prepare the data set again"
            )
    for shard in {one.file: one for one in manifest.shards[:1] + manifest.shards[-1:]}.values():
        _check_columns(dataset / "shards" / shard.file, shard)
    _check_index(dataset, manifest)


def _check_index(dataset: Place, manifest: DatasetManifest) -> None:
    with ThreadPoolExecutor(LABEL_THREADS) as threads:
        tables = list(threads.map(lambda place: read_table(place, ["clip_id", "labels"]), (dataset / "index").list()))
    if not tables:  # a data set that another program has written
        return
    rows = pa.concat_tables(tables)
    names = pc.value_counts(rows["clip_id"])
    twice = names.filter(pc.greater(names.field("counts"), 1))
    if len(twice):
        raise UserError(
            f"{dataset.uri}: clip id {twice[0]['values'].as_py()!r} occurs {twice[0]['counts'].as_py()} times; prepare "
            "the data set again"
        )
    labels = pc.list_flatten(rows["labels"])
    outside = labels.filter(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, len(manifest.label_names))))
    if len(outside):
        raise UserError(
            f"{dataset.uri}: label id {outside[0].as_py()} is outside the vocabulary of {len(manifest.label_names)} "
            "labels; prepare the data set again"
        )


def _check_columns(place: Place, shard: Shard) -> None:
    footer = _footer(place, shard.sha256)
    present = footer.schema.to_arrow_schema()
    for name in COLUMNS:
        if name not in present.names:
            raise UserError(f"{place.uri}: column {name!r} is missing; prepare the data set again")
    if footer.num_row_groups != len(shard.row_groups):
        raise UserError(
            f"{place.uri}: has {footer.num_row_groups} row groups, dataset.json says {len(shard.row_groups)}; "
            "prepare the data set again"
        )


def check_labels(labels: Place, manifest: DatasetManifest, dataset: Place) -> str:
    """UserError unless `labels` was made for exactly these shards and has a file for each; returns its version."""
    try:
        content = (labels / "labels.json").read_bytes()
        fingerprint = json.loads(content).get("fingerprint")
    except FileNotFoundError:
        raise UserError(f"{labels.uri}: no labels here (no labels.json); run `beats-ray tokenize` first") from None
    except (ValueError, AttributeError):
        raise UserError(f"{labels.uri}/labels.json: not a JSON object; run `beats-ray tokenize` again") from None
    if fingerprint != shards_fingerprint(manifest):
        raise UserError(
            f"{labels.uri}/labels.json: fingerprint={fingerprint!r} is not that of {dataset.uri}; these labels belong "
            "to other shards: run `beats-ray tokenize` again"
        )
    present = {place.name for place in (labels / "shards").list()}
    missing = [shard.file for shard in manifest.shards if shard.file not in present]
    if missing:
        raise UserError(f"{labels.uri}/shards/{missing[0]}: missing; run `beats-ray tokenize` again")
    return hashlib.sha256(content).hexdigest()


class _WindowRows:
    """The rows of a window's row groups in the order of the plan. The audio of a row is copied once."""

    def __init__(self, plan: ClipPlan | Lane, window: Window, tables: Sequence[pa.Table], read_seconds: float) -> None:
        self._plan = plan
        self._first_position = window.first_position
        self._read_seconds = read_seconds
        self._others = pa.concat_tables([table.drop_columns(["audio"]) for table in tables]).combine_chunks()
        clips_G = np.array([table.num_rows for table in tables])
        first_G = np.cumsum(clips_G) - clips_G
        num_samples_P = self._others.column("num_samples").to_numpy()[first_G[window.slots_P] + window.rows_P]
        window = plan.by_length(window, num_samples_P)
        self._row_P = first_G[window.slots_P] + window.rows_P
        self._audio = [view for table in tables for view in binary_views(table.column("audio"))]

    def between(self, start: int, stop: int) -> pa.Table:
        """The rows of positions [start, stop)."""
        row_B = self._row_P[start - self._first_position : stop - self._first_position]
        audio = [self._audio[row] for row in row_B]
        ends_B = np.cumsum([0, *map(len, audio)], dtype=np.int64)
        data = [None, pa.py_buffer(ends_B), pa.py_buffer(b"".join(audio))]
        columns = {
            "position": pa.array(self._plan.positions(start, stop), pa.int64()),
            "audio": pa.Array.from_buffers(pa.large_binary(), len(audio), data),
            "read_seconds": pa.array(np.full(len(audio), self._read_seconds, np.float32)),
        }
        others = self._others.take(pa.array(row_B))
        return pa.table(columns | {name: others.column(name) for name in others.column_names})


def read_row_group(place: Place, version: str, group: RowGroupRef, columns: list[str]) -> pa.Table:
    """The columns of one row group by range reads. UserError where the file is not what `group` says.

    version: footers are remembered by it.
    """
    with storage_errors(place.uri), place.filesystem.open_input_file(place.path) as stream:
        shard = pq.ParquetFile(stream, metadata=_footer(place, version), pre_buffer=True)
        if group.index >= shard.num_row_groups or shard.metadata.row_group(group.index).num_rows != group.clips:
            raise UserError(f"{place.uri}: row group {group.index} is not as dataset.json says; make this file again")
        missing = [name for name in columns if name not in shard.schema_arrow.names]
        if missing:
            raise UserError(f"{place.uri}: column {missing[0]!r} is missing; make this file again")
        return shard.read_row_group(group.index, columns=columns, use_threads=False)


@lru_cache(maxsize=OPEN_FOOTERS)
def _footer(place: Place, _version: str) -> pq.FileMetaData:
    with storage_errors(place.uri), place.filesystem.open_input_file(place.path) as stream:
        return pq.read_metadata(stream)
