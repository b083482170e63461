"""The moving average of the weights: what it is, that it resumes, and who uses it."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.train.context import single_process_context
from beats_ray.train.engine import Engine
from beats_ray.train.loop import Prepared, evaluate
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

DECAY = 0.75
STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


class Squares(torch.nn.Module):
    """Two parameter groups, so that ZeRO has several flat parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
        return self.linear(values.to(self.linear.weight.dtype)).float().square().sum(), {}


def build(zero_stage: int, precision: str = "fp32") -> Engine:
    settings = TrainSettings(
        steps=10, warmup_steps=0, learning_rate=0.1, global_batch_size=1, micro_batch_size=1, zero_stage=zero_stage,
        precision=precision, ema_decay=DECAY,
    )  # fmt: skip
    return Engine(Squares(), settings)


def train(engine: Engine, step: int, value: float = 1.0) -> bool:
    loss, _ = engine(torch.full((1, 3), value))
    engine.backward(loss)
    return engine.step(step, last_micro_batch=True)


def state(engine: Engine, key: str) -> dict[str, torch.Tensor]:
    found = engine.snapshot()
    return {name: found[f"{name}/{key}"] for name in ("linear.weight", "linear.bias")}


@STAGES
def test_the_average_is_the_one_computed_by_hand_and_a_skipped_step_leaves_it(zero_stage: int) -> None:
    engine = build(zero_stage)
    expected = state(engine, "fp32")
    for step in range(6):
        poisoned = step == 3
        assert train(engine, step, float("nan") if poisoned else 1.0) is not poisoned
        if not poisoned:
            weights = state(engine, "fp32")
            expected = {name: DECAY * expected[name] + (1 - DECAY) * weights[name] for name in expected}
    assert not torch.allclose(expected["linear.weight"], state(engine, "fp32")["linear.weight"], rtol=0.01)
    published = engine.full_state_dict()
    for name, average in state(engine, "ema").items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(published[name], average)


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))]
)
def test_weights_are_the_average_for_a_while_and_then_as_before(zero_stage: int, precision: str) -> None:
    engine = build(zero_stage, precision)
    for step in range(3):
        train(engine, step)
    probe = torch.full((1, 3), 2.0)
    average = state(engine, "ema")
    before = engine(probe)[0].detach()
    with torch.no_grad(), engine.averaged():
        seen = engine(probe)[0]
    by_hand = torch.nn.functional.linear(probe, average["linear.weight"], average["linear.bias"]).square().sum()
    torch.testing.assert_close(seen, by_hand, rtol=1e-5 if precision == "fp32" else 0.02, atol=0)
    assert abs(seen / before - 1) > 0.1
    assert torch.equal(engine(probe)[0], before)


@STAGES
def test_ten_averaged_steps_equal_five_a_restore_and_five_bit_for_bit(
    tmp_path: Path, pretraining, zero_stage: int
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: int, _metrics: dict[str, float]) -> None:
        if step == 7:
            raise Interrupted

    options = {"ema_decay": DECAY, "zero_stage": zero_stage, "checkpoint_every_steps": 5}
    whole = pretraining.run(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt, **options)
    assert pretraining.run(tmp_path / "broken", **options) == whole[5:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    without = pretraining.run(tmp_path / "without", zero_stage=zero_stage)
    assert without == whole  # training itself does not see the average
    last = load_file(tmp_path / "without" / "model" / "model.safetensors")
    assert not all(torch.allclose(weights[0][name], last[name]) for name in last)


def test_a_checkpoint_without_the_average_is_refused(tmp_path: Path) -> None:
    engine = build(1)
    found = engine.snapshot()
    del found["linear.bias/ema"]
    with pytest.raises(RuntimeError, match=r"'linear.bias/ema' is only in one of the two"):
        engine.restore(found)


class Means:
    """The task of `Squares`."""

    module = Squares()

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        return Prepared((batch.audio_BS[:1, :3].float() / 3000,), torch.tensor(1))


class HeldOut(SyntheticBatches):
    def held_out(self, part: str) -> Iterable[MicroBatch]:
        return [next(self.training(0))]


def test_evaluation_sees_the_average() -> None:
    engine, task, source = build(1), Means(), HeldOut(4, 4)
    task.module = engine.module  # type: ignore[assignment]
    for step in range(3):
        train(engine, step)
    context = single_process_context(lambda _step, _metrics: None)
    found = evaluate(task, engine, source, context, "validation")  # type: ignore[arg-type]
    average = state(engine, "ema")
    probe = next(source.training(0)).audio_BS[:1, :3].float() / 3000
    expected = torch.nn.functional.linear(probe, average["linear.weight"], average["linear.bias"]).square().sum()
    assert found["validation/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["validation/loss"] != pytest.approx(float(engine(probe)[0]), rel=0.1)
