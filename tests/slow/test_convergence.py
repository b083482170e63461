"""The convergence experiment, whole and small: two kinds of positions, one seed, then another one and fine-tuning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from beats_ray.data.sample import make_clip, make_sample_set

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def beats_ray(*arguments: str) -> str:
    """The command's output; it must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "beats_ray", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_convergence_trains_on_one_set_judges_on_another_and_takes_seeds_later(tmp_path: Path) -> None:
    local = ("ray.address=local", "ray.object_store_mib=300")
    (tmp_path / "sounds").mkdir()
    for index in range(48):
        soundfile.write(tmp_path / "sounds" / f"{index}.wav", make_clip(index, 1, 2.0), 16_000)
    make_sample_set(tmp_path / "raw", num_clips=50, clip_seconds=2.0)
    corpus, judged, output = (str(tmp_path / name) for name in ("corpus", "judged", "out"))
    beats_ray("prepare", "unlabelled", str(tmp_path / "sounds"), corpus, *local)
    beats_ray("prepare", "esc50", str(tmp_path / "raw"), judged, *local)
    small = (
        str(ROOT / "jobs" / "convergence-mini.yaml"), f"output={output}", f"data.path={corpus}", f"judged={judged}",
        "data.clip_seconds=2", "minutes=0.05", "clips_per_s=32", "iterations=1", "pretrain.encoder.preset=tiny",
        "pretrain.train.log_every_steps=2", "cross_validation.folds=[1, 2]", "finetune.train.steps=2",
        "finetune.train.warmup_steps=0", *local,
    )  # fmt: skip
    beats_ray("convergence", *small, "seeds=[0]")
    trained = Path(output) / "seed-0" / "true" / "iteration-1" / "pretrain" / "model" / "model.safetensors"
    complete = (trained, Path(output) / "baselines" / "baselines.json")
    before = [path.stat().st_mtime_ns for path in complete]
    printed = beats_ray("convergence", *small, "seeds=[0, 1]", "finetuned=true")
    assert [path.stat().st_mtime_ns for path in complete] == before, "what was complete is not done again"
    assert "2 seeds" in printed
    rows = {row["name"]: row for row in json.loads((Path(output) / "convergence.json").read_text())["rows"]}
    assert {"random forest, MFCC", "untrained", "iteration 1", "iteration 1, compact positions"} <= set(rows)
    assert rows["iteration 1"]["probe"]["seeds"] == 2
    assert rows["iteration 1"]["training"]["loss"]["mean"] > 0
    for name in ("untrained", "iteration 1", "iteration 1, compact positions"):
        assert rows[name]["finetuned"]["seeds"] == 2
    assert rows["iteration 1, compact positions"]["finetuned_gain"]["seeds"] == 2
    first = json.loads((Path(output) / "seed-1" / "true" / "finetuned-0" / "cross_validation.json").read_text())
    assert (first["folds"], first["seeds"]) == ([1, 2], [1])
    assert (Path(output) / "curves" / "compact" / "loss.svg").exists()
