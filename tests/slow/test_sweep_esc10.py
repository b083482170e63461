"""ESC-10, two encoders, twelve settings: what ASHA saves, whether it costs accuracy, and how busy the CPUs are.

One encoder is untrained, one pre-trained for a minute. The same command searches with ASHA and with nobody stopping
trials; the best of both are compared clip by clip, on the clips that chose and on the clips that judge. Prints the
figures of docs/sweeps.md. 20 to 40 minutes on two cores.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from beats_ray.fold_statistics import compare
from beats_ray.models import BeatsEncoder, encoder_config, save_model

ROOT = Path(__file__).parents[2]
ESC10 = ROOT.parent / "shared" / "data" / "esc10"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not ESC10.is_dir(), reason=f"real clips are needed: {ESC10}"),
]

SETTINGS = 12
STEPS, EPOCH = 120, 15  # 240 clips, 16 a step
RAY = ("ray.address=local", "ray.object_store_mib=512")
DATA = ("data.clip_seconds=2.5", "data.cache=always")
FINETUNE = (
    f"finetune.train.steps={STEPS}", f"finetune.validate_every_steps={EPOCH}", "finetune.train.warmup_steps=10",
    "finetune.train.global_batch_size=16", "finetune.train.micro_batch_size=16", "finetune.train.loggers=[]",
    "finetune.train.cpus_per_worker=1",
)  # fmt: skip
MASKED = (
    "encoder.preset=tiny", "train.steps=150", "train.warmup_steps=15",
    "train.learning_rate=1e-3", "train.global_batch_size=16", "train.num_workers=1",
    "train.cpus_per_worker=1", "train.loggers=[]",
)  # fmt: skip


def start(log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "beats_ray", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def finish(process: "subprocess.Popen[bytes]", log: Path, seconds: float) -> None:
    assert process.wait(seconds) == 0, log.read_text(errors="replace")[-4000:]


def busy(before: Any, after: Any) -> float:
    """Share of the machine's CPU time between two `psutil.cpu_times` in which it did something."""
    total = sum(after) - sum(before)
    idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    return float(1 - idle / total)


def search(work: Path, scheduler: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs the sweep; returns its leaderboard, and seconds and the busy share of the CPUs after the first report."""
    output, log = work / scheduler, work / f"{scheduler}.log"
    encoders = [f"encoders.{name}={work / name / 'model'}" for name in ("untrained", "pretrained")]
    begun = time.monotonic()
    process = start(
        log, "sweep", f"data.path={work / 'data'}", f"output={output}", *encoders, *DATA, *FINETUNE, *RAY,
        f"sweep.num_trials={SETTINGS}", f"sweep.max_concurrent_trials={os.cpu_count()}", f"sweep.scheduler={scheduler}",
    )  # fmt: skip
    while process.poll() is None and not any(path.stat().st_size for path in output.glob("tune/trials/*/result.json")):
        time.sleep(0.2)
    first, times = time.monotonic() - begun, psutil.cpu_times()
    finish(process, log, 3600)
    took = {"first_report_s": first, "seconds": time.monotonic() - begun, "busy": busy(times, psutil.cpu_times())}
    return json.loads((output / "leaderboard.json").read_text()), took


def right(output: Path, row: dict[str, Any], part: str) -> dict[str, bool]:
    """Whether a trial's model is right about each clip of a part."""
    judged: dict[str, bool] = json.loads((output / "trials" / row["trial_id"] / "judged.json").read_text())[part]
    return judged


def test_asha_finds_what_a_sweep_without_stopping_finds_in_less_than_half_the_epochs(tmp_path: Path) -> None:
    for name, arguments in (
        ("data", ("prepare", "esc50", str(ESC10), str(tmp_path / "data"), *RAY)),
        ("masked", ("pretrain", f"data.path={tmp_path / 'data'}", f"output={tmp_path / 'pretrained'}",
                    "data.folds=[3, 4, 5]", "data.clip_seconds=2.5", *MASKED, *RAY)),
    ):  # fmt: skip
        log = tmp_path / f"{name}.log"
        finish(start(log, *arguments), log, 1200)
    torch.manual_seed(0)
    save_model(BeatsEncoder(encoder_config("tiny")), tmp_path / "untrained" / "model")

    boards, took = {}, {}
    for scheduler in ("asha", "none"):
        boards[scheduler], took[scheduler] = search(tmp_path, scheduler)
        board = boards[scheduler]
        assert [row["status"] for row in board["trials"]] == ["complete"] * (2 * SETTINGS)
        steps = sum(row["steps"] for row in board["trials"])
        took[scheduler]["epochs"] = steps / EPOCH
        stopped = sum(row["stopped_early"] for row in board["trials"])
        best = board["best"]
        print(
            f"\n{scheduler}: {steps / EPOCH:.0f} epochs, {stopped} of {2 * SETTINGS} trials stopped; "
            f"{took[scheduler]['seconds']:.0f} s, first report after {took[scheduler]['first_report_s']:.0f} s, "
            f"CPUs busy {took[scheduler]['busy']:.1%} from then on; best {best['encoder']}, "
            f"validation {best['validation_accuracy']:.3f}, test {best['test_accuracy']:.3f}, {best['config']}"
        )
        for comparison in board["comparisons"]:
            print(f"  {comparison['of']}: {comparison['says']}")
    for part in ("validation", "test"):
        found, whole = (right(tmp_path / name, boards[name]["best"], part) for name in ("asha", "none"))
        assert found.keys() == whole.keys()
        clips = sorted(found)
        found_SN, whole_SN = (np.array([[judged[clip] for clip in clips]]) for judged in (found, whole))
        comparison = compare(found_SN, whole_SN, np.zeros(len(clips)))
        low, high = comparison["interval"]
        print(f"asha's best - best, {part}: {comparison['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        assert high >= 0, f"worse than noise on the {part} part"
    assert took["none"]["epochs"] == 2 * SETTINGS * STEPS / EPOCH
    assert took["asha"]["epochs"] < took["none"]["epochs"] / 2
    assert took["asha"]["busy"] > 0.85
