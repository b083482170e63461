"""`beats-ray bench data` and `end-to-end` as they are called: on clusters of their own, and on one that is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from beats_ray.bench.cases import BENCHES
from beats_ray.config import RaySettings
from beats_ray.launch import ray_cluster
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.slow

FIGURES = ("case", "clips_per_step", "clips_per_s", "start_ms", "data_wait", "peak_mib", "parts_s")
ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **variables: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "beats_ray", "bench", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)["cases"]
    return rows


def test_every_reader_gives_every_clip_where_the_last_shard_is_short() -> None:
    rows = bench("data", "clips=304", "seconds=1", "repetitions=1", "warmup=0", "rounds=1")
    assert [row["case"] for row in rows] == [case.name for case in BENCHES["data"]]
    assert all(row["clips_per_s"] > 0 for row in rows)


def test_every_row_of_the_whole_pipeline_goes_over_its_clips() -> None:
    rows = {row["case"]: row for row in bench("end-to-end", "clips=32")}
    for row in rows.values():  # with -s
        print(json.dumps({name: row[name] for name in FIGURES}))
    assert list(rows) == [case.name for case in BENCHES["end-to-end"] if not case.asked_for]
    clips = {name: row["clips_per_step"] for name, row in rows.items()}
    for name in ("prepare", "labels", "embed"):
        assert [clips[name], clips[f"{name}, 10x the clips"], clips[f"{name}, 100x the clips"]] == [32, 320, 3200]
    for name in ("tokenizer training", "1 worker"):  # three steps at least of 16 clips, without the first and the last
        assert [clips[name], clips[f"{name}, 10x the clips"], clips[f"{name}, 100x the clips"]] == [16, 288, 3168]
    training = [row for name, row in rows.items() if "worker" in name or "training" in name]
    assert all(0.0 < row["data_wait"] < 0.5 for row in training)
    assert all(row["parts_s"]["workers"][0] > 1.0 for row in training)


def test_a_running_cluster_is_joined_and_its_storage_is_as_it_was_but_for_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedObjectStore(tmp_path) as store:
        store.make_bucket("bench")
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        with ray_cluster(RaySettings(address="local", num_cpus=8)):
            address = ray.get_runtime_context().gcs_address
            cases = 'cases=["2 workers","tokenizer training"]'
            given = ("end-to-end", "clips=32", "output=s3://bench/here", cases)
            drivers = len(ray._private.state.state.job_table())
            (row,) = bench(*given, RAY_ADDRESS=address)  # a stage on one machine is left out
            assert (row["case"], row["clips_per_step"]) == ("2 workers", 16)
            assert len(ray._private.state.state.job_table()) == drivers + 1
    left = {path.parts[0] for path in (one.relative_to(tmp_path / "buckets/bench/here") for one in
                                       (tmp_path / "buckets/bench/here").rglob("*") if one.is_file())}  # fmt: skip
    assert len(left) == 1
    assert next(iter(left)).startswith("clips-")
