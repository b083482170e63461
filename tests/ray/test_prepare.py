"""`prepare` on a real Ray cluster: exact, repeatable, and nothing half-written when the source is bad."""

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from beats_ray.config import LayoutSettings, PrepareConfig, UserError, load_config
from beats_ray.data.datasets.esc50 import read_esc50
from beats_ray.data.decode import decode_clip
from beats_ray.data.flac import decode_flac
from beats_ray.data.manifest import read_manifest
from beats_ray.data.prepare import TooManyBadClips, plan_shards, prepare
from beats_ray.data.sample import make_sample_set
from beats_ray.data.shard_writer import ShardPlan, cut, write_shard
from beats_ray.data.source import SourceClip
from beats_ray.data.storage import StorageError, open_place, read_table
from beats_ray.models.fbank import compute_fbank
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).parents[2]
ESC10 = ROOT.parent / "shared/data/esc10"
NUM_CLIPS = 100
SMALL = ["data.row_group_clips=8", "data.shard_mib=0.5"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("raw")
    make_sample_set(folder, num_clips=NUM_CLIPS, clip_seconds=1.0)
    return folder


def _config(source: Path | str, output: Path | str, *overrides: str) -> PrepareConfig:
    return load_config(PrepareConfig, None, list(overrides), source=str(source), output=str(output))


def _ignore(_done: int, _total: int) -> None:
    pass


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _copy(raw: Path, target: Path) -> Path:
    for path in raw.rglob("*"):
        if path.is_file():
            (target / path.relative_to(raw)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(raw)).hardlink_to(path)
    return target


def _spoil(folder: Path) -> dict[str, str]:
    """Breaks one file in each way; returns the reason that each must get."""
    names = sorted(path.name for path in (folder / "audio").iterdir())
    wavs = [name for name in names if name.endswith(".wav")]
    buffers = {
        "empty-file": b"",
        "truncated": (folder / "audio" / wavs[1]).read_bytes()[:-5000],
        "zero-length": _wav(np.zeros(0)),
        "non-finite": _wav(np.array([0.1, np.nan] * 8000)),
        "not-audio": b"just some text\n" * 50,
    }
    expected = {}
    for name, (reason, data) in zip(wavs, buffers.items(), strict=False):
        (folder / "audio" / name).unlink()  # not written through: the original is a hard link of it
        (folder / "audio" / name).write_bytes(data)
        expected[f"audio/{name}"] = reason
    table = folder / "meta/esc50.csv"
    lines = table.read_text().splitlines()
    wrong = next(number for number, line in enumerate(lines) if line.startswith(f"{wavs[5]},"))
    lines[wrong] = lines[wrong].replace(f"{wavs[5]},{wavs[5][0]},", f"{wavs[5]},{int(wavs[5][0]) % 5 + 1},")
    table.unlink()
    table.write_text("\n".join(lines) + "\n")
    expected[f"audio/{wavs[5]}"] = "mislabelled"
    (folder / "audio" / wavs[6]).unlink()
    expected[f"audio/{wavs[6]}"] = "missing-file"
    return expected


def _wav(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 22_050, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_every_clip_is_there_as_decoded_and_the_manifest_tells_the_truth(raw: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    manifest = prepare(_config(raw, tmp_path / "out", *SMALL), lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, NUM_CLIPS)
    assert calls[-1] == (NUM_CLIPS, NUM_CLIPS)
    assert calls == sorted(calls)
    assert read_manifest(open_place(str(tmp_path / "out"))) == manifest
    listing = read_esc50(open_place(str(raw)), LayoutSettings())
    source = {clip.clip_id: clip for clip in listing.clips}
    seen, fbanks, samples = [], [], 0
    for shard in manifest.shards:
        file = pq.ParquetFile(tmp_path / "out/shards" / shard.file)
        assert file.num_row_groups == len(shard.row_groups)
        for index, group in enumerate(shard.row_groups):
            rows = file.read_row_group(index).to_pylist()
            assert {(row["fold"], row["split"]) for row in rows} == {(group.fold, group.split)}
            assert len(rows) == group.clips <= 8
            for row in rows:
                clip = source[row["clip_id"]]
                assert (tuple(row["labels"]), row["fold"]) == (clip.labels, clip.fold)
                wave = decode_flac(row["audio"], row["num_samples"])
                np.testing.assert_array_equal(wave, decode_clip((raw / clip.path).read_bytes(), clip.path))
                assert row["num_samples"] == wave.size
                samples += wave.size
                fbanks.append(compute_fbank(torch.from_numpy(wave)[None])[0].flatten())
            seen += [row["clip_id"] for row in rows]
    assert sorted(seen) == sorted(source)
    assert manifest.clips == manifest.source_files == NUM_CLIPS
    assert manifest.clips_by_fold == dict.fromkeys("12345", NUM_CLIPS // 5)
    assert manifest.seconds == pytest.approx(samples / 16_000, abs=1e-3)
    values = torch.cat(fbanks).double()
    assert manifest.fbank_mean == pytest.approx(values.mean().item(), abs=1e-4)
    assert manifest.fbank_std == pytest.approx(values.std(unbiased=False).item(), abs=1e-4)
    assert read_table(open_place(str(tmp_path / "out/quarantine.parquet"))).num_rows == 0


def test_a_second_run_is_identical_and_a_finished_one_is_not_redone(raw: Path, tmp_path: Path) -> None:
    one = prepare(_config(raw, tmp_path / "one", *SMALL), _ignore)
    (tmp_path / "two/shards").mkdir(parents=True)
    (tmp_path / "two/shards/00099.parquet").write_bytes(b"left by a run that was killed")
    prepare(_config(raw, tmp_path / "two", *SMALL), _ignore)
    assert _content(tmp_path / "one") == _content(tmp_path / "two")
    assert len(one.shards) > 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}

    def fail(_done: int, _total: int) -> None:
        pytest.fail("a finished data set was prepared again")

    assert prepare(_config(raw, tmp_path / "one", *SMALL), fail) == one
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == before
    with pytest.raises(
        UserError, match="holds a data set made with row_group_clips=8, now it is 9; give another output"
    ):
        prepare(_config(raw, tmp_path / "one", "data.row_group_clips=9", "data.shard_mib=0.5"), _ignore)
    with pytest.raises(UserError, match="holds a data set made with source="):
        prepare(_config(tmp_path, tmp_path / "one", *SMALL), _ignore)


def test_object_storage_gives_the_same_bytes_as_a_local_folder(
    raw: Path, tmp_path: Path, store: EmbeddedObjectStore
) -> None:
    open_place("s3://beats/raw").upload(raw)
    prepare(_config("s3://beats/raw", "s3://beats/data", *SMALL), _ignore)
    prepare(_config(raw, tmp_path / "local", *SMALL), _ignore)
    remote, local = _content(store.folder / "buckets/beats/data"), _content(tmp_path / "local")
    assert remote.keys() == local.keys()
    # These name the source that they were made from.
    assert {name.split("/")[0] for name in remote if remote[name] != local[name]} == {"dataset.json", "index"}
    assert "GET OBJECT Bucket: beats Object: raw/audio/" in store.log_file.read_text()


def test_a_storage_fault_on_the_cluster_is_one_clear_line(raw: Path) -> None:
    with pytest.raises(StorageError) as caught:
        prepare(_config(raw, "s3://no-such-bucket/data"), _ignore)
    assert "has no bucket of that name; create it first" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_quarantined_with_the_reason_and_the_rest_is_prepared(raw: Path, tmp_path: Path) -> None:
    spoiled = _copy(raw, tmp_path / "raw")
    expected = _spoil(spoiled)
    manifest = prepare(_config(spoiled, tmp_path / "out", "data.max_bad_clip_fraction=0.07"), _ignore)
    rows = read_table(open_place(str(tmp_path / "out/quarantine.parquet"))).to_pylist()
    assert {row["path"]: row["reason"] for row in rows} == expected
    assert all(row["detail"] for row in rows)
    assert {row["reason"]: row["bytes"] for row in rows}["not-audio"] == 15 * 50
    assert manifest.quarantined == 7
    assert manifest.clips == NUM_CLIPS - 7
    assert manifest.source_files == NUM_CLIPS


def test_above_the_allowed_fraction_only_the_list_is_written(raw: Path, tmp_path: Path) -> None:
    spoiled = _copy(raw, tmp_path / "raw")
    expected = _spoil(spoiled)
    with pytest.raises(TooManyBadClips) as caught:
        prepare(_config(spoiled, tmp_path / "out", "data.max_bad_clip_fraction=0.06"), _ignore)
    message = str(caught.value)
    assert message.startswith("data.max_bad_clip_fraction=0.06: 7 of 100 files (7.0%) cannot be used: 1 x ")
    assert "\n" not in message
    assert message.endswith("mend or remove them, or set data.max_bad_clip_fraction=0.07")
    assert list(_content(tmp_path / "out")) == ["quarantine.parquet"]
    rows = read_table(open_place(str(tmp_path / "out/quarantine.parquet"))).to_pylist()
    assert {row["path"]: row["reason"] for row in rows} == expected
    manifest = prepare(_config(spoiled, tmp_path / "out", "data.max_bad_clip_fraction=0.07"), _ignore)
    assert manifest.clips == NUM_CLIPS - 7  # the folder of the failed run can be used again


def test_the_worst_reason_is_named_first(raw: Path, tmp_path: Path) -> None:
    spoiled = _copy(raw, tmp_path / "raw")
    names = sorted(path.name for path in (spoiled / "audio").iterdir())
    for name in names[:5]:
        (spoiled / "audio" / name).unlink()
        (spoiled / "audio" / name).write_bytes(b"")
    (spoiled / "audio" / names[5]).unlink()
    with pytest.raises(TooManyBadClips) as caught:
        prepare(_config(spoiled, tmp_path / "out"), _ignore)
    assert f"5 x empty-file ({', '.join(names[:3])}, ...), 1 x missing-file" in str(caught.value)


def test_nothing_usable_is_an_error_whatever_is_allowed(raw: Path, tmp_path: Path) -> None:
    spoiled = _copy(raw, tmp_path / "raw")
    for path in (spoiled / "audio").iterdir():
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(TooManyBadClips, match="100 of 100 files"):
        prepare(_config(spoiled, tmp_path / "out", "data.max_bad_clip_fraction=1.0"), _ignore)
    assert list(_content(tmp_path / "out")) == ["quarantine.parquet"]


def test_long_recordings_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    wave = (np.random.default_rng(0).normal(size=16_000 * 25) * 3000).astype(np.int16)
    soundfile.write(tmp_path / "audio/long.wav", wave, 16_000)
    clip = SourceClip("audio/long.wav", "long", bytes=0, labels=(3,), fold=2)
    plan = ShardPlan(
        open_place(str(tmp_path)),
        open_place(str(tmp_path / "x.parquet")),
        open_place(str(tmp_path / "index.parquet")),
        ((clip,),),
        2,
        10.0,
    )
    result = write_shard(plan)
    assert result.shard
    assert [group.clips for group in result.shard.row_groups] == [2, 1]
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["clip_id"] for row in rows] == ["long-part0000", "long-part0001", "long-part0002"]
    assert max(row["num_samples"] for row in rows) <= 160_000
    np.testing.assert_array_equal(np.concatenate([decode_flac(row["audio"], row["num_samples"]) for row in rows]), wave)
    assert [piece.size for piece in cut(wave[:160_000], 10.0)] == [160_000]


def test_with_overlap_all_pieces_are_whole_and_together_hold_every_sample() -> None:
    wave = np.arange(100_000, dtype=np.int32).astype(np.int16)
    pieces = cut(wave, 2.0, 0.5)
    assert {piece.size for piece in pieces} == {32_000}
    starts = [int(np.flatnonzero(np.arange(100_000) % 65_536 == int(piece[0]) % 65_536)[0]) for piece in pieces]
    assert starts[:2] == [0, 24_000]
    assert all(later - earlier <= 24_000 for earlier, later in itertools.pairwise(starts))
    assert pieces[-1][-1] == wave[-1]
    assert [piece.size for piece in cut(wave[:31_999], 2.0, 0.5)] == [31_999]


def test_the_plan_keeps_folds_and_splits_apart_and_fills_shards_evenly() -> None:
    clips = [
        SourceClip(
            f"audio/{index}.ogg", str(index), bytes=2**19, fold=index % 3, split="train" if index % 2 else "test"
        )
        for index in range(1000)
    ]
    config = _config("/raw", "/out", "data.shard_mib=100")
    plans = plan_shards(config, open_place("/raw"), open_place("/out"), clips)
    groups = [group for plan in plans for group in plan.groups]
    assert sorted(clip.clip_id for group in groups for clip in group) == sorted(clip.clip_id for clip in clips)
    assert all(len({(clip.fold, clip.split) for clip in group}) == 1 for group in groups)
    keys = [(group[0].split, group[0].fold) for group in groups]
    assert keys == sorted(keys)
    assert {len(group) for group in groups} == {55, 56}  # 166 or 167 clips in 3 even groups of at most 64
    assert [plan.target.name for plan in plans] == [f"{index:05d}.parquet" for index in range(len(plans))]
    assert all(45 <= plan.num_files <= 115 for plan in plans)
    assert plans == plan_shards(config, open_place("/raw"), open_place("/out"), clips[::-1])


@pytest.mark.skipif(not ESC10.is_dir(), reason=f"the real clips of ESC-10 are not at {ESC10}")
def test_esc10_is_prepared_whole_and_its_statistics_are_near_the_published(tmp_path: Path) -> None:
    manifest = prepare(_config(ESC10, tmp_path / "out"), _ignore)
    assert manifest.clips == 400
    assert manifest.quarantined == 0
    assert manifest.label_names[:3] == ("dog", "rooster", "rain")
    assert manifest.clips_by_fold == dict.fromkeys("12345", 80)
    assert manifest.fbank_mean == pytest.approx(11.7, abs=0.5)  # all of ESC-50: 11.722, 10.604
    assert manifest.fbank_std == pytest.approx(10.6, abs=1.0)
