"""`iterate`, killed at every boundary between stages and in the middle of each, publishes what an undisturbed run does.

A small run on sample clips: two iterations with their sweeps. Every process of it is killed (SIGKILL) as soon as a
stage's `stage.json` says that it is running, in training as soon as a checkpoint is committed, among labels as soon as
the first of several shards is written, and again as soon as it says that it is complete; each time the same command is
started again. A stage of milliseconds may be complete before all is dead: it is taken away, and met again. Prints what
each kill met.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from beats_ray.config import IterateConfig, load_config
from beats_ray.data.manifest import read_manifest
from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import open_place
from beats_ray.stages import build_stages
from tests.support.marked import MARK, kill_marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parents[2]
TRAINING = ("iteration-1/pretrain", "iteration-2/tokenizer", "iteration-2/pretrain")
TRAIN = {
    "steps": 8, "warmup_steps": 2, "global_batch_size": 8, "num_workers": 1, "cpus_per_worker": 1,
    "checkpoint_every_steps": 2, "log_every_steps": 2, "loggers": "[]",
}  # fmt: skip
SMALL = [
    "iterations=2", "data.clip_seconds=2", "ray.address=local", "ray.object_store_mib=256", "ray.num_cpus=6",
    "pretrain.predictor.num_layers=1", "distill.tokenizer.init_batches=2", "inference.num_workers=1",
    "inference.batch_clips=2",
    "finetune.validate_every_steps=4", "sweep.num_trials=2", "sweep.max_concurrent_trials=1",
    "sweep.grace_validations=2", "teacher=finetuned",
    *(f"{part}.encoder.{field}" for part in ("pretrain", "distill") for field in
      ("preset=tiny", "overrides.num_layers=1", "overrides.conv_pos_kernel=16")),
    *(f"{part}.train.{name}={value}" for part in ("pretrain", "distill", "finetune") for name, value in TRAIN.items()),
]  # fmt: skip
NUM_STAGES = int(os.environ.get("BEATS_RAY_KILL_STAGES", "99"))
"""Only the first so many stages are disturbed; the run is finished all the same."""
WAIT_SECONDS = 600
ATTEMPTS = 12


class Runs:
    """One run folder, and the command that works on it; all its processes carry a mark."""

    def __init__(self, data: Path, output: Path) -> None:
        settings = [f"data.path={data}", f"output={output}", *SMALL]
        stages = build_stages(load_config(IterateConfig, None, settings), read_manifest(open_place(str(data))))
        self.stages = [f"iteration-{stage.iteration}/{stage.name}" for stage in stages]
        self.output = output
        self.log = output.with_suffix(".log")
        self._mark = uuid.uuid4().hex
        self._command = [sys.executable, "-m", "beats_ray", "iterate", *settings]
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        self._started = time.time()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self._mark},
            )  # fmt: skip

    def finish(self) -> None:
        assert self._process is not None
        assert self._process.wait(1800) == 0, self.tail()

    def kill_within(self, stage: str) -> list[str]:
        """Starts the run and kills everything in the middle of the stage; returns its state after each attempt."""
        met = []
        while len(met) < ATTEMPTS:
            self.start()
            met.append(self.kill_when(stage, is_complete=False))
            if met[-1] == "running":
                break
            shutil.rmtree(self.output / stage)
        return met

    def kill_when(self, stage: str, is_complete: bool) -> str:
        """Kills everything once the stage has come so far; returns what its state was when all was dead."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._has_come(stage, is_complete):
            assert self._process is not None
            assert self._process.poll() is None, f"the run ended before {stage}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{stage} took more than {WAIT_SECONDS} s:\n{self.tail()}"
            time.sleep(0.001)
        self._kill()
        return self.status(stage)

    def status(self, stage: str) -> str:
        """What `stage.json` says; `absent` where there is none."""
        try:
            return str(json.loads((self.output / stage / "stage.json").read_text())["status"])
        except FileNotFoundError:
            return "absent"

    def models(self) -> dict[str, str]:
        """SHA-256 of the weights of every published model."""
        found = {}
        for stage in self.stages:
            path = self.output / stage / "model" / "model.safetensors"
            if path.exists():
                found[stage] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def label_shards(self) -> dict[str, int]:
        """When each file of labels of the second iteration was written, ns."""
        folder = self.output / "iteration-2" / "labels" / "shards"
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _has_come(self, stage: str, is_complete: bool) -> bool:
        status = self.status(stage)
        if status == "complete" or is_complete:
            return status == "complete"
        if status != "running" or (self.output / stage / "stage.json").stat().st_mtime < self._started:
            return False  # not begun, or begun by the run before, whose kill came a moment after the boundary
        folder = self.output / stage
        if stage.endswith("labels"):
            return bool(self.label_shards())
        if stage.endswith("sweep"):
            return any(folder.glob("trials/*/checkpoints/*/commit.json"))
        return stage not in TRAINING or any(folder.glob("checkpoints/*/commit.json"))

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        kill_marked(self._mark)


def prepare(folder: Path) -> Path:
    make_sample_set(folder / "raw", num_clips=50)
    command = [sys.executable, "-m", "beats_ray", "prepare", "esc50", str(folder / "raw"), str(folder / "data")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "ray.address=local"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(list((folder / "data" / "shards").iterdir())) > 1, "labels of one shard cannot be met in the middle"
    return folder / "data"


def test_a_run_that_is_killed_everywhere_publishes_the_models_of_an_undisturbed_one(tmp_path: Path) -> None:
    data = prepare(tmp_path)
    undisturbed, disturbed = Runs(data, tmp_path / "undisturbed"), Runs(data, tmp_path / "disturbed")
    began = time.monotonic()
    undisturbed.start()
    undisturbed.finish()
    print(f"\nundisturbed: {time.monotonic() - began:.0f} s")
    expected = undisturbed.models()
    assert len(expected) == 7, expected  # 3 encoders, 2 tokenizers, 2 fine-tuned models

    assert set(TRAINING) | {"iteration-2/labels", "iteration-2/sweep"} <= set(disturbed.stages)
    for stage in disturbed.stages[:NUM_STAGES]:
        began = time.monotonic()
        met = disturbed.kill_within(stage)
        written = disturbed.label_shards()
        if stage.endswith("labels"):
            assert 0 < len(written) < len(list((data / "shards").iterdir())), written
        disturbed.start()
        met.append(disturbed.kill_when(stage, is_complete=True))
        print(f"{stage}: killed when {', '.join(met)}; {time.monotonic() - began:.0f} s", flush=True)
        assert met[-2:] == ["running", "complete"], f"{stage} was never met in the middle"
        kept = {name: time_ns for name, time_ns in disturbed.label_shards().items() if name in written}
        assert kept == written, "labels that were written before the kill are not computed again"
    disturbed.start()
    disturbed.finish()
    assert disturbed.models() == expected
    kept = [path.name for path in disturbed.output.glob("iteration-*/*-*")]
    assert kept == [], f"nothing was changed, so nothing should lie aside: {kept}"
