"""Batch inference on a real local Ray cluster: every clip once, whatever the batches, and restarts per shard."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from beats_ray.config import UserError
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.storage import Place, open_place, write_table
from beats_ray.inference import map_clips, row_group_spans

pytestmark = pytest.mark.ray

ROW_GROUP_CLIPS = 4


def build_dataset(folder: Path, shards: int = 2, groups_per_shard: int = 3) -> tuple[Place, DatasetManifest]:
    """A prepared data set of tones with unequal lengths; fold = row group + 1, label = fold parity."""
    dataset = open_place(str(folder))
    records = []
    for shard in range(shards):
        rows = []
        for row in range(groups_per_shard * ROW_GROUP_CLIPS):
            fold = row // ROW_GROUP_CLIPS + 1
            samples = 4000 + 1000 * row
            tone = np.sin(np.arange(samples) * (0.02 + 0.3 * (row % 2)))
            buffer = io.BytesIO()
            soundfile.write(buffer, (tone * 8000).astype(np.int16), 16_000, format="FLAC", subtype="PCM_16")
            rows.append((f"clip-{shard}-{row}", buffer.getvalue(), samples, [row % 2], fold, ""))
        names = ["clip_id", "audio", "num_samples", "labels", "fold", "split"]
        kinds = [pa.string(), pa.binary(), pa.int32(), pa.list_(pa.int16()), pa.int8(), pa.string()]
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
        place = dataset / "shards" / f"{shard:05d}.parquet"
        write_table(place, pa.table(columns, names), ROW_GROUP_CLIPS)
        data = place.read_bytes()
        groups = tuple(RowGroup(clips=ROW_GROUP_CLIPS, fold=f + 1, split="") for f in range(groups_per_shard))
        digest = hashlib.sha256(data).hexdigest()
        records.append(Shard(file=place.name, sha256=digest, bytes=len(data), row_groups=groups))
    clips = shards * groups_per_shard * ROW_GROUP_CLIPS
    by_fold = {str(fold + 1): shards * ROW_GROUP_CLIPS for fold in range(groups_per_shard)}
    manifest = DatasetManifest(
        name="tones", label_names=("low", "high"), clips=clips, clips_by_fold=by_fold, clips_by_split={"": clips},
        seconds=1.0, fbank_mean=10.0, fbank_std=5.0, source="test", source_files=clips, quarantined=0,
        shards=tuple(records),
    )  # fmt: skip
    (dataset / "dataset.json").write_json(manifest.model_dump(mode="json"))
    return dataset, manifest


class SumWorker:
    """Returns each clip's length and sum: wrong when padding or a neighbour leaks in."""

    def __init__(self, model: None, scale: int = 1) -> None:
        assert model is None
        self.scale = scale

    def __call__(self, wave_BS: torch.Tensor, num_samples_B: torch.Tensor) -> dict[str, Any]:
        total = wave_BS.long().abs().sum(1) * self.scale
        return {
            "length": num_samples_B.numpy(),
            "total": total.numpy(),
            "ragged": [np.arange(int(n) % 5) for n in num_samples_B],
        }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_every_chosen_clip_is_mapped_once_with_its_own_samples(cluster: None, tmp_path: Path) -> None:
    dataset, manifest = build_dataset(tmp_path)
    spans = row_group_spans(manifest, folds=(1, 3))
    tables = list(
        map_clips(
            dataset, manifest, SumWorker, worker_options={"scale": 2}, row_groups=spans, batch_clips=3, num_workers=2
        )
    )
    rows = pa.concat_tables(tables).to_pylist()
    expected = {f"clip-{s}-{r}" for s in range(2) for r in range(12) if r // ROW_GROUP_CLIPS != 1}
    assert sorted(row["clip_id"] for row in rows) == sorted(expected)
    for row in rows:
        tone = np.sin(np.arange(4000 + 1000 * row["row"]) * (0.02 + 0.3 * (row["row"] % 2)))
        assert row["clip_id"] == f"clip-{row['shard']}-{row['row']}"
        assert row["length"] == len(tone)
        assert row["ragged"] == list(range(len(tone) % 5))
        assert row["total"] == 2 * int(np.abs((tone * 8000).astype(np.int16).astype(np.int64)).sum())
        assert row["clip_labels"] == [row["row"] % 2]
        assert row["fold"] == row["row"] // ROW_GROUP_CLIPS + 1


def test_more_workers_than_cpus_is_the_users_mistake(cluster: None, tmp_path: Path) -> None:
    dataset, manifest = build_dataset(tmp_path)
    with pytest.raises(UserError, match=r"num_workers=9 needs 9.5 CPUs, the cluster has 4"):
        list(map_clips(dataset, manifest, SumWorker, batch_clips=1, num_workers=9))
