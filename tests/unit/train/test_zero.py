"""ZeRO stages and numbers of workers change where the state lies, not what a run does: real groups of processes."""

import statistics
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.training import run_group

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
