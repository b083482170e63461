"""A prepared data set of tones in noise, small enough to train on in a test."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.storage import Place, open_place, write_table

HZ = 16_000
NAMES = ("low", "middle", "high")


def write_tones(
    folder: Path, folds: int = 3, clips: int = 6, names: tuple[str, ...] = NAMES, seconds: float = 1.0,
    bad: tuple[str, ...] = (),
) -> tuple[Place, DatasetManifest]:  # fmt: skip
    """`clips` clips in each fold, one row group a fold; the tone of a clip says its label, by name.

    bad: ids, `FOLD-NUMBER`, of clips that cannot be decoded.
    """
    dataset = open_place(str(folder))
    rng = np.random.default_rng(0)
    rows = []
    for fold in range(1, folds + 1):
        for number in range(clips):
            name = NAMES[number % len(NAMES)]
            hertz = {"low": 200, "middle": 900, "high": 4000}[name] * (1 + 0.03 * rng.random())
            wave = np.sin(np.arange(round(seconds * HZ)) * 2 * np.pi * hertz / HZ) * 6000
            wave += rng.normal(size=len(wave)) * 200
            buffer = io.BytesIO()
            soundfile.write(buffer, wave.astype(np.int16), HZ, format="FLAC", subtype="PCM_16")
            clip_id = f"{fold}-{number}"
            audio = b"no audio" if clip_id in bad else buffer.getvalue()
            rows.append((clip_id, audio, len(wave), [names.index(name)], fold, ""))
    columns = ["clip_id", "audio", "num_samples", "labels", "fold", "split"]
    kinds = [pa.string(), pa.binary(), pa.int32(), pa.list_(pa.int16()), pa.int8(), pa.string()]
    arrays = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    place = dataset / "shards" / "00000.parquet"
    write_table(place, pa.table(arrays, columns), clips)
    data = place.read_bytes()
    groups = tuple(RowGroup(clips=clips, fold=fold, split="") for fold in range(1, folds + 1))
    shard = Shard(file=place.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), row_groups=groups)
    manifest = DatasetManifest(
        name="tones", label_names=names, clips=len(rows), clips_by_fold={str(f): clips for f in range(1, folds + 1)},
        clips_by_split={"": len(rows)}, seconds=seconds * len(rows), fbank_mean=10.0, fbank_std=5.0, source="test",
        source_files=len(rows), quarantined=0, shards=(shard,),
    )  # fmt: skip
    (dataset / "dataset.json").write_json(manifest.model_dump(mode="json"))
    return dataset, manifest
