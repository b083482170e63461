"""`beats-ray prepare --verify DST`: proof that a prepared data set is whole and every source file accounted for.

One Ray Data job reads every shard again: its checksum, its row groups as `dataset.json` says, every clip decoded, every
label in the vocabulary, every row named by the index. Then the books are closed: each source file is in the index, in
quarantine.parquet or in skipped.parquet, in exactly one of them, and their numbers are those of `dataset.json`.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from beats_ray.config import UserError, VerifySettings
from beats_ray.data.clips import decode_clips
from beats_ray.data.manifest import DatasetManifest, Shard, read_manifest
from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.prepare import quiet_ray_data
from beats_ray.data.shard_writer import SCHEMA
from beats_ray.data.storage import Place, open_place, read_table, with_retries

SHOWN_FAULTS = 5
THREADS = 16


class DatasetDamaged(UserError):
    """A prepared data set is not what its `dataset.json` says."""


@dataclass(frozen=True)
class Accounts:
    """Where the source files of a data set went."""

    source_files: int
    """Wanted files: those in shards and those in quarantine."""
    in_shards: int
    quarantined: int
    skipped: int
    clips: int
    shards: int

    def __str__(self) -> str:
        return (
            f"{self.source_files} source files = {self.in_shards} in {self.shards} shards ({self.clips} clips) + "
            f"{self.quarantined} quarantined; {self.skipped} other files skipped"
        )


def verify(
    dataset_uri: str,
    on_progress: Callable[[int, int], None],
    retry_seconds: float = VerifySettings().retry_seconds,
) -> Accounts:
    """Checks a prepared data set, on an initialised Ray; `on_progress` gets (clips done, clips).

    DatasetDamaged, naming the first faults, where anything is not as `dataset.json` says. Reads that fail are repeated
    for `retry_seconds`.
    """
    import ray

    dataset = open_place(dataset_uri)
    manifest = with_retries(lambda: read_manifest(dataset), retry_seconds)
    items = [{"shard": shard.model_dump_json()} for shard in manifest.shards]
    check = partial(_check_row, dataset=dataset, num_labels=len(manifest.label_names), retry_seconds=retry_seconds)
    faults: list[str] = []
    damaged: list[str] = []
    ids: list[pa.Array] = []
    clips = samples = 0
    if items:
        with quiet_ray_data():
            for row in ray.data.from_items(items, override_num_blocks=len(items)).map(check).iter_rows():
                faults += row["faults"]
                damaged += [row["file"]] if row["faults"] else []
                ids.append(pa.array(row["clip_hashes"], pa.uint64()))
                clips += row["clips"]
                samples += row["samples"]
                on_progress(clips, manifest.clips)
    faults += _duplicates(ids)
    accounts, more = _close_books(dataset, manifest, partial(with_retries, seconds=retry_seconds))
    faults += more
    if clips != manifest.clips:
        faults.append(f"the shards hold {clips} clips, dataset.json says clips={manifest.clips}")
    if abs(samples / SAMPLE_RATE_HZ - manifest.seconds) > 1e-3 + 1e-9 * manifest.seconds:
        faults.append(f"the clips last {samples / SAMPLE_RATE_HZ:.3f} s, dataset.json says seconds={manifest.seconds}")
    if faults:
        more_faults = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        remedy = "delete dataset.json and prepare it again"
        if damaged:
            shown = ", ".join(f"index/{name}" for name in damaged[:SHOWN_FAULTS])
            others = ", ..." if len(damaged) > SHOWN_FAULTS else ""
            remedy = f"delete {shown}{others}, and prepare it again: it makes the shards without an index anew"
        raise DatasetDamaged(f"{dataset.uri}: {'; '.join(faults[:SHOWN_FAULTS])}{more_faults}; {remedy}")
    return accounts


def _check_row(row: dict[str, Any], dataset: Place, num_labels: int, retry_seconds: float) -> dict[str, Any]:
    shard = Shard.model_validate_json(row["shard"])
    found: dict[str, Any] = {"file": shard.file, "faults": [], "clip_hashes": [], "clips": 0, "samples": 0}
    columns = ["clip_id", "row_group", "num_samples"]
    try:
        data = with_retries((dataset / "shards" / shard.file).read_bytes, retry_seconds)
        index = with_retries(lambda: read_table(dataset / "index" / shard.file, columns), retry_seconds)
    except FileNotFoundError:
        faults: Iterable[str] = ["it or its index is missing"]
    else:
        faults = _check_shard(data, index, shard, num_labels, found)
    found["faults"] += [f"shards/{shard.file}: {fault}" for fault in faults]
    return found


def _check_shard(data: bytes, index: pa.Table, shard: Shard, num_labels: int, found: dict[str, Any]) -> Iterable[str]:
    """Yields what is wrong with one shard, and counts into `found`."""
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield "its checksum is not that of dataset.json"
        return
    file = pq.ParquetFile(io.BytesIO(data))
    if not file.schema_arrow.equals(SCHEMA):
        yield "its columns are not those of this format"
        return
    if file.num_row_groups != len(shard.row_groups):
        yield f"it has {file.num_row_groups} row groups, dataset.json says {len(shard.row_groups)}"
        return
    for number, group in enumerate(shard.row_groups):
        rows = file.read_row_group(number)
        names = rows["clip_id"].to_pylist()
        kinds = set(zip(rows["fold"].to_pylist(), rows["split"].to_pylist(), strict=True))
        if rows.num_rows != group.clips or kinds != {(group.fold, group.split)}:
            yield f"row group {number} is not as dataset.json says"
        named = index.filter(pa.compute.equal(index["row_group"], number))
        if named["clip_id"].to_pylist() != names or not named["num_samples"].equals(rows["num_samples"]):
            yield f"row group {number} holds other clips than its index says"
        labels = pa.compute.list_flatten(rows["labels"]).to_pylist()
        outside = [label for label in labels if not 0 <= label < num_labels]
        if outside:
            yield f"row group {number}: label id {outside[0]} is outside the vocabulary of {num_labels}"
        try:
            decode_clips(rows)
        except UserError as error:
            yield str(error)
        found["clips"] += rows.num_rows
        found["samples"] += pa.compute.sum(rows["num_samples"]).as_py()
        found["clip_hashes"] += [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest()) for n in names]


def _duplicates(ids: list[pa.Array]) -> list[str]:
    everything = pa.chunked_array(ids, pa.uint64())
    repeated = len(everything) - len(everything.unique())
    return [f"{repeated} clip ids occur more than once"] if repeated else []


def _close_books(
    dataset: Place, manifest: DatasetManifest, insist: Callable[[Callable[[], Any]], Any]
) -> tuple[Accounts, list[str]]:
    """Counts the source files in each account; the second value says what does not add up."""

    def paths_in(place: Place, column: str) -> pa.ChunkedArray:
        return insist(lambda: read_table(place, [column]))[column]

    with ThreadPoolExecutor(THREADS) as threads:
        tables = threads.map(lambda place: paths_in(place, "source"), insist((dataset / "index").list))
        used = {source for column in tables for source in column.unique().to_pylist()}
    listed: list[str] = list(used)
    counts: dict[str, int] = {}
    for name in ("quarantine", "skipped"):
        try:
            paths = paths_in(dataset / f"{name}.parquet", "path").to_pylist()
        except FileNotFoundError:
            return Accounts(0, 0, 0, 0, 0, 0), [f"{name}.parquet is missing"]
        counts[name] = len(paths)
        listed += paths
    faults = [f"{path!r} is in two accounts" for path, times in Counter(listed).items() if times > 1]
    accounts = Accounts(
        source_files=len(used) + counts["quarantine"],
        in_shards=len(used),
        quarantined=counts["quarantine"],
        skipped=counts["skipped"],
        clips=manifest.clips,
        shards=len(manifest.shards),
    )
    for name, mine in (("source_files", accounts.source_files), ("quarantined", accounts.quarantined),
                       ("skipped", accounts.skipped)):  # fmt: skip
        if getattr(manifest, name) != mine:
            faults.append(f"{mine} files are accounted for as {name}, dataset.json says {getattr(manifest, name)}")
    return accounts, faults
