"""`iterate` on a corpus without labels: data sets of their own judge every encoder, and a table says how well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from beats_ray.data.sample import make_sample_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TRAIN = {
    "steps": 6, "warmup_steps": 1, "global_batch_size": 8, "num_workers": 1, "cpus_per_worker": 1, "loggers": [],
}  # fmt: skip
RAY = {"address": "local", "object_store_mib": 256, "num_cpus": 6}


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "beats_ray", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_encoder_of_an_unlabelled_corpus_is_judged_by_every_protocol(tmp_path: Path) -> None:
    make_sample_set(tmp_path / "raw", num_clips=40)
    ray = [f"ray.{name}={value}" for name, value in RAY.items()]
    command("prepare", "unlabelled", str(tmp_path / "raw"), str(tmp_path / "corpus"), *ray)
    command("prepare", "esc50", str(tmp_path / "raw"), str(tmp_path / "judged"), *ray)
    encoder = {"preset": "tiny", "overrides": {"num_layers": 1, "conv_pos_kernel": 16}}
    judged = {"path": str(tmp_path / "judged"), "clip_seconds": 2}
    finetune = {"validate_every_steps": 3, "train": TRAIN}
    protocols = ("sweep", "finetune", "cross-validate", "probe")
    tasks = {f"by-{protocol}": {"protocol": protocol, "data": judged, "finetune": finetune} for protocol in protocols}
    tasks["by-sweep"]["sweep"] = {"num_trials": 2, "max_concurrent_trials": 1}
    del tasks["by-probe"]["finetune"]
    settings = {
        "output": str(tmp_path / "run"),
        "iterations": 2,
        "ray": RAY,
        "data": {"path": str(tmp_path / "corpus"), "clip_seconds": 2},
        "pretrain": {"encoder": encoder, "predictor": {"num_layers": 1}, "train": TRAIN},
        "distill": {"encoder": encoder, "tokenizer": {"init_batches": 2}, "train": TRAIN},
        "inference": {"num_workers": 1},
        "tasks": tasks,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    shown = command("iterate", str(tmp_path / "run.yaml"))
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    found = {(row["iteration"], row["protocol"]) for row in rows}
    assert found == {(0, "probe")} | {(iteration, protocol) for iteration in (1, 2) for protocol in protocols}
    tested = json.loads((tmp_path / "judged" / "dataset.json").read_text())["clips_by_fold"]["1"]
    for row in rows:
        assert 0 <= row["value"] <= 1
        assert row["clips"] == (40 if row["protocol"] in ("probe", "cross-validate") else tested)
        assert f"{row['value']:.3f}" in shown
    again = command("iterate", str(tmp_path / "run.yaml"))
    assert "fine-tuning" not in again  # all is done
