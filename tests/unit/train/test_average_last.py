"""The mean of the weights at the last points: which points, that it is their mean, that it resumes, who uses it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beats_ray.config import ConfigError, TrainSettings, validate
from beats_ray.train.engine import Engine

pytestmark = pytest.mark.unit

STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
LAST = {"average_last": 3, "average_every_steps": 2}  # after steps 6, 8 and 10 of 10


class Squares(torch.nn.Module):
    """One parameter under two names beside another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 3)
        self.again = torch.nn.Linear(3, 3)
        self.again.weight = self.linear.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.linear(values.to(self.linear.weight.dtype))
        return self.again(values).float().square().sum()


def build(zero_stage: int, precision: str = "fp32") -> Engine:
    settings = TrainSettings(
        steps=10, warmup_steps=0, learning_rate=0.1, global_batch_size=1, micro_batch_size=1, zero_stage=zero_stage,
        precision=precision, **LAST,
    )  # fmt: skip
    return Engine(Squares(), settings)


def weights(engine: Engine) -> torch.Tensor:
    return engine.snapshot()["linear.weight/fp32"]


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 3))]
)
def test_what_is_published_is_the_mean_over_the_points_under_every_name(zero_stage: int, precision: str) -> None:
    engine, seen = build(zero_stage, precision), []
    for step in range(10):
        value = (
            float("nan") if step == 7 else 1.0
        )  # a skipped step leaves the weights, and its point counts all the same
        engine.backward(engine(torch.full((1, 3), value)))
        assert engine.step(step, last_micro_batch=True) is (step != 7)
        if step + 1 in (6, 8, 10):
            seen.append(weights(engine))
        expected = torch.stack(seen).mean(0) if seen else weights(engine)
        published = engine.full_state_dict()
        for name in ("linear.weight", "again.weight"):
            torch.testing.assert_close(published[name], expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(expected, weights(engine), rtol=0.01)
    with engine.evaluating():
        shown = engine._whole(engine.module.linear.weight, "").float()
        torch.testing.assert_close(shown, expected, rtol=1e-5 if precision == "fp32" else 0.01, atol=1e-6)


def test_before_the_first_point_nothing_is_averaged() -> None:
    engine = build(1)
    engine.backward(engine(torch.ones(1, 3)))
    engine.step(0, last_micro_batch=True)
    before = weights(engine)
    with engine.averaged():
        assert torch.equal(engine.module.linear.weight, before)


@STAGES
def test_an_averaged_run_equals_one_that_was_interrupted_between_two_points_bit_for_bit(
    tmp_path: Path, pretraining, zero_stage: int
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: int, _metrics: dict[str, float]) -> None:
        if step == 9:
            raise Interrupted

    options = {**LAST, "zero_stage": zero_stage, "checkpoint_every_steps": 7}
    whole = pretraining.run(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt, **options)
    assert pretraining.run(tmp_path / "broken", **options) == whole[7:]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert pretraining.run(tmp_path / "plain", zero_stage=zero_stage) == whole  # training does not see the mean
    last = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    assert not all(torch.allclose(one[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("steps", "last", "every", "points"),
    [(10, 3, 2, [6, 8, 10]), (10, 1, 5, [10]), (10, 4, 3, [1, 4, 7, 10]), (7, 2, 6, [1, 7]), (9, 0, 2, [])],
)
def test_points_are_counted_back_from_the_last_step(steps: int, last: int, every: int, points: list[int]) -> None:
    settings = TrainSettings(steps=steps, warmup_steps=0, average_last=last, average_every_steps=every)
    found = {done: settings.average_point(done) for done in range(1, steps + 1)}
    assert {done: number for done, number in found.items() if number} == {done: i for i, done in enumerate(points, 1)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"average_last": 5, "average_every_steps": 3}, "use average_last=4"),
        ({"average_last": 2, "average_every_steps": 3, "ema_decay": 0.9}, "two averages of the weights"),
    ],
)
def test_averages_that_cannot_be_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        validate(TrainSettings, {"steps": 10, "warmup_steps": 0, **settings})
