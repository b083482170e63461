"""A killed prepare goes on where it was, and `--verify` finds every way in which a data set can be wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beats_ray.config import PrepareConfig, load_config
from beats_ray.data.prepare import prepare
from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import open_place, read_table, write_table
from beats_ray.data.verify import DatasetDamaged, verify

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).parents[2]
SMALL = ["data.row_group_clips=8", "data.shard_mib=0.5", "data.max_bad_clip_fraction=0.5"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, two broken ones among them, and one that no table names."""
    folder: Path = tmp_path_factory.mktemp("raw")
    make_sample_set(folder, num_clips=100, clip_seconds=1.0)
    names = sorted((folder / "audio").iterdir())
    names[3].write_bytes(b"")
    names[7].write_bytes(b"just some text" * 9)
    return folder


def config(raw: Path, output: Path) -> PrepareConfig:
    return load_config(PrepareConfig, None, SMALL, source=str(raw), output=str(output))


def ignore(_done: int, _total: int) -> None:
    pass


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_prepare_goes_on_and_ends_with_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    prepare(config(raw, tmp_path / "whole"), ignore)
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "beats_ray", "prepare", "esc50", str(raw), str(output), "ray.address=local",
               "ray.num_cpus=1", "ray.object_store_mib=100", *SMALL]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    shards = len(list((tmp_path / "whole/shards").iterdir()))
    while time.monotonic() < deadline and len(list((output / "index").glob("*.parquet"))) < 2:
        time.sleep(0.02)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)
    done = {path.name: path.stat().st_mtime_ns for path in (output / "index").glob("[0-9]*.parquet")}
    assert 2 <= len(done) < shards, "killed too late to show anything"
    assert not (output / "dataset.json").exists()

    seen: list[int] = []
    prepare(config(raw, output), lambda count, _total: seen.append(count))
    assert seen[0] > 0
    assert {name: (output / "index" / name).stat().st_mtime_ns for name in done} == done
    assert content(output) == content(tmp_path / "whole")


@pytest.fixture(scope="module")
def prepared(raw: Path, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prepared")
    prepare(config(raw, folder), ignore)
    return folder


def test_every_source_file_is_accounted_for(prepared: Path) -> None:
    seen: list[tuple[int, int]] = []
    accounts = verify(str(prepared), lambda done, total: seen.append((done, total)))
    assert (accounts.source_files, accounts.in_shards, accounts.quarantined, accounts.skipped) == (100, 98, 2, 1)
    assert accounts.clips == 98
    assert seen[-1] == (98, 98)
    assert str(accounts).startswith("100 source files = 98 in ")


def flip_a_byte(folder: Path) -> None:
    path = folder / "shards/00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def rewrite_shard(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Changes the rows of a shard and makes checksum and size right again."""

    def apply(folder: Path) -> None:
        place = open_place(str(folder / "shards/00000.parquet"))
        source = pq.ParquetFile(place.path)
        with pq.ParquetWriter(f"{place.path}.new", source.schema_arrow) as writer:
            for group in range(source.num_row_groups):
                writer.write_table(change(source.read_row_group(group)).cast(source.schema_arrow))
        Path(f"{place.path}.new").replace(place.path)
        manifest = json.loads((folder / "dataset.json").read_text())
        import hashlib

        manifest["shards"][0]["sha256"] = hashlib.sha256(place.read_bytes()).hexdigest()
        manifest["shards"][0]["bytes"] = place.size_bytes()
        (folder / "dataset.json").write_text(json.dumps(manifest))

    return apply


def swap_audio(rows: pa.Table) -> pa.Table:
    audio = rows["audio"].to_pylist()
    return rows.set_column(1, "audio", pa.array([audio[0][:-200], *audio[1:]], pa.binary()))


def wrong_label(rows: pa.Table) -> pa.Table:
    labels = [[99], *rows["labels"].to_pylist()[1:]]
    return rows.set_column(3, "labels", pa.array(labels, pa.list_(pa.int16())))


def other_names(rows: pa.Table) -> pa.Table:
    return rows.set_column(0, "clip_id", pa.array(["x"] * rows.num_rows))


def drop_quarantine(folder: Path) -> None:
    place = open_place(str(folder / "quarantine.parquet"))
    write_table(place, read_table(place).slice(1))


def account_twice(folder: Path) -> None:
    used = read_table(open_place(str(folder / "index/00000.parquet")))["source"][0].as_py()
    place = open_place(str(folder / "skipped.parquet"))
    row = {"path": used, "reason": "twice", "detail": "", "bytes": 0}
    write_table(place, pa.Table.from_pylist([row], read_table(place).schema))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_byte, "shards/00001.parquet: its checksum is not that of dataset.json"),
    (lambda folder: (folder / "shards/00001.parquet").unlink(), "shards/00001.parquet: it or its index is missing"),
    (lambda folder: (folder / "index/00001.parquet").unlink(), "shards/00001.parquet: it or its index is missing"),
    (edit(clips=97), "the shards hold 98 clips, dataset.json says clips=97"),
    (edit(seconds=1.0), "dataset.json says seconds=1.0"),
    (edit(skipped=4), "1 files are accounted for as skipped, dataset.json says 4"),
    (rewrite_shard(swap_audio), "its audio"),
    (rewrite_shard(wrong_label), "label id 99 is outside the vocabulary of 10"),
    (rewrite_shard(other_names), "holds other clips than its index says"),
    (rewrite_shard(other_names), "clip ids occur more than once"),
    (drop_quarantine, "99 files are accounted for as source_files, dataset.json says 100"),
    (account_twice, "is in two accounts"),
    (lambda folder: (folder / "skipped.parquet").unlink(), "skipped.parquet is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_every_kind_of_damage_is_named(
    damage: Callable[[Path], None], message: str, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(DatasetDamaged, match=re.escape(message)) as caught:
        verify(str(tmp_path), ignore)
    assert "\n" not in str(caught.value)


def test_what_verify_advises_mends_a_damaged_shard_and_prepare_finds_a_lost_one(
    prepared: Path, raw: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    flip_a_byte(tmp_path / "out")
    with pytest.raises(DatasetDamaged, match=r"delete index/00001\.parquet, and prepare it again"):
        verify(str(tmp_path / "out"), ignore)
    (tmp_path / "out/index/00001.parquet").unlink()
    (tmp_path / "out/shards/00000.parquet").unlink()
    prepare(config(raw, tmp_path / "out"), ignore)
    assert content(tmp_path / "out") == content(prepared)
