"""ZeRO stages and numbers of workers change where the state lies, not what a run does: real groups of processes."""

import json
import math
import statistics
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from beats_ray.data.storage import open_place
from beats_ray.train.committed import sound_steps
from beats_ray.train.faults import STOP_REQUEST
from beats_ray.train.metrics import read_metrics
from tests.support.tasks import TASKS
from tests.support.training import group, run_group

BATCH = {"global_batch_size": 12, "micro_batch_size": 2, "log_every_steps": 1}
SHORT = BATCH | {"steps": 30, "checkpoint_every_steps": 10}


@pytest.mark.slow
def test_a_hundred_losses_of_every_zero_stage_are_those_of_one_process(tmp_path: Path) -> None:
    runs = [{"name": f"stage-{stage}", "zero_stage": stage, "steps": 100, **BATCH} for stage in range(4)]
    (alone,) = run_group(tmp_path, 1, [{"name": "alone", "zero_stage": 0, "steps": 100, **BATCH}])
    assert len(alone) == 100
    assert alone[-1] < alone[0] - 0.1
    for stage, losses in enumerate(run_group(tmp_path, 2, runs)):
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < 1e-5, stage


@pytest.mark.slow
def test_two_one_and_three_workers_train_one_run(tmp_path: Path) -> None:
    stages = (1, 2, 3)
    (undisturbed,) = run_group(tmp_path, 1, [{"name": "undisturbed", "zero_stage": 1, **SHORT}])
    parts = [
        run_group(tmp_path, workers, [{"name": f"stage-{s}", "zero_stage": s, "stop": stop, **SHORT} for s in stages])
        for workers, stop in ((2, 11), (1, 21), (3, None))
    ]
    for stage, first, second, third in zip(stages, *parts, strict=True):
        losses = first[:10] + second[:10] + third
        assert len(losses) == 30, stage
        differences = [abs(a - b) / b for a, b in zip(losses, undisturbed, strict=True)]
        assert max(differences) < 1e-5, (stage, differences)
    assert statistics.fmean(undisturbed[20:]) < statistics.fmean(undisturbed[:10])


@pytest.mark.slow
def test_a_run_goes_on_under_another_stage_and_micro_batch_size(tmp_path: Path) -> None:
    (undisturbed,) = run_group(tmp_path, 1, [{"name": "undisturbed", "zero_stage": 0, **SHORT}])
    run_group(tmp_path, 2, [{"name": "run", "zero_stage": 3, "stop": 11, **SHORT}])
    ((*second,),) = run_group(tmp_path, 1, [{"name": "run", "zero_stage": 0, "stop": 21, **SHORT}])
    assert max(abs(a - b) for a, b in zip(second[:10], undisturbed[10:20], strict=True)) < 1e-5
    (third,) = run_group(tmp_path, 2, [{"name": "run", "zero_stage": 2, **SHORT, "micro_batch_size": 3}])
    assert len(third) == 10
    # Masks are drawn by micro-batch, so these are other masks of the same clips.
    assert abs(statistics.fmean(third) / statistics.fmean(undisturbed[20:]) - 1) < 0.01


@pytest.mark.slow
def test_the_moving_average_depends_on_neither_stage_nor_workers(tmp_path: Path) -> None:
    averaged = BATCH | {"steps": 12, "checkpoint_every_steps": 4, "ema_decay": 0.9}
    run_group(tmp_path, 1, [{"name": "alone", "zero_stage": 0, **averaged}])
    resized = {"name": "resized", "zero_stage": 3, "stop": 5, **averaged}
    run_group(
        tmp_path, 2, [{"name": f"stage-{stage}", "zero_stage": stage, **averaged} for stage in range(4)] + [resized]
    )
    run_group(tmp_path, 3, [{"name": "resized", "zero_stage": 1, **averaged}])
    expected = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    for name in ("stage-0", "stage-1", "stage-2", "stage-3", "resized"):
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_that_is_poisoned_on_one_worker_is_left_out_on_all(tmp_path: Path, kind: str) -> None:
    runs = [
        {"name": f"stage-{stage}", "kind": kind, "zero_stage": stage, "steps": 6, "poisoned_step": 2, **BATCH}
        for stage in range(4)
    ]
    together = run_group(tmp_path, 2, runs)
    # Fine-tuning's dropout follows the workers, and in distillation the last bits of a sum may choose another code, so
    # that one process is comparable in pre-training alone.
    expected = together[0]
    if kind == "pretrain":
        (expected,) = run_group(tmp_path, 1, [runs[0] | {"name": "alone"}])
    assert [math.isnan(loss) for loss in expected] == [False, False, True, False, False, False]
    for run, losses in zip(runs, together, strict=True):
        assert losses == pytest.approx(expected, abs=1e-5, nan_ok=True), run
        (record,) = json.loads((tmp_path / str(run["name"]) / "skipped-steps.json").read_text())
        assert record["step"] == 3
        assert len(record["clips"]) == 12  # of the whole global batch


@pytest.mark.slow
def test_held_out_clips_that_workers_share_unevenly_have_the_means_of_one_process(tmp_path: Path) -> None:
    # Weights this small would stay whole on every worker, and nobody would wait for anybody.
    gathered = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    short = BATCH | gathered | {"steps": 2, "warmup_steps": 0}
    runs = [  # of the two workers: two batches and one, one and none
        {"name": f"stage-{stage}-{batches}", "zero_stage": stage, "held_out_batches": batches, **short}
        for stage, batches in ((2, 3), (3, 3), (3, 1))
    ]
    run_group(tmp_path, 1, [run | {"name": f"alone-{run['held_out_batches']}"} for run in runs[1:]])
    run_group(tmp_path, 2, runs, timeout_seconds=60.0)

    def held_out_loss(name: str) -> float:
        return float(read_metrics(open_place(str(tmp_path / name)))[-1]["test/loss"])

    losses = {run["name"]: held_out_loss(str(run["name"])) for run in runs}
    expected = {run["name"]: held_out_loss(f"alone-{run['held_out_batches']}") for run in runs}
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len({round(loss, 4) for loss in expected.values()}) == 2  # of other clips, another mean


@pytest.mark.slow
def test_a_worker_that_hangs_is_diagnosed_by_the_other_and_the_run_goes_on(tmp_path: Path) -> None:
    run = {"name": "run", "zero_stage": 2, "steps": 6, "checkpoint_every_steps": 2, **BATCH}
    with group(tmp_path, 2, [run | {"hang": 3}], tmp_path / "never.json", timeout_seconds=10.0) as processes:
        _, stderr = processes[0].communicate(timeout=200)
        assert processes[1].poll() is None  # it still hangs
    assert "worker 0 of 2 waited longer than train.collective_timeout_seconds=" in stderr
    assert "goes on from its last checkpoint" in stderr
    assert sound_steps(open_place(str(tmp_path / "run" / "checkpoints"))) == [2]
    (whole,) = run_group(tmp_path, 2, [run | {"name": "whole"}])
    (rest,) = run_group(tmp_path, 2, [run])
    assert rest == whole[2:]


@pytest.mark.slow
def test_a_stop_request_reaches_all_workers_within_seconds_of_a_run_that_hardly_reports(tmp_path: Path) -> None:
    many = 1_000_000
    options = {"steps": many, "log_every_steps": many, "checkpoint_every_steps": many}
    output = open_place(str(tmp_path / "run"))
    with group(tmp_path, 2, [{"name": "run", "zero_stage": 1, **BATCH, **options}], tmp_path / "never.json"):
        while not (output / "attempts.json").exists():
            time.sleep(0.2)
        time.sleep(15)  # it trains
        begun = time.monotonic()
        (output / STOP_REQUEST).write_json({})
        while not sound_steps(output / "checkpoints"):
            assert time.monotonic() - begun < 25, "spot machines are gone after 30 s"
            time.sleep(0.1)
        print(f"checkpoint {time.monotonic() - begun:.1f} s after the request")
    (step,) = sound_steps(output / "checkpoints")
    commit = (output / "checkpoints" / f"step-{step:08d}" / "commit.json").read_json()
    assert commit["world_size"] == len(commit["files"]) == 2
