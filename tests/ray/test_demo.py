"""The whole chain for real: object store, Ray Data, two Ray Train workers, DeepSpeed, iterations, sweeps, report.

One small run is interrupted by Ctrl-C in the middle of its first pre-training and started again with the same command.
A single iteration goes through every stage where an encoder is given to distil its tokenizer from; two are slow.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from beats_ray.data.sample import make_sample_set
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from tests.support.marked import MARK, marked_processes

pytestmark = pytest.mark.ray

SMALL = [
    "pretrain.encoder.overrides.num_layers=1",
    "pretrain.predictor.num_layers=1",
    "pretrain.train.steps=40",
    "pretrain.train.warmup_steps=5",
    "pretrain.train.checkpoint_every_steps=10",
    "distill.encoder.overrides.num_layers=1",
    "distill.tokenizer.init_batches=2",
    "distill.train.steps=8",
    "distill.train.warmup_steps=2",
    "finetune.train.steps=4",
    "finetune.train.warmup_steps=1",
    "finetune.train.checkpoint_every_steps=2",
    "finetune.validate_every_steps=2",
    "sweep.num_trials=2",
    "inference.num_workers=1",
]


class Demo:
    """The demo as a user runs it, in a process group of its own; every process below it carries a mark."""

    def __init__(self, data: Path, output: Path, settings: list[str]) -> None:
        self.run = output / "store" / "buckets" / "beats" / "run"
        self.log = output.with_suffix(".log")
        self._mark = uuid.uuid4().hex
        options = ["--data", str(data), "--output", str(output)]
        self._command = [sys.executable, "-m", "beats_ray", "demo", *options, *SMALL, *settings]

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {MARK: self._mark},
                start_new_session=True,
            )

    def marked_processes(self) -> list[str]:
        """Command lines of all processes that this demo started and that are still there."""
        found = []
        for process in marked_processes(self._mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    def requests(self) -> str:
        """The object store's log so far."""
        return (self.run.parents[2] / "requests.log").read_text(errors="replace")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float, demo: Demo) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"the demo ended early:\n{demo.tail()}"
        assert time.monotonic() < deadline, f"{path} did not appear in {seconds:.0f} s:\n{demo.tail()}"
        time.sleep(0.2)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_demo_stops_cleanly_and_goes_on_where_it_stopped(tmp_path: Path, iterations: int) -> None:
    data, start = tmp_path / "clips", tmp_path / "encoder"
    make_sample_set(data, num_clips=50)
    settings = []
    if iterations == 1:
        save_model(BeatsEncoder(encoder_config("tiny", num_layers=1)), start)
        settings = ["iterations=1", f"start.encoder={start}"]
    demo = Demo(data, tmp_path / "demo", settings)

    first = demo.start()
    wait_for(demo.run / "iteration-1/pretrain/stage.json", first, 400, demo)
    requests_before = demo.requests()
    wait_for(demo.run / "iteration-1/pretrain/checkpoints/step-00000010/commit.json", first, 400, demo)
    # Nothing but pre-training ran in between: it is pre-training that read these shards from the object store.
    reads = re.findall(r"GET OBJECT Bucket: beats Object: data/shards/", demo.requests()[len(requests_before) :])
    assert len(reads) >= 5
    os.killpg(first.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
    assert first.wait(60) == 130, demo.tail()
    assert demo.marked_processes() == []
    assert not (demo.run / "iteration-1/pretrain/model").exists(), "it was to be stopped before its end"
    published_before = (demo.run / "iteration-1/tokenizer/model/model.safetensors").stat().st_mtime_ns

    second = demo.start()
    assert second.wait(900) == 0, demo.tail()
    assert demo.marked_processes() == []

    check_training_went_on(demo, published_before)
    check_results(demo, iterations)


def check_training_went_on(demo: Demo, published_before: int) -> None:
    records = [json.loads(line) for line in (demo.run / "iteration-1/pretrain/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(10, 41, 10))
    assert records[0]["train/loss"] > records[-1]["train/loss"]
    tensorboard = sorted(path.name for path in (demo.run / "iteration-1/pretrain/tensorboard").iterdir())
    resumed_at = [int(match[1]) for name in tensorboard if (match := re.search(r"\.step(\d+)$", name))]
    assert 0 in resumed_at
    assert max(resumed_at) >= 10, f"the second run should have begun at a checkpoint, not at {resumed_at}"
    assert (demo.run / "iteration-1/tokenizer/model/model.safetensors").stat().st_mtime_ns == published_before


def check_results(demo: Demo, iterations: int) -> None:
    for stage in ("tokenizer", "labels", "pretrain", "probe", "sweep"):
        found = json.loads((demo.run / f"iteration-{iterations}" / stage / "stage.json").read_text())
        assert found["status"] == "complete", stage
    for iteration in range(iterations + 1):
        accuracy = json.loads((demo.run / f"iteration-{iteration}/probe/evaluation.json").read_text())
        assert 0.0 < accuracy["accuracy"] <= 1.0
    board = json.loads((demo.run / f"iteration-{iterations}/sweep/leaderboard.json").read_text())
    assert len(board["trials"]) == 2
    assert board["best"]["test_accuracy"] is not None
    report = (demo.run / "report.html").read_text()
    assert "untrained" in report.lower()
    assert "http://" not in report.replace("http://www.w3.org", ""), "the report must not need a network"
    log = demo.log.read_text(errors="replace")
    assert "Leaderboard" in log
    predict = next(line.split() for line in log.splitlines() if "beats-ray predict" in line)
    assert (Path(predict[2]) / "model.safetensors").exists()
    assert Path(predict[3]).exists()
