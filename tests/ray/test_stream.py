"""The stream from real shards: what is read, in which order it arrives, and that labels and crops stay together."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.tones import write_tones

from beats_ray.config import StreamSettings, UserError
from beats_ray.data.batches import MicroBatch, iterate_eval_batches, iterate_micro_batches
from beats_ray.data.clips import clip_samples_of, example_decoder
from beats_ray.data.flac import encode_flac
from beats_ray.data.lanes import Dealing
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard, read_manifest, shards_fingerprint
from beats_ray.data.pacing import PAUSE_SECONDS, PauseWhileFull
from beats_ray.data.parts import ClipPart
from beats_ray.data.plan import LABELS_PER_PATCH_ROW, SAMPLES_PER_PATCH_ROW, build_plan, patch_labels_in
from beats_ray.data.shards import check_labels, check_schema, clip_labels
from beats_ray.data.storage import Place, open_place, write_table
from beats_ray.data.stream import (
    build_eval_stream,
    build_streams,
    example_spec,
    open_reader,
    read_windows,
    rounds_of_a_block,
    share_cpus,
)
from beats_ray.errors import find_user_error
from beats_ray.objectstore import EmbeddedObjectStore

CLIP_SECONDS = 0.8
SETTINGS = StreamSettings(clip_seconds=CLIP_SECONDS, shuffle_window_clips=14)
CLASSES = 3


def write_dataset(
    dataset: Place, shards: int = 2, groups_per_shard: int = 6, clips_per_group: int = 5
) -> DatasetManifest:
    """Clips of 0.1 to 2.4 s whose sample s is known from clip and s alone; fold = row group modulo 3 + 1."""
    records, number = [], 0
    for shard in range(shards):
        tables, groups = [], []
        for group in range(groups_per_shard):
            numbers = range(number, number + clips_per_group - group % 2)
            number = numbers.stop
            tables.append(shard_rows(numbers, fold=group % 3 + 1))
            groups.append(RowGroup(clips=len(numbers), fold=group % 3 + 1, split=""))
        place = dataset / "shards" / f"{shard:05d}.parquet"
        place.write_bytes(parquet_of(tables))
        record = Shard(file=place.name, sha256=f"sha-{shard}", bytes=place.size_bytes(), row_groups=tuple(groups))
        records.append(record)
    manifest = DatasetManifest(
        name="ramps", label_names=("a", "b", "c"), clips=number, clips_by_fold={}, clips_by_split={},
        seconds=number * 1.2, fbank_mean=0.0, fbank_std=1.0, source="", source_files=number, quarantined=0,
        shards=tuple(records),
    )  # fmt: skip
    (dataset / "dataset.json").write_json(manifest.model_dump(mode="json"))
    return manifest


def shard_rows(numbers: range, fold: int) -> pa.Table:
    waves = [wave_of(number) for number in numbers]
    return pa.table(
        {
            "clip_id": [f"clip-{number}" for number in numbers],
            "audio": pa.array([encode_flac(wave) for wave in waves], pa.binary()),
            "num_samples": pa.array([len(wave) for wave in waves], pa.int32()),
            "labels": pa.array([labels_of(number) for number in numbers], pa.list_(pa.int16())),
            "fold": pa.array([fold] * len(waves), pa.int8()),
            "split": [""] * len(waves),
        }
    )


def parquet_of(tables: list[pa.Table]) -> bytes:
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, tables[0].schema, compression="none") as writer:
        for table in tables:
            writer.write_table(table)
    return buffer.getvalue()


def wave_of(number: int) -> np.ndarray:
    """Patch row r of clip n holds the values around 100 r: a crop shows where it was cut."""
    samples = 1600 + 2311 * (number % 17)
    return (np.arange(samples) // SAMPLES_PER_PATCH_ROW * 100 + number % 50).astype(np.int16)


def labels_of(number: int) -> list[int]:
    return [number % CLASSES, 2][: 1 + number % 2]


def write_labels(labels: Place, dataset: Place, manifest: DatasetManifest, swap: bool = False) -> None:
    """Patch labels that count the clip's patches: label i belongs to patch row i // 8."""
    for shard in manifest.shards:
        tables = []
        source = pq.ParquetFile(io.BytesIO((dataset / "shards" / shard.file).read_bytes()))
        for group in range(source.num_row_groups):
            rows = source.read_row_group(group, columns=["clip_id", "num_samples"])
            ids = rows.column("clip_id").to_pylist()
            if swap:
                ids[:2] = reversed(ids[:2])
            values = [
                np.arange(patch_labels_in(count), dtype=np.int16) for count in rows.column("num_samples").to_pylist()
            ]
            tables.append(pa.table({"clip_id": ids, "labels": pa.array(values, pa.list_(pa.int16()))}))
        (labels / "shards" / shard.file).write_bytes(parquet_of(tables))
    (labels / "labels.json").write_json({"fingerprint": shards_fingerprint(manifest)})


def read_examples(
    dataset: Place,
    manifest: DatasetManifest,
    settings: StreamSettings,
    span: tuple[int, int],
    labels: Place | None = None,
) -> dict[str, np.ndarray]:
    """The positions from span[0] up to span[1] as the tasks of the stream make them, without a cluster."""
    plan = build_plan(manifest, seed=4, folds=settings.folds, shuffle_window_clips=settings.shuffle_window_clips)
    reader = open_reader(dataset, manifest, plan, settings, labels)
    rows = pa.concat_tables(reader.read(plan.windows_between(*span), *span, table_clips=6))
    return example_decoder(example_spec(manifest, settings, plan, crop_seed=4))(rows)


def planned_ids(dataset: Place, manifest: DatasetManifest) -> list[str]:
    """The clip ids of the first epoch, looked up in the shards one by one."""
    plan = build_plan(manifest, seed=4, shuffle_window_clips=SETTINGS.shuffle_window_clips)
    ids = []
    for ordinal in range(plan.windows_per_epoch):
        window = plan.window(ordinal)
        for slot, row in zip(window.slots_P, window.rows_P, strict=True):
            group = window.row_groups[slot]
            with pq.ParquetFile((dataset / "shards" / group.file).path) as shard:
                ids.append(shard.read_row_group(group.index, columns=["clip_id"]).column(0)[int(row)].as_py())
    return ids


@pytest.fixture
def dataset(tmp_path: Path) -> Place:
    place = open_place(str(tmp_path / "dataset"))
    write_dataset(place)
    return place


# --- what the tasks do, without a cluster ---------------------------------------------------------------------------


def write_index(dataset: Place, ids: list[str], labels: list[list[int]]) -> None:
    rows = {"clip_id": ids, "labels": pa.array(labels, pa.list_(pa.int16()))}
    write_table(dataset / "index" / "00000.parquet", pa.table(rows))


@pytest.mark.unit
def test_mistakes_that_would_show_in_mid_epoch_are_found_before_it(dataset: Place) -> None:
    manifest = read_manifest(dataset)
    check_schema(dataset, manifest)
    write_index(dataset, ["a", "b"], [[0], [1, 2]])
    check_schema(dataset, manifest)
    write_index(dataset, ["a", "b", "a"], [[0], [1], [2]])
    with pytest.raises(UserError, match=r"clip id 'a' occurs 2 times; prepare the data set again"):
        check_schema(dataset, manifest)
    write_index(dataset, ["a", "b"], [[0], [3]])
    with pytest.raises(UserError, match=r"label id 3 is outside the vocabulary of 3 labels"):
        check_schema(dataset, manifest)
    write_index(dataset, ["a"], [[0]])
    shard = dataset / "shards" / manifest.shards[1].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=rf"00001.parquet: {len(whole) - 1} bytes, dataset.json says {len(whole)} bytes"
    ):
        check_schema(dataset, manifest)
    shard.delete()
    with pytest.raises(UserError, match=r"00001.parquet: missing, dataset.json says"):
        check_schema(dataset, manifest)
    narrow = parquet_of([shard_rows(range(4), fold=1).drop_columns(["num_samples"])])
    shard.write_bytes(narrow)
    changed = manifest.shards[1].model_copy(update={"bytes": len(narrow), "sha256": "narrow"})
    with pytest.raises(UserError, match=r"00001.parquet: column 'num_samples' is missing"):
        check_schema(dataset, manifest.model_copy(update={"shards": (manifest.shards[0], changed)}))


@pytest.mark.unit
def test_examples_are_the_clips_of_the_plan_cropped_or_padded(dataset: Place) -> None:
    manifest = read_manifest(dataset)
    columns = read_examples(dataset, manifest, SETTINGS, (3, 50))
    samples = clip_samples_of(CLIP_SECONDS)
    assert columns["position"].tolist() == list(range(3, 50))
    assert columns["clip_id"].tolist() == planned_ids(dataset, manifest)[3:50]
    lengths = set()
    for row, clip_id in enumerate(columns["clip_id"]):
        number = int(clip_id.split("-")[1])
        wave, length = wave_of(number), int(columns["num_samples"][row])
        offset = int(columns["audio"][row, 0]) // 100 * SAMPLES_PER_PATCH_ROW
        assert length == min(len(wave), samples)
        assert offset + length <= len(wave)
        assert np.array_equal(columns["audio"][row, :length], wave[offset : offset + length])
        assert not columns["audio"][row, length:].any()
        assert set(np.flatnonzero(columns["targets"][row])) == set(labels_of(number))
        lengths.add((offset > 0, length < samples))
    assert lengths == {(False, False), (True, False), (False, True)}  # whole, cropped and padded clips were among them


@pytest.mark.unit
def test_patch_labels_are_cut_with_the_audio_and_end_with_it(dataset: Place, tmp_path: Path) -> None:
    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    write_labels(labels, dataset, manifest)
    columns = read_examples(dataset, manifest, SETTINGS, (0, 54), labels)
    offsets = columns["audio"][:, 0].astype(int) // 100
    for offset, length, found in zip(offsets, columns["num_samples"], columns["patch_labels"], strict=True):
        count = patch_labels_in(int(length))
        assert found[:count].tolist() == list(
            range(offset * LABELS_PER_PATCH_ROW, offset * LABELS_PER_PATCH_ROW + count)
        )
        assert (found[count:] == -1).all()
    assert offsets.max() > 0
    assert columns["patch_labels"].shape[1] == patch_labels_in(clip_samples_of(CLIP_SECONDS))


@pytest.mark.unit
def test_only_the_row_groups_and_columns_that_are_wanted_are_read(dataset: Place) -> None:
    manifest = read_manifest(dataset)
    chosen = {
        (shard.file, i) for shard in manifest.shards for i, group in enumerate(shard.row_groups) if group.fold == 2
    }
    for shard in manifest.shards:  # everything else becomes noise: reading it would fail
        path = Path((dataset / "shards" / shard.file).path)
        data, footer = bytearray(path.read_bytes()), pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            for column in range(footer.num_columns):
                chunk = footer.row_group(group).column(column)
                if (shard.file, group) not in chosen or chunk.path_in_schema in ("fold", "split"):
                    first = chunk.dictionary_page_offset or chunk.data_page_offset
                    data[first : first + chunk.total_compressed_size] = b"\xee" * chunk.total_compressed_size
        path.write_bytes(data)
    columns = read_examples(dataset, manifest, SETTINGS.model_copy(update={"folds": (2,)}), (0, 18))
    expected = sum(group.clips for shard in manifest.shards for group in shard.row_groups if group.fold == 2)
    assert len(set(columns["clip_id"])) == expected == 18
    with pytest.raises(OSError, match=r"."):
        read_examples(dataset, manifest, SETTINGS, (0, manifest.clips))


@pytest.mark.unit
def test_labels_of_other_shards_are_refused_at_the_start(dataset: Place, tmp_path: Path) -> None:
    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    with pytest.raises(UserError, match=r"labels: no labels here .* run `beats-ray tokenize` first"):
        check_labels(labels, manifest, dataset)
    write_labels(labels, dataset, manifest)
    check_labels(labels, manifest, dataset)
    other = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    with pytest.raises(UserError, match=r"labels/labels\.json: fingerprint='[0-9a-f]+' is not that of"):
        check_labels(labels, other, dataset)
    (labels / "shards" / "00001.parquet").delete()
    with pytest.raises(UserError, match=r"labels/shards/00001\.parquet: missing"):
        check_labels(labels, manifest, dataset)


@pytest.mark.unit
def test_labels_are_read_afresh_from_a_data_set_that_was_made_again(dataset: Place) -> None:
    plan = build_plan(read_manifest(dataset), shuffled=False)
    before = clip_labels(dataset, plan.row_groups, read_manifest(dataset).versions, 0.0)
    manifest = write_dataset(dataset, clips_per_group=7)
    again = DatasetManifest.model_validate(
        manifest.model_dump()
        | {"shards": [shard.model_dump() | {"sha256": f"new-{shard.file}"} for shard in manifest.shards]}
    )
    found = clip_labels(dataset, build_plan(again, shuffled=False).row_groups, again.versions, 0.0)
    assert sum(map(len, before)) == 54
    assert [labels for group in found for labels in group] == [labels_of(number) for number in range(78)]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("micro_batch", "workers", "clip_seconds", "clips", "rounds"),
    [
        (16, 1, 5, 10_000, 8),  # 20 MiB
        (16, 1, 10, 10_000, 4),
        (16, 2, 10, 10_000, 4),
        (16, 8, 10, 10_000, 2),  # 80 MiB in a task
        (8, 64, 10, 10_000, 1),
        (64, 1, 10, 10_000, 1),
        (1, 1, 0.1, 10_000, 256),
        (2, 2, 1, 24, 4),  # a run of 24 clips needs no more
    ],
)
def test_blocks_hold_as_many_micro_batches_as_fit(
    micro_batch: int, workers: int, clip_seconds: float, clips: int, rounds: int
) -> None:
    assert rounds_of_a_block(micro_batch, workers, clips, round(32_000 * clip_seconds)) == rounds


@pytest.mark.unit
def test_tables_of_a_read_task_end_where_blocks_do(dataset: Place) -> None:
    manifest = read_manifest(dataset)
    plan = build_plan(manifest, seed=4, shuffle_window_clips=SETTINGS.shuffle_window_clips)
    reader = open_reader(dataset, manifest, plan, SETTINGS, None)
    tables = list(reader.read(plan.windows_between(5, 50), 5, 50, table_clips=6))
    spans = [(rows["position"][0].as_py(), rows["position"][-1].as_py() + 1) for rows in tables]
    starts = {plan.window(ordinal).first_position for ordinal in plan.windows_between(5, 50)}
    assert [first for first, _ in spans] == sorted({5, *range(5, 50, 6), *(start for start in starts if start > 5)})
    assert [position for first, last in spans for position in range(first, last)] == list(range(5, 50))


@pytest.mark.unit
def test_a_label_file_of_other_clips_is_named(dataset: Place, tmp_path: Path) -> None:
    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    write_labels(labels, dataset, manifest, swap=True)
    with pytest.raises(UserError, match=r"labels/shards/0000\d\.parquet: row group \d holds labels of other clips"):
        read_examples(dataset, manifest, SETTINGS, (0, 10), labels)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("num_samples", [9] * 5, r"clip 'clip-\d': the shard says num_samples=9, its audio has more"),
        ("audio", [b"no flac"] * 5, r"clip 'clip-\d': its audio in the shard does not decode"),
        ("labels", [[7]] * 5, r"clip 'clip-\d': label id 7 is outside the vocabulary of 3 labels"),
        ("labels", None, r"00000\.parquet: column 'labels' is missing"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, column: str, values: list[Any] | None, message: str) -> None:
    dataset = open_place(str(tmp_path))
    manifest = write_dataset(dataset, shards=1, groups_per_shard=1)
    rows = shard_rows(range(5), fold=1)
    index, kind = rows.schema.get_field_index(column), rows.schema.field(column).type
    rows = rows.drop_columns([column]) if values is None else rows.set_column(index, column, pa.array(values, kind))
    write_table(dataset / "shards" / "00000.parquet", rows)
    manifest = manifest.model_copy(
        update={"shards": (manifest.shards[0].model_copy(update={"sha256": column + message}),)}
    )
    settings = SETTINGS.model_copy(update={"shuffle_window_clips": 1})
    with pytest.raises(UserError, match=message):
        read_examples(dataset, manifest, settings, (0, 5))


# --- on a cluster ---------------------------------------------------------------------------------------------------


def read_with_workers(
    streams: list[Any], dealing: Dealing, first_step: int = 0, stop_step: int = 9, *, bucket: int = 0
) -> list[list[MicroBatch]]:
    """Each worker's micro-batches, iterated by tasks that run at the same time, as training processes do."""
    import ray

    @ray.remote(num_cpus=0.1)
    def read(shares: list[Any], rank: int) -> list[MicroBatch]:
        return list(
            iterate_micro_batches(
                shares, dealing, rank, 2, first_step=first_step, stop_step=stop_step, bucket_samples=bucket
            )
        )

    shares = [stream.streaming_split(dealing.lane_workers, equal=True) for stream in streams]
    mine = [
        [shares[lane][rank % dealing.lane_workers] for lane in dealing.lanes_of(rank)]
        for rank in range(dealing.num_workers)
    ]
    batches: list[list[MicroBatch]] = ray.get([read.remote(some, rank) for rank, some in enumerate(mine)])
    return batches


@pytest.mark.ray
def test_any_number_of_workers_and_any_start_give_the_same_global_batches(
    cluster: EmbeddedObjectStore, dataset: Place
) -> None:
    manifest = read_manifest(dataset)
    global_batch, micro_batch, steps = 12, 2, 12  # 144 clips: more than two epochs of 54
    expected = read_examples(dataset, manifest, SETTINGS, (0, steps * global_batch))

    for workers, start in [(1, 0), (2, 0), (3, 0), (2, 7)]:
        dealing = Dealing(global_batch, micro_batch, workers)
        streams = build_streams(dataset, manifest, SETTINGS, dealing=dealing, seed=4, start_step=start, stop_step=steps)
        shards = read_with_workers(streams, dealing, start, steps)
        per_step = dealing.num_micro_batches(1)
        assert [len(batches) for batches in shards] == [(steps - start) * per_step] * workers
        for step in range(start, steps):
            part = slice((step - start) * per_step, (step - start + 1) * per_step)
            batches = sorted((b for shard in shards for b in shard[part]), key=lambda batch: batch.first_position)
            found = torch.cat([batch.audio_BS for batch in batches]).numpy()
            first = step * global_batch
            assert np.array_equal(found, expected["audio"][first : first + global_batch])
            assert [i for b in batches for i in b.clip_ids] == expected["clip_id"][
                first : first + global_batch
            ].tolist()


@pytest.mark.ray
def test_a_read_task_hands_its_tables_on_before_it_ends(cluster: EmbeddedObjectStore, dataset: Place) -> None:
    import ray

    manifest = read_manifest(dataset)
    plan = build_plan(manifest, seed=4, shuffle_window_clips=1000)
    assert plan.windows_per_epoch == 1  # one task
    reader = open_reader(dataset, manifest, plan, SETTINGS, None)
    blocks = read_windows(reader, SETTINGS, 0, manifest.clips, table_clips=6).materialize().to_arrow_refs()
    sizes = [block.num_rows for block in ray.get(list(blocks))]
    assert sum(sizes) == manifest.clips == 54
    assert max(sizes) <= 18  # lengths differ: a table of short clips waits for the next


@pytest.mark.ray
def test_the_stream_brings_labels_and_names_a_mismatch(
    cluster: EmbeddedObjectStore, dataset: Place, tmp_path: Path
) -> None:
    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    write_labels(labels, dataset, manifest)

    dealing = Dealing(6, 3, num_workers=1)

    def build() -> list[Any]:
        return build_streams(
            dataset, manifest, SETTINGS, dealing=dealing, seed=4, start_step=0, stop_step=9, labels=labels
        )

    [batches] = read_with_workers(build(), dealing)
    expected = read_examples(dataset, manifest, SETTINGS, (0, 54), labels)
    found = [batch.patch_labels_BN for batch in batches]
    assert np.array_equal(torch.cat([part for part in found if part is not None]).numpy(), expected["patch_labels"])
    assert found[0] is not None
    assert found[0].dtype == batches[0].audio_BS.dtype == torch.int16
    assert all(batch.wait_seconds >= 0 for batch in batches)
    assert batches[0].wait_seconds > 0
    write_labels(labels, dataset, manifest, swap=True)
    (labels / "labels.json").write_json({"fingerprint": shards_fingerprint(manifest), "made": "again"})
    with pytest.raises(Exception, match=r"holds labels of other clips"):
        read_with_workers(build(), dealing)


@pytest.mark.ray
def test_batches_in_a_wrong_order_never_pass(cluster: EmbeddedObjectStore, dataset: Place) -> None:
    dealing = Dealing(6, 3, num_workers=1)
    (stream,) = build_streams(
        dataset, read_manifest(dataset), SETTINGS, dealing=dealing, seed=4, start_step=1, stop_step=9
    )
    with pytest.raises(
        RuntimeError, match=r"micro-batch 0 of rank 0 of 1 must hold positions 0 to 2, but holds \[6, 7, 8\]"
    ):
        next(iterate_micro_batches([stream.iterator()], dealing, 0, 1, first_step=0, stop_step=9))


@pytest.mark.ray
@pytest.mark.parametrize("folds", [(), (1, 3)])
def test_cached_clips_give_the_batches_of_the_stream_bit_for_bit(
    cluster: EmbeddedObjectStore, dataset: Place, tmp_path: Path, folds: tuple[int, ...]
) -> None:
    import ray

    from beats_ray.data.cache import materialize_clips

    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    write_labels(labels, dataset, manifest)
    cache = materialize_clips(dataset, manifest, SETTINGS, labels=labels)
    settings = SETTINGS.model_copy(update={"folds": folds})
    expected = read_examples(dataset, manifest, settings, (12, 132), labels)

    @ray.remote(num_cpus=0.1)
    def read(cache: Any, rank: int) -> list[MicroBatch]:
        cached = cache.batches(
            seed=4,
            part=ClipPart(folds=folds),
            global_batch_size=12,
            micro_batch_size=3,
            start_step=1,
            stop_step=11,
            rank=rank,
            world_size=2,
        )
        return list(cached)

    shards = ray.get([read.remote(cache, rank) for rank in range(2)])
    batches = sorted((batch for shard in shards for batch in shard), key=lambda batch: batch.first_position)
    assert torch.cat([batch.positions_B for batch in batches]).tolist() == list(range(12, 132))
    assert [clip_id for batch in batches for clip_id in batch.clip_ids] == expected["clip_id"].tolist()
    for name, tensors in {
        "audio": [batch.audio_BS for batch in batches],
        "num_samples": [batch.num_samples_B for batch in batches],
        "targets": [batch.targets_BC for batch in batches],
        "patch_labels": [batch.patch_labels_BN for batch in batches if batch.patch_labels_BN is not None],
    }.items():
        assert np.array_equal(torch.cat(tensors).numpy(), expected[name]), name


@pytest.mark.ray
def test_batches_of_like_lengths_are_padded_to_their_bucket_whether_cached_or_streamed(
    cluster: EmbeddedObjectStore, dataset: Place, tmp_path: Path
) -> None:
    from beats_ray.data.cache import materialize_clips

    manifest, labels = read_manifest(dataset), open_place(str(tmp_path / "labels"))
    write_labels(labels, dataset, manifest)
    settings, bucket = SETTINGS.model_copy(update={"length_bucket_seconds": 0.2}), 3200
    sizes = {"global_batch_size": 6, "micro_batch_size": 3}
    dealing = Dealing(**sizes, num_workers=2)
    streams = build_streams(
        dataset, manifest, settings, dealing=dealing, seed=4, start_step=2, stop_step=20, labels=labels
    )
    streamed = read_with_workers(streams, dealing, 2, 20, bucket=bucket)
    cache = materialize_clips(dataset, manifest, settings, labels=labels)
    for rank, batches in enumerate(streamed):
        cached = cache.batches(seed=4, start_step=2, stop_step=20, rank=rank, world_size=2, **sizes)
        for one, other in zip(batches, cached, strict=True):
            assert one.clip_ids == other.clip_ids
            assert torch.equal(one.audio_BS, other.audio_BS)
            assert one.patch_labels_BN is not None
            assert torch.equal(one.patch_labels_BN, other.patch_labels_BN)
            longest = int(one.num_samples_B.max())
            assert one.audio_BS.shape[1] == -(-longest // bucket) * bucket
            assert one.patch_labels_BN.shape[1] == patch_labels_in(one.audio_BS.shape[1])
    epoch = [clip for step in range(7, 16) for batches in streamed for clip in batches[step].clip_ids]
    assert sorted(epoch) == sorted(planned_ids(dataset, manifest))  # steps 9 to 17: the second epoch of 54 clips
    assert {batch.audio_BS.shape[1] for batches in streamed for batch in batches} >= {6400, 9600, 12800}


@pytest.mark.ray
def test_evaluation_sees_every_chosen_clip_once_whether_cached_or_streamed(
    cluster: EmbeddedObjectStore, dataset: Place
) -> None:
    import ray

    from beats_ray.data.cache import materialize_clips

    manifest = read_manifest(dataset)
    settings = SETTINGS.model_copy(update={"folds": (2,)})  # 18 clips: neither 4 nor 2 x 4 divide them
    cached = [
        batch
        for rank in range(2)
        for batch in materialize_clips(dataset, manifest, SETTINGS).eval_batches(
            part=ClipPart(folds=(2,)), micro_batch_size=4, rank=rank, world_size=2
        )
    ]

    @ray.remote(num_cpus=0.1)
    def read(shard: Any) -> list[MicroBatch]:
        return list(iterate_eval_batches(shard, 4, 1, num_clips=18))

    stream = build_eval_stream(dataset, manifest, settings, 4, num_workers=2)
    streamed = [b for part in ray.get([read.remote(s) for s in stream.streaming_split(2, equal=True)]) for b in part]
    for batches in (cached, streamed):
        audio = {int(p): wave for b in batches for p, wave in zip(b.positions_B, b.audio_BS, strict=True)}
        ids = {int(p): clip_id for b in batches for p, clip_id in zip(b.positions_B, b.clip_ids, strict=True)}
        assert sum(len(batch.clip_ids) for batch in batches) == 18
        assert sorted(ids) == list(range(18))
        numbers = [int(ids[position].split("-")[1]) for position in range(18)]
        assert numbers == sorted(numbers)
        for position, number in enumerate(numbers):
            spare = max(0, len(wave_of(number)) - clip_samples_of(CLIP_SECONDS)) // SAMPLES_PER_PATCH_ROW
            assert int(audio[position][0]) // 100 == spare // 2  # the middle
    plain = build_eval_stream(dataset, manifest, settings, 4).take_all()
    assert [row["position"] for row in plain] == list(range(18))


@pytest.mark.ray
def test_several_streams_give_the_same_global_batches_to_any_workers_cached_or_streamed(
    cluster: EmbeddedObjectStore, dataset: Place
) -> None:
    """Also from a step in the middle, where each lane begins within a window."""
    from beats_ray.data.cache import materialize_clips

    manifest, settings = read_manifest(dataset), SETTINGS.model_copy(update={"streams": 2})
    cache = materialize_clips(dataset, manifest, settings)
    found: dict[tuple[int, int], dict[int, str]] = {}
    for workers, start in [(1, 0), (2, 0), (4, 0), (4, 5)]:
        dealing = Dealing(16, 4, workers, num_lanes=2)
        streams = build_streams(dataset, manifest, settings, dealing=dealing, seed=4, start_step=start, stop_step=9)
        assert len(streams) == 2
        for rank, batches in enumerate(read_with_workers(streams, dealing, start)):
            cached = cache.batches(
                seed=4, start_step=start, stop_step=9, rank=rank, world_size=workers, global_batch_size=16,
                micro_batch_size=4,
            )  # fmt: skip
            for one, other in zip(batches, cached, strict=True):
                assert torch.equal(one.positions_B, other.positions_B)
                assert one.clip_ids == other.clip_ids
                assert torch.equal(one.audio_BS, other.audio_BS)
                found.setdefault((workers, start), {}).update(zip(one.positions_B.tolist(), one.clip_ids, strict=True))
    whole = found[1, 0]
    assert sorted(whole) == list(range(9 * 16))
    assert found[2, 0] == found[4, 0] == whole
    assert found[4, 5] == {position: clip for position, clip in whole.items() if position >= 5 * 16}


@pytest.mark.ray
def test_the_coordinator_of_a_full_stream_rests(
    cluster: EmbeddedObjectStore, dataset: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the rounds of its loop that do nothing: how much of a core each takes is the machine's."""
    rounds = tmp_path / "rounds"

    class Counted(PauseWhileFull):
        def on_execution_step(self, executor: Any) -> None:
            done = self._done
            super().on_execution_step(executor)
            if self._done == done:
                with rounds.open("a") as file:
                    file.write(".")

    monkeypatch.setattr("beats_ray.data.stream.PauseWhileFull", Counted)
    settings, dealing = SETTINGS.model_copy(update={"buffer_mib": 16}), Dealing(4, 4, num_workers=1)
    (stream,) = build_streams(
        dataset, read_manifest(dataset), settings, dealing=dealing, seed=4, start_step=0, stop_step=1000
    )
    batches = iterate_micro_batches(stream.streaming_split(1, equal=True), dealing, 0, 1, first_step=0, stop_step=1000)
    next(batches)
    time.sleep(5.0)  # the buffers fill
    before, begun = rounds.stat().st_size, time.monotonic()
    time.sleep(5.0)
    rate = (rounds.stat().st_size - before) / (time.monotonic() - begun)
    batches.close()
    assert 0.0 < rate < 1.1 / PAUSE_SECONDS, f"{rate:.0f} rounds a second in which nothing was done"


@pytest.mark.ray
def test_a_stream_that_may_have_to_wait_leaves_cpus_to_another(cluster: EmbeddedObjectStore, dataset: Place) -> None:
    import ray

    stream = build_eval_stream(dataset, read_manifest(dataset), SETTINGS, 4)
    before = stream.context.execution_options.resource_limits
    other = build_eval_stream(dataset, read_manifest(dataset), SETTINGS, 4)
    rest = ray.cluster_resources()["CPU"] - 1.75
    half = (ray.cluster_resources()["CPU"] - 0.5) / 2 - 0.25
    for streams, taken, left, runs, expected in (
        ([stream], 0.5, 1.25, 1, rest), ([stream, other], 0.5, 1.25, 1, max(1.5, rest / 2)),
        ([stream, other], 90.0, 1.0, 1, 1.5), ([stream], 0.5, 0.25, 2, max(1.5, half)),
    ):  # fmt: skip
        share_cpus(streams, SETTINGS, taken, to_leave=left, runs=runs)
        for one in streams:
            limits = one.context.execution_options.resource_limits
            assert limits.cpu == pytest.approx(expected)  # never less than a stream needs
            assert limits.object_store_memory == before.object_store_memory


@pytest.mark.ray
def test_a_cache_that_would_not_fit_or_lacks_the_fold_says_so(cluster: EmbeddedObjectStore, dataset: Place) -> None:
    from beats_ray.data.cache import materialize_clips

    manifest = read_manifest(dataset)
    with pytest.raises(UserError, match=r"its clips need about 2 MiB decoded, 1 MiB of the object store may hold them"):
        materialize_clips(dataset, manifest, SETTINGS, limit_mib=1)
    cache = materialize_clips(dataset, manifest, SETTINGS.model_copy(update={"folds": (1,)}))
    with pytest.raises(UserError, match=r"data.folds=\[1\].*: the cached clips lack row group 1 of 00000.parquet"):
        next(cache.eval_batches(part=ClipPart(folds=(2,)), micro_batch_size=4))


@pytest.mark.ray
@pytest.mark.parametrize("read", ["cached", "streamed"])
def test_of_a_clip_that_a_task_cannot_decode_its_name_is_left(
    cluster: EmbeddedObjectStore, tmp_path: Path, read: str
) -> None:
    from beats_ray.data.cache import materialize_clips

    dataset, manifest = write_tones(tmp_path, clips=3, bad=("3-1",))

    def read_all() -> None:
        if read == "cached":
            materialize_clips(dataset, manifest, SETTINGS)
        else:
            list(build_eval_stream(dataset, manifest, SETTINGS, 3).iter_batches())

    with pytest.raises(Exception, match="3-1") as caught:  # Ray Data's own, which keeps no more than the trace
        read_all()
    mistake = find_user_error(caught.value)
    assert str(mistake) == "clip '3-1': its audio in the shard does not decode; prepare the data set again"
    assert isinstance(mistake, UserError)


@pytest.mark.ray
def test_training_reads_its_shards_from_object_storage_while_it_runs(
    cluster: EmbeddedObjectStore, dataset: Place
) -> None:
    remote = open_place("s3://clips/ramps")
    remote.upload(Path(dataset.path))
    manifest = read_manifest(remote)
    before = cluster.log_file.stat().st_size
    dealing = Dealing(6, 3, num_workers=1)
    streams = build_streams(remote, manifest, SETTINGS, dealing=dealing, seed=4, start_step=0, stop_step=9)
    # Building the graph looks at the footers of the first and the last shard only.
    assert cluster.log_file.read_bytes()[before:].count(b"GET OBJECT Bucket: clips Object: ramps/shards/") <= 2 * 3
    [batches] = read_with_workers(streams, dealing)
    expected = read_examples(dataset, manifest, SETTINGS, (0, 54))
    assert np.array_equal(torch.cat([batch.audio_BS for batch in batches]).numpy(), expected["audio"])
    requests = cluster.log_file.read_text()
    for shard in manifest.shards:
        assert f"Object: ramps/shards/{shard.file}" in requests
