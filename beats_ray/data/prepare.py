"""`prepare`: raw clips of any format, local or in an object store, to checked 16 kHz shards.

    manifest = prepare(config, lambda done, total: print(done, total))

One Ray Data job: each task takes the files of one shard, decodes and checks them and writes the shard straight to
storage, so the driver sees counts only and memory does not grow with the data. `dataset.json` comes last: a folder
without it holds no data set, and the same command goes on with the shards that are missing. The same source and
settings give the same bytes on any cluster, because the plan depends on the list of files alone.

Every file of the source is accounted for once: in `index/` (the clips of each file), in `quarantine.parquet` (files
that cannot be used, and why), or in `skipped.parquet` (files that the layout does not want, or that are no audio).
`beats_ray.data.verify` proves it. `missing.parquet` has what tables name and the source does not hold.
"""

import hashlib
import math
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from beats_ray.config import PrepareConfig, UserError
from beats_ray.data.datasets.audioset import read_audioset
from beats_ray.data.datasets.csv_table import find_table, read_csv_table
from beats_ray.data.datasets.esc50 import check_layout, read_esc50
from beats_ray.data.datasets.folder import read_folder
from beats_ray.data.datasets.parquet import read_parquet
from beats_ray.data.datasets.speech_commands import read_speech_commands
from beats_ray.data.datasets.unlabelled import read_unlabelled
from beats_ray.data.datasets.webdataset import read_webdataset
from beats_ray.data.decode import MIN_SAMPLES
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.shard_writer import FbankSums, ShardPlan, ShardResult, finished_result, write_shard
from beats_ray.data.source import (
    Quarantined,
    Reader,
    SourceClip,
    SourceListing,
    account_for_others,
    in_zip_too,
    require_folder,
    source_root,
    undecodable_files,
)
from beats_ray.data.storage import Place, StorageError, existing_place, open_place, with_retries, write_table
from beats_ray.telemetry import DONE_FILES, QUARANTINED_FILES, SOURCE_FILES, run_name

READERS: dict[str, Reader] = {
    "esc50": in_zip_too(read_esc50),
    "audioset": in_zip_too(read_audioset),
    "speech_commands": in_zip_too(read_speech_commands),
    "folder": in_zip_too(read_folder),
    "csv": in_zip_too(read_csv_table),
    "unlabelled": in_zip_too(read_unlabelled),
    "parquet": read_parquet,
    "webdataset": read_webdataset,
}
"""`kind` of the configuration to the function that lists such a source."""

THREADS = 16  # small requests to storage at one time
MIN_SHARDS = 16  # a small data set is split finer than `shard_mib` says: a shard is one task
EXPANSION = {".wav": 0.25, ".aif": 0.25, ".aiff": 0.25, ".au": 0.25, ".caf": 0.25, ".w64": 0.25, ".flac": 0.5}
OTHER_EXPANSION = 2.0  # lossy formats
"""Bytes of 16 kHz mono FLAC for each byte of a source file: rough, it only sets how large shards come out."""

QUARANTINE_SCHEMA = pa.schema(
    [("path", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("bytes", pa.int64())]
)


class TooManyBadClips(UserError):
    """More of the source had to be quarantined than `data.max_bad_clip_fraction` allows."""


def prepare(config: PrepareConfig, on_progress: Callable[[int, int], None]) -> DatasetManifest:
    """Prepares `config.source` into `config.output` and returns the manifest; `on_progress` gets (files done, files).

    Ray is initialised. A complete data set of the same source and settings is returned at once. UserError for a source
    that is missing or not of this kind and for an output that holds another data set; TooManyBadClips, with nothing
    written but the list of quarantined files, where the source is worse than allowed.
    """
    source, output = open_place(config.source), open_place(config.output)
    insist = partial(with_retries, seconds=config.data.retry_seconds)
    finished = insist(lambda: _finished(config, source, output))
    if finished:
        return finished
    if config.data.max_clip_seconds * SAMPLE_RATE_HZ < 2 * MIN_SAMPLES:  # pieces may be half as long
        raise UserError(
            f"data.max_clip_seconds={config.data.max_clip_seconds:g}: must be at least "
            f"{2 * MIN_SAMPLES / SAMPLE_RATE_HZ:g}; a clip needs one frame of the filterbank"
        )
    listing = insist(lambda: READERS[config.kind](source, config.layout))
    listing.quarantined += undecodable_files(source)
    insist(lambda: account_for_others(source, listing))
    insist(lambda: _check_quarantine(config, output, listing.num_files, listing.quarantined))
    plans = plan_shards(config, insist(lambda: source_root(source)), output, listing.clips)
    results = _finished_shards(plans)
    insist((output / "dataset.json").delete)  # of a set that has lost a shard: it is none until it is whole again
    progress = _Progress(output, listing, on_progress)
    progress.add(*results.values())
    for index, result in _run_on_ray({index: plan for index, plan in enumerate(plans) if index not in results}):
        results[index] = result
        progress.add(result)
    ordered = [results[index] for index in range(len(plans))]
    quarantined = listing.quarantined + [bad for result in ordered for bad in result.quarantined]
    insist(lambda: _check_quarantine(config, output, listing.num_files, quarantined))
    manifest = _manifest(config, source, listing, ordered, len(quarantined))
    lists = {"quarantine": quarantined, "skipped": listing.skipped, "missing": listing.missing}
    insist(lambda: _publish(output, manifest, plans, lists))
    return manifest


class _Progress:
    """Counts source files and tells the caller and Prometheus."""

    def __init__(self, output: Place, listing: SourceListing, on_progress: Callable[[int, int], None]) -> None:
        self._dataset = run_name(output.uri)
        self._total = listing.num_files
        self._done = self._bad = len(listing.quarantined)
        self._on_progress = on_progress

    def add(self, *results: ShardResult) -> None:
        """Shards that are done."""
        self._done += sum(result.num_files for result in results)
        self._bad += sum(len(result.quarantined) for result in results)
        for metric, files in ((SOURCE_FILES, self._total), (DONE_FILES, self._done), (QUARANTINED_FILES, self._bad)):
            metric.set(files, dataset=self._dataset)
        self._on_progress(self._done, self._total)


def _publish(
    output: Place,
    manifest: DatasetManifest,
    plans: list[ShardPlan],
    lists: dict[str, list[Quarantined]],
) -> None:
    """Everything but the shards and their index; `dataset.json` last."""
    _delete_others(output / "shards", {shard.file for shard in manifest.shards})
    _delete_others(output / "index", {plan.index.name for plan in plans})
    for name, items in lists.items():
        write_table(output / f"{name}.parquet", _quarantine_table(items))
    (output / "dataset.json").write_json(manifest.model_dump(mode="json"))


def check_source(config: PrepareConfig) -> None:
    """UserError for a source that is not there, empty or plainly not of this kind, and for an output that lies in it or
    holds another data set: what needs no cluster to see.

    Nothing is tried again: a store that does not answer the first question is most often a mistake in its address.
    """
    source, output = existing_place("source", config.source), open_place(config.output)
    if source.is_dir() and f"{output.uri}/".startswith(f"{source.uri}/"):
        raise UserError(f"output={output.uri}: lies in source={source.uri}, among the recordings; give another output")
    if source.is_dir():
        require_folder(source)
        if config.kind == "esc50":
            check_layout(source)
    if config.kind == "csv" and not source.name.lower().endswith(".zip"):
        find_table(source, config.layout)
    _finished(config, source, output)


def plan_shards(config: PrepareConfig, source: Place, output: Place, clips: list[SourceClip]) -> list[ShardPlan]:
    """Which task writes which clips: by split and fold, inside them in an order that has nothing to do with names."""
    by_part: dict[tuple[str, int], list[SourceClip]] = defaultdict(list)
    for clip in clips:
        by_part[clip.split, clip.fold].append(clip)
    groups: list[tuple[SourceClip, ...]] = []
    for part in sorted(by_part):
        ordered = sorted(by_part[part], key=_shuffled)
        count = -(-len(ordered) // config.data.row_group_clips)
        cuts = [len(ordered) * place // count for place in range(count + 1)]
        groups += [tuple(ordered[start:stop]) for start, stop in pairwise(cuts)]
    sizes = [sum(_prepared_bytes(clip) for clip in group) for group in groups]
    target_bytes = min(config.data.shard_mib * 2**20, max(1.0, sum(sizes) / MIN_SHARDS))
    shards: list[list[tuple[SourceClip, ...]]] = []
    filled = 0.0
    for group, size in zip(groups, sizes, strict=True):
        if not shards or filled + size / 2 > target_bytes:  # the boundary nearest to the target
            shards.append([])
            filled = 0.0
        shards[-1].append(group)
        filled += size
    return [
        ShardPlan(
            source=source,
            target=output / "shards" / f"{index:05d}.parquet",
            index=output / "index" / f"{index:05d}.parquet",
            groups=tuple(shard),
            row_group_clips=config.data.row_group_clips,
            max_clip_seconds=config.data.max_clip_seconds,
            overlap_seconds=config.data.overlap_seconds,
            file_timeout_seconds=config.data.file_timeout_seconds,
            retry_seconds=config.data.retry_seconds,
        )
        for index, shard in enumerate(shards)
    ]


def _shuffled(clip: SourceClip) -> tuple[bytes, str]:
    """Sorts clips in an order that has nothing to do with names, but leaves rows together that are read together."""
    container, inside, rest = clip.path.partition(".parquet!/")
    read_as_one = f"{container}{inside}{rest.split('/')[0]}" if inside else clip.clip_id
    return hashlib.sha256(read_as_one.encode()).digest(), clip.path


def _prepared_bytes(clip: SourceClip) -> float:
    return clip.bytes * EXPANSION.get(PurePosixPath(clip.path).suffix.lower(), OTHER_EXPANSION)


def _settings(config: PrepareConfig) -> dict[str, str | int | float]:
    """What the bytes depend on; the tolerance for bad and slow files and for failing storage is not."""
    settings = config.data.model_dump(exclude={"max_bad_clip_fraction", "file_timeout_seconds", "retry_seconds"})
    changed = config.layout.model_dump(mode="json", exclude_defaults=True)
    return {"kind": config.kind} | settings | {f"layout.{name}": str(value) for name, value in changed.items()}


def _finished(config: PrepareConfig, source: Place, output: Place) -> DatasetManifest | None:
    """The data set that the output holds, if it has all its shards. UserError for one of another source or settings."""
    if not (output / "dataset.json").exists():
        return None
    manifest = read_manifest(output)
    wanted = {"source": source.uri} | _settings(config)
    found = {"source": manifest.source} | manifest.settings
    for name in wanted:
        if wanted[name] != found.get(name):
            raise UserError(
                f"output={output.uri}: holds a data set made with {name}={found.get(name)!r}, now it is "
                f"{wanted[name]!r}; give another output, or delete that folder"
            )
    index, sizes = (output / "index").sizes(), (output / "shards").sizes()
    whole = all(shard.file in index and sizes.get(shard.file) == shard.bytes for shard in manifest.shards)
    return manifest if whole else None


def _finished_shards(plans: list[ShardPlan]) -> dict[int, ShardResult]:
    """What an earlier run that was stopped has done already."""
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda plan: with_retries(lambda: finished_result(plan), plan.retry_seconds), plans)
        return {index: result for index, result in enumerate(found) if result is not None}


def _run_on_ray(plans: dict[int, ShardPlan]) -> Iterator[tuple[int, ShardResult]]:
    """Yields each shard's index and result as it is done. Storage faults come as StorageError, on the driver."""
    import ray

    if not plans:
        return
    with quiet_ray_data():
        # Pickled here: Ray Data would try Arrow first and complain.
        items = [{"index": index, "plan": pickle.dumps(plan)} for index, plan in plans.items()]
        results = ray.data.from_items(items, override_num_blocks=len(items)).map(_task)
        for row in results.iter_rows():
            if row["error"]:
                raise StorageError(row["error"])
            yield row["index"], pickle.loads(row["result"])  # noqa: S301 - our own task wrote it


def _task(row: dict[str, Any]) -> dict[str, object]:
    plan: ShardPlan = pickle.loads(row["plan"])  # noqa: S301 - our own driver wrote it
    try:
        return {"index": row["index"], "result": pickle.dumps(write_shard(plan)), "error": ""}
    except UserError as error:
        return {"index": row["index"], "result": b"", "error": str(error)}


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """The caller shows progress: Ray Data's own bars stay away."""
    import ray

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = before


def _check_quarantine(config: PrepareConfig, output: Place, num_files: int, bad: list[Quarantined]) -> None:
    limit = config.data.max_bad_clip_fraction
    if len(bad) < num_files and len(bad) <= limit * num_files:
        return
    for name in ("shards", "index"):
        _delete_others(output / name, set())
    write_table(output / "quarantine.parquet", _quarantine_table(bad))
    (reason, worst), *others = Counter(item.reason for item in bad).most_common()
    names = sorted(item.path.rsplit("/", 1)[-1] for item in bad if item.reason == reason)
    examples = ", ".join(names[:3]) + (", ..." if worst > 3 else "")
    also = "".join(f", {count} x {name}" for name, count in others)
    raise TooManyBadClips(
        f"data.max_bad_clip_fraction={limit:g}: {len(bad)} of {num_files} files ({len(bad) / num_files:.1%}) cannot be "
        f"used: {worst} x {reason} ({examples}){also}; all of them are listed in {output.uri}/quarantine.parquet; "
        f"mend or remove them, or set data.max_bad_clip_fraction={_rounded_up(len(bad) / num_files):g}"
    )


def _rounded_up(fraction: float) -> float:
    return min(1.0, math.ceil(round(100 * fraction, 6)) / 100)


def _quarantine_table(bad: list[Quarantined]) -> pa.Table:
    rows = [vars(item) for item in sorted(bad, key=lambda item: item.path)]
    return pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)


def _delete_others(folder: Place, keep: set[str]) -> None:
    for place in folder.list():
        if place.name not in keep and place.name.endswith(".parquet"):
            place.delete()


def _manifest(
    config: PrepareConfig, source: Place, listing: SourceListing, results: list[ShardResult], num_bad: int
) -> DatasetManifest:
    shards = tuple(result.shard for result in results if result.shard)
    clips_by_fold: Counter[str] = Counter()
    clips_by_split: Counter[str] = Counter()
    for group in (group for shard in shards for group in shard.row_groups):
        clips_by_fold[str(group.fold)] += group.clips
        clips_by_split[group.split] += group.clips
    fbank = sum((result.fbank for result in results), FbankSums())
    return DatasetManifest(
        name=source.name,
        label_names=listing.label_names,
        multi_label=listing.multi_label,
        clips=sum(clips_by_fold.values()),
        clips_by_fold=dict(sorted(clips_by_fold.items(), key=lambda item: int(item[0]))),
        clips_by_split=dict(sorted(clips_by_split.items())),
        seconds=round(sum(result.num_samples for result in results) / SAMPLE_RATE_HZ, 3),
        fbank_mean=round(fbank.mean, 5),
        fbank_std=round(fbank.std, 5),
        source=source.uri,
        source_files=listing.num_files,
        quarantined=num_bad,
        skipped=len(listing.skipped),
        missing=len(listing.missing),
        shards=shards,
        settings=_settings(config),
    )
