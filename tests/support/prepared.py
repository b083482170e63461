"""A prepared data set as its readers see it: shards with their tables, and a manifest; its audio is never decoded."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard

CLIPS_OF_FOLD = {1: 4, 2: 6, 3: 10, 4: 20}


def write_dataset(folder: Path, label_names: tuple[str, ...]) -> DatasetManifest:
    """A prepared data set of two shards with two folds each; its audio is never decoded."""
    (folder / "shards").mkdir(parents=True)
    shards = []
    for number, folds in enumerate([(1, 2), (3, 4)]):
        path = folder / "shards" / f"{number:05}.parquet"
        schema = pa.schema([("clip_id", pa.string()), ("audio", pa.binary()), ("num_samples", pa.int32()),
                            ("labels", pa.list_(pa.int16()))])  # fmt: skip
        with pq.ParquetWriter(path, schema) as writer:
            for fold in folds:
                rows = [
                    {"clip_id": f"{fold}-{clip}", "audio": os.urandom(100), "num_samples": 32_000, "labels": [0]}
                    for clip in range(CLIPS_OF_FOLD[fold])
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        groups = tuple(RowGroup(clips=CLIPS_OF_FOLD[fold], fold=fold, split="") for fold in folds)
        shards.append(Shard(file=path.name, sha256=f"{number}", bytes=path.stat().st_size, row_groups=groups))
    manifest = DatasetManifest(
        name=folder.name,
        label_names=label_names,
        clips=40,
        clips_by_fold={str(fold): clips for fold, clips in CLIPS_OF_FOLD.items()},
        clips_by_split={},
        seconds=80.0,
        fbank_mean=15.0,
        fbank_std=6.0,
        source="s",
        source_files=40,
        quarantined=0,
        shards=tuple(shards),
    )
    (folder / "dataset.json").write_text(manifest.model_dump_json())
    return manifest
