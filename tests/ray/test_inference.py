"""Batch inference on a real local Ray cluster: every clip once, whatever the batches, and restarts per shard."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from beats_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    StreamSettings,
    TokenizeConfig,
    UserError,
    replace,
)
from beats_ray.console import Console
from beats_ray.data.flac import decode_flac
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard, shards_fingerprint
from beats_ray.data.storage import Place, open_place, read_table, write_table
from beats_ray.embed import run_embed
from beats_ray.evaluate import run_evaluate
from beats_ray.inference import map_clips, pad_clips, row_group_spans
from beats_ray.models import (
    BeatsEncoder,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    compute_fbank,
    encoder_config,
    normalise_fbank,
    num_patches,
    save_model,
    save_released,
)
from beats_ray.objectstore import EmbeddedObjectStore
from beats_ray.tokenize import run_tokenize

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


def test_every_chosen_clip_is_mapped_once_with_its_own_samples(cluster: EmbeddedObjectStore, tmp_path: Path) -> None:
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


def test_more_workers_than_cpus_is_the_users_mistake(cluster: EmbeddedObjectStore, tmp_path: Path) -> None:
    dataset, manifest = build_dataset(tmp_path)
    with pytest.raises(UserError, match=r"num_workers=9 needs 9.5 CPUs, the cluster has 4"):
        list(map_clips(dataset, manifest, SumWorker, batch_clips=1, num_workers=9))


def read_labels(output: Place, name: str) -> list[dict[str, Any]]:
    return list(read_table(output / "shards" / name).to_pylist())


def test_tokenize_labels_every_clip_in_place_and_goes_on_where_it_stopped(
    cluster: EmbeddedObjectStore, tmp_path: Path
) -> None:
    """One shard is written by hand as if by an earlier run: it must stay as it is, the other must be computed."""
    dataset, manifest = build_dataset(tmp_path / "data")
    tokenizer = RandomProjectionTokenizer(RandomProjectionConfig(num_codes=64))
    model = save_model(tokenizer, tmp_path / "tokenizer")
    output = open_place(str(tmp_path / "labels"))
    config = TokenizeConfig(
        output=output.uri, data=StreamSettings(path=dataset.uri), tokenizer=str(model), batch_clips=5
    )
    run_tokenize(config, Console())
    first = {name: read_labels(output, name) for name in ("00000.parquet", "00001.parquet")}
    whole = (output / "labels.json").read_json()
    for index, (name, rows) in enumerate(first.items()):
        assert [row["clip_id"] for row in rows] == [f"clip-{index}-{row}" for row in range(12)]
        groups = pq.ParquetFile((output / "shards" / name).path).metadata
        assert [groups.row_group(group).num_rows for group in range(groups.num_row_groups)] == [ROW_GROUP_CLIPS] * 3
    wave, num_samples = pad_clips([shard_wave(dataset, "00001.parquet", 11)])
    fbank, frames = compute_fbank(wave, num_samples)
    alone = tokenizer.label_patches(normalise_fbank(fbank, num_frames_B=frames), frames)[0].tolist()
    assert first["00001.parquet"][11]["labels"] == alone[: num_patches(15_000)]
    assert whole["patches"] == sum(num_patches(4000 + 1000 * row) for row in range(12)) * 2
    assert whole["fingerprint"] == shards_fingerprint(manifest)
    assert sum(whole["code_counts"]) == whole["patches"]

    kept = (output / "shards" / "00000.parquet").read_bytes()
    (output / "labels.json").delete()
    (output / "shards" / "00001.parquet").delete()
    changed = Path((output / "shards" / "00000.parquet").path)
    before = changed.stat().st_mtime_ns
    run_tokenize(config, Console())
    assert (changed.stat().st_mtime_ns, changed.read_bytes()) == (before, kept)
    assert read_labels(output, "00001.parquet") == first["00001.parquet"]
    assert (output / "labels.json").read_json() == whole


def test_labels_of_another_tokenizer_are_refused_before_anything_runs(tmp_path: Path) -> None:
    dataset, manifest = build_dataset(tmp_path / "data")
    model = save_model(RandomProjectionTokenizer(RandomProjectionConfig(num_codes=64)), tmp_path / "tokenizer")
    output = open_place(str(tmp_path / "labels"))
    (output / "source.json").write_json({"fingerprint": shards_fingerprint(manifest), "tokenizer_sha256": "0"})
    config = TokenizeConfig(output=output.uri, data=StreamSettings(path=dataset.uri), tokenizer=str(model))
    with pytest.raises(UserError, match="holds labels of another tokenizer"):
        run_tokenize(config, Console())


def test_evaluate_probes_an_encoder_over_all_folds(cluster: EmbeddedObjectStore, tmp_path: Path) -> None:
    dataset, _ = build_dataset(tmp_path / "data")
    torch.manual_seed(0)
    model = save_model(BeatsEncoder(encoder_config("tiny")), tmp_path / "encoder")
    config = EvaluateConfig(output=str(tmp_path / "out"), data=StreamSettings(path=dataset.uri), model=str(model))
    written = run_evaluate(config, Console())
    result = json.loads(Path(written[0][1]).read_text())
    assert result["kind"] == "encoder"
    assert result["clips"] == len(result["correct"]) == 24
    assert set(result["fold_accuracies"]) == {"1", "2", "3"}
    assert result["accuracy"] == 1.0  # two pure tones
    assert [label for label, _ in written] == [
        "evaluation", "confusion", "per_class", "predictions", "predictions.parquet", "folds",
    ]  # fmt: skip
    lines = Path(written[-1][1]).read_text().split()
    assert lines == ["fold,clips,accuracy,standard_error", *(f"{fold},8,1.000000,0.000000" for fold in (1, 2, 3))]


@pytest.mark.parametrize(("pooling", "layer"), [("mean", None), ("none", 2)])
def test_embed_writes_what_the_encoder_gives_each_clip_alone_and_goes_on_where_it_stopped(
    cluster: EmbeddedObjectStore, tmp_path: Path, pooling: Literal["mean", "none"], layer: int | None
) -> None:
    dataset, _ = build_dataset(tmp_path / "data")
    torch.manual_seed(0)
    encoder = BeatsEncoder(encoder_config("tiny")).eval()
    model = save_released(encoder, tmp_path / "BEATs.pt")
    config = EmbedConfig(
        output=str(tmp_path / "out"), data=StreamSettings(path=dataset.uri), model=str(model), batch_clips=5,
        pooling=pooling, layer=layer,
    )  # fmt: skip
    run_embed(config, Console())
    output = open_place(config.output)
    rows = read_labels(output, "00001.parquet")
    assert [row["clip_id"] for row in rows] == [f"clip-1-{row}" for row in range(12)]
    assert [row["num_samples"] for row in rows] == [4000 + 1000 * row for row in range(12)]
    assert [row["labels"] for row in rows] == [[row % 2] for row in range(12)]
    assert [row["fold"] for row in rows] == [row // ROW_GROUP_CLIPS + 1 for row in range(12)]
    for row in (0, 7, 11):
        wave, num_samples = pad_clips([shard_wave(dataset, "00001.parquet", row)])
        with torch.no_grad():
            alone = encoder.features_from_waveform(wave, num_samples, layer=layer).features_BND[0]
        found = torch.tensor(rows[row]["embedding"])
        expected = alone.mean(0) if pooling == "mean" else alone.flatten()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4
    assert (output / "embeddings.json").read_json()["width"] == 128
    if pooling == "mean":
        return  # going on does not depend on what is written
    (output / "embeddings.json").delete()
    (output / "shards" / "00001.parquet").delete()
    kept = Path((output / "shards" / "00000.parquet").path).stat().st_mtime_ns
    run_embed(config, Console())
    assert Path((output / "shards" / "00000.parquet").path).stat().st_mtime_ns == kept
    for row, before in zip(read_labels(output, "00001.parquet"), rows, strict=True):
        assert row["embedding"] == pytest.approx(before["embedding"], abs=1e-4)  # batches are put together by chance
        assert row["clip_id"] == before["clip_id"]
    with pytest.raises(UserError, match=r"holds other embeddings.*dtype"):
        run_embed(replace(config, {"dtype": "float16"}), Console())


def test_embed_refuses_a_layer_that_the_encoder_does_not_have(tmp_path: Path) -> None:
    dataset, _ = build_dataset(tmp_path / "data")
    model = save_model(BeatsEncoder(encoder_config("tiny")), tmp_path / "encoder")
    data = StreamSettings(path=dataset.uri)
    config = EmbedConfig(output=str(tmp_path / "out"), data=data, model=str(model), layer=5)
    with pytest.raises(UserError, match="layer=5: the encoder has 4 layers"):
        run_embed(config, Console())
    tokenizer = save_model(RandomProjectionTokenizer(), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds kind='random_projection_tokenizer'"):
        run_embed(replace(config, {"model": str(tokenizer)}), Console())
    assert not (tmp_path / "out").exists()


def shard_wave(dataset: Place, name: str, row: int) -> bytes:
    clip = read_table(dataset / "shards" / name, ["audio", "num_samples"]).to_pylist()[row]
    return decode_flac(clip["audio"], clip["num_samples"]).tobytes()
