"""A sweep that is killed three times and then stopped with Ctrl-C finds what an undisturbed one does.

All its processes are killed, and the same command is started again each time. What was finished stays as it was
written, and what was going on continues
from its last checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tones import write_tones

from beats_ray.models import BeatsEncoder, encoder_config, save_model
from tests.support.marked import MARK, kill_marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
TRIALS, STEPS = 5, 900
SETTINGS = [
    "ray.address=local", "ray.num_cpus=3", "ray.object_store_mib=128", "data.clip_seconds=1",
    "finetune.augment.mixup=0", "finetune.layer_drop=0", "finetune.validate_every_steps=300",
    f"finetune.train.steps={STEPS}", "finetune.train.warmup_steps=1", "finetune.train.global_batch_size=4",
    "finetune.train.micro_batch_size=4", "finetune.train.checkpoint_every_steps=10",
    "finetune.train.keep_checkpoints=100",
    "finetune.train.loggers=[]",
    f"sweep.num_trials={TRIALS}", "sweep.max_concurrent_trials=1", "sweep.scheduler=none",
]  # fmt: skip
WAIT_SECONDS = 240


class Sweep:
    """The command on one output folder; all its processes carry a mark."""

    def __init__(self, data: Path, encoder: Path, output: Path) -> None:
        self.output = output
        self.log = output.with_suffix(".log")
        self._mark = uuid.uuid4().hex
        self._command = [
            sys.executable, "-m", "beats_ray", "sweep", f"data.path={data}", f"encoder={encoder}", f"output={output}",
            *SETTINGS,
        ]  # fmt: skip

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self._mark}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._command, *options], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def wait_for(self, process: subprocess.Popen[bytes], has_come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not has_come():
            assert process.poll() is None, f"the sweep ended too early:\n{self.tail()}"
            assert time.monotonic() < deadline, f"it did not come so far:\n{self.tail()}"
            time.sleep(0.01)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        kill_marked(self._mark)

    def finished(self) -> dict[Path, int]:
        """When the model of each trial that is done was written."""
        found = {}
        for path in self.output.glob("trials/*/stage.json"):
            if json.loads(path.read_text())["status"] == "complete":
                found[path.parent] = (path.parent / "model" / "model.safetensors").stat().st_mtime_ns
        return found

    def in_progress(self) -> dict[Path, int]:
        """The newest committed step of each trial that is under way, and that Tune's state on disk knows of."""
        saved = max((path.stat().st_mtime_ns for path in self.output.glob("tune/trials/experiment_state*")), default=0)
        found = {}
        for trial in self.output.glob("trials/*"):
            commits = list(trial.glob("checkpoints/*/commit.json"))
            known = any(path.stat().st_mtime_ns < saved for path in commits)
            if known and trial not in self.finished():
                found[trial] = max(int(path.parent.name.removeprefix("step-")) for path in commits)
        return found

    def board(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "leaderboard.json").read_text())
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def results(board: dict[str, Any]) -> list[tuple[str, float, float, int]]:
    return sorted(
        (json.dumps(row["config"], sort_keys=True), row["validation_accuracy"], row["test_accuracy"], row["steps"])
        for row in board["trials"]
    )


def check_taken_up(resumed: dict[Path, int], finished: dict[Path, int]) -> None:
    """A run that was interrupted wrote no step a second time: each attempt's files have names of their own."""
    for place, step in resumed.items():
        if place in finished:
            for earlier in range(10, step + 1, 10):
                assert len(list((place / "checkpoints" / f"step-{earlier:08d}").glob("*.safetensors"))) == 1, place


def test_a_sweep_that_is_killed_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    write_tones(tmp_path / "data", clips=9)
    torch.manual_seed(0)
    save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), tmp_path / "encoder")
    undisturbed, disturbed = (
        Sweep(tmp_path / "data", tmp_path / "encoder", tmp_path / name) for name in ("undisturbed", "disturbed")
    )
    process = undisturbed.start()
    assert process.wait(WAIT_SECONDS) == 0, undisturbed.tail()

    resumed: dict[Path, int] = {}
    for done in (0, 1, 2):  # in the middle of the first, the second and the third trial
        process = disturbed.start(*(["--resume"] if done else []))
        disturbed.wait_for(
            process, lambda done=done: len(disturbed.finished()) >= done and bool(disturbed.in_progress())
        )
        disturbed.kill(process)
        finished = disturbed.finished()
        resumed |= disturbed.in_progress()
        check_taken_up(resumed, finished)
        print(f"killed with {len(finished)} trials done and {disturbed.in_progress()} under way", flush=True)

    process = disturbed.start()
    disturbed.wait_for(process, lambda: len(disturbed.finished()) > len(finished) and bool(disturbed.in_progress()))
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_SECONDS) == 130, disturbed.tail()
    assert "interrupted; the same command goes on" in disturbed.tail()
    assert "best of" in disturbed.tail()
    assert disturbed.board()["status"] == "interrupted"
    check_taken_up(resumed, disturbed.finished())
    resumed |= disturbed.in_progress()

    process = disturbed.start("--resume")
    assert process.wait(WAIT_SECONDS) == 0, disturbed.tail()
    assert len(resumed) >= 2
    for place, written in finished.items():  # nothing that was done was done again
        assert disturbed.finished()[place] == written
    for place in resumed:
        last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["train/recoveries"] >= 1, place
    assert disturbed.board()["status"] == "complete"
    assert len(disturbed.board()["trials"]) == TRIALS
    assert results(disturbed.board()) == results(undisturbed.board())
