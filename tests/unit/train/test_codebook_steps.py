"""A run moves its codebook once in an optimizer step, and not at all in one that is left out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from beats_ray.models import SelfDistilledTokenizer, load_model
from beats_ray.train.distill import DistillTask
from tests.support.distilling import distil
from tests.support.training import Stopped

pytestmark = pytest.mark.unit

State = dict[str, Tensor]


def codebook_of(task: DistillTask) -> State:
    return {name: value.clone() for name, value in task.module.model.tokenizer.quantizer.state_dict().items()}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, State, State]]:
    """Of each step of a run: whether the weights moved, and the codebook before and after its end."""
    seen: list[tuple[bool, State, State]] = []
    end_step = DistillTask.end_step

    def recorded(task: DistillTask, moved: bool) -> None:
        before = codebook_of(task)
        end_step(task, moved)
        seen.append((moved, before, codebook_of(task)))

    monkeypatch.setattr(DistillTask, "end_step", recorded)
    return seen


def test_a_run_has_one_codebook_whole_or_accumulated_over_four_micro_batches(tmp_path: Path) -> None:
    """k-means on the first two global batches, then four moves."""
    found: list[State] = []
    for size in (16, 4):
        output = tmp_path / str(size)
        distil(output, tokenizer={"init_batches": 2}, steps=6, warmup_steps=2, micro_batch_size=size)
        tokenizer = load_model(output / "model")
        assert isinstance(tokenizer, SelfDistilledTokenizer)
        found.append(tokenizer.quantizer.state_dict())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-6)
    assert int(found[0]["batches_seen"]) == 6


@pytest.mark.parametrize("poisoned_step", [0, 1, 4])  # before there is a codebook, in k-means, in the moving average
def test_a_step_with_one_poisoned_micro_batch_leaves_the_codebook_as_it_was(
    tmp_path: Path, pretraining, steps: list[tuple[bool, State, State]], poisoned_step: int
) -> None:
    pretraining.run(tmp_path, kind="distill", steps=6, micro_batch_size=2, poisoned_step=poisoned_step)
    for step, (moved, before, after) in enumerate(steps):
        assert moved == (step != poisoned_step)
        assert torch.equal(before["codebook_VD"], after["codebook_VD"]) != moved
        assert torch.equal(before["usage_V"], after["usage_V"]) != moved
        assert after["batches_seen"] - before["batches_seen"] == int(moved)


def test_a_run_that_is_stopped_within_kmeans_is_the_same_run_when_it_goes_on(tmp_path: Path, pretraining) -> None:
    """k-means needs the vectors of all its steps, which no checkpoint holds: so there is none before it is done."""
    options = {"kind": "distill", "steps": 6, "checkpoint_every_steps": 1}
    whole = pretraining.run(tmp_path / "whole", **options)

    def stop(step: int, _metrics: dict[str, float]) -> None:
        if step == 1:
            raise Stopped

    with pytest.raises(Stopped):
        pretraining.run(tmp_path / "stopped", stop, **options)
    assert not list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert pretraining.run(tmp_path / "stopped", **options) == whole
    models = [load_model(tmp_path / name / "model").state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert len(list((tmp_path / "stopped" / "checkpoints").glob("step-*"))) == 2  # kept of those after k-means
