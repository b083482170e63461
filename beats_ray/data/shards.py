"""Reading shards one row group at a time: range reads of the wanted columns, patch labels joined by clip id.

The tasks of the stream run this, so it imports pyarrow and numpy only.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.config import UserError
from beats_ray.data.manifest import DatasetManifest, shards_fingerprint
from beats_ray.data.plan import ClipPlan, RowGroupRef, Window
from beats_ray.data.storage import Place, storage_errors

COLUMNS = ["clip_id", "audio", "num_samples", "labels"]
READ_THREADS = 8  # row groups in flight in one task: object stores answer late and in parallel
EMIT_CLIPS = 64  # rows in one table on the way to the decode tasks
OPEN_FOOTERS = 1024


@dataclass(frozen=True)
class WindowReader:
    """Reads whole windows of a plan; small enough to be sent to every read task."""

    dataset: Place
    labels: Place | None
    plan: ClipPlan
    versions: dict[str, str]
    """sha256 of each shard: footers are remembered by it, so a data set prepared again is read afresh."""
    labels_version: str = ""
    """What `check_labels` returned: the same for the labels' footers."""

    def read(self, ordinals: range, start: int, stop: int) -> Iterator[pa.Table]:
        """The rows of positions [start, stop) that lie in these windows, in the plan's order, with their position."""
        with ThreadPoolExecutor(READ_THREADS) as threads:
            for ordinal in ordinals:
                window = self.plan.window(ordinal)
                tables = list(threads.map(self.read_row_group, window.row_groups))
                yield from _rows_in_order(window, tables, start, stop)

    def read_row_group(self, group: RowGroupRef) -> pa.Table:
        """The wanted columns of one row group, `patch_labels` among them where the stream has labels."""
        rows = _read_row_group(self.dataset / "shards" / group.file, self.versions[group.file], group, COLUMNS)
        if self.labels is None:
            return rows
        place = self.labels / "shards" / group.file
        try:
            labels = _read_row_group(place, self.labels_version, group, ["clip_id", "labels"])
        except FileNotFoundError:
            raise UserError(f"{place.uri}: missing; run `beats-ray tokenize` again") from None
        if not labels.column("clip_id").equals(rows.column("clip_id")):
            raise UserError(
                f"{place.uri}: row group {group.index} holds labels of other clips than {group.file} of "
                f"{self.dataset.uri}; run `beats-ray tokenize` again"
            )
        return rows.append_column("patch_labels", labels.column("labels"))


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


def _rows_in_order(window: Window, tables: list[pa.Table], start: int, stop: int) -> Iterator[pa.Table]:
    first = max(start, window.first_position) - window.first_position
    last = min(stop, window.stop_position) - window.first_position
    for begin in range(first, last, EMIT_CLIPS):
        places_B = np.arange(begin, min(begin + EMIT_CLIPS, last))
        slots_B, rows_B = window.slots_P[places_B], window.rows_P[places_B]
        by_group_B = np.argsort(slots_B, kind="stable")
        parts = [tables[slot].take(pa.array(rows_B[slots_B == slot])) for slot in np.unique(slots_B)]
        rows = pa.concat_tables(parts).take(pa.array(np.argsort(by_group_B)))
        yield rows.add_column(0, "position", pa.array(window.first_position + places_B, pa.int64())).combine_chunks()


def _read_row_group(place: Place, version: str, group: RowGroupRef, columns: list[str]) -> pa.Table:
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
    with place.filesystem.open_input_file(place.path) as stream:
        return pq.read_metadata(stream)
