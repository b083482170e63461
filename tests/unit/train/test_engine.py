"""The engine: what its settings become, offloading, and compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from beats_ray.bench.cases import training_process
from beats_ray.bench.pretrain_cases import our_task
from beats_ray.config import BenchConfig, ConfigError, TrainSettings, validate
from beats_ray.models import build_encoder
from beats_ray.models.transformer import stacks_of
from beats_ray.train.engine import Engine, check_attention, deepspeed_config
from beats_ray.train.optimizer import build_optimizer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer=true needs a zero_stage of 1, 2 or 3"),
        ({"offload_parameters": True, "zero_stage": 2}, "offload_parameters=true needs zero_stage=3, and it is 2; use"),
    ],
)
def test_offloading_needs_a_zero_stage_that_divides_what_it_moves(train: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainSettings, train)


def test_offloading_becomes_deepspeeds_settings_and_extras_may_not_contradict() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"ratio": 0.5}}}
    settings = TrainSettings(zero_stage=3, offload_optimizer=True, offload_parameters=True, deepspeed=extra)
    assert deepspeed_config(settings, 1)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5},
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    nvme: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}}
    assert deepspeed_config(TrainSettings(deepspeed=nvme), 1)["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match=r"offload_optimizer.device='nvme' contradicts 'cpu'"):
        deepspeed_config(TrainSettings(offload_optimizer=True, deepspeed=nvme), 1)


class Interrupted(Exception):
    """Stands for a killed worker."""


def interrupt(step: int, _metrics: dict[str, float]) -> None:
    if step == 4:
        raise Interrupted


@pytest.mark.parametrize(
    "offload",
    [
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ],
    ids=lambda offload: f"stage-{offload['zero_stage']}",
)
def test_an_offloaded_run_trains_and_resumes_like_one_that_is_not(
    tmp_path: Path, pretraining, offload: dict[str, object]
) -> None:
    options = {"steps": 6, "checkpoint_every_steps": 3, "ema_decay": 0.5, "micro_batch_size": 2}
    plain = pretraining.run(tmp_path / "plain", zero_stage=0, **options)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "offloaded", interrupt, **options, **offload)
    rest = pretraining.run(tmp_path / "offloaded", **options, **offload)
    assert rest == pytest.approx(plain[3:], abs=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "offloaded")]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5


@pytest.mark.parametrize("attention", ["auto", "flex"])
def test_every_stack_that_is_trained_attends_as_it_is_told(attention: Any) -> None:
    config = BenchConfig(name="pretrain", preset="tiny", clips=2, seconds=1.0)
    task, train, _ = our_task(config)
    training_process(config)
    Engine(task.module, train.model_copy(update={"attention": attention}))
    assert [stack.attention_backend for stack in stacks_of(task.module)] == [attention] * 2  # of encoder and predictor


def test_attention_dropout_and_flex_exclude_each_other() -> None:
    module = build_encoder("tiny", num_layers=1, attention_dropout=0.1)
    check_attention(module, TrainSettings())
    with pytest.raises(
        ConfigError, match=r"train.attention=flex cannot drop.*attention_dropout=0.1; use train.attention=auto"
    ):
        check_attention(module, TrainSettings(attention="flex", use_gpu=True))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_compiled_run_trains_alike_and_is_compiled_for_its_first_batch_alone(
    tmp_path: Path, pretraining, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    from torch._dynamo.utils import counters

    options = {"steps": 6, "checkpoint_every_steps": 3, "zero_stage": zero_stage}
    eager = pretraining.run(tmp_path / "eager", **options)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    losses = pretraining.run(
        tmp_path / "compiled",
        lambda _step, _metrics: graphs.append(counters["stats"]["unique_graphs"]),
        compile=True,
        **options,
    )
    assert graphs[0] >= 1
    assert set(graphs) == {graphs[0]}  # lengths of clips and numbers of targets differ from batch to batch
    assert losses == pytest.approx(eager, rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("eager", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    checkpoints = [load_file(next((tmp_path / name / "checkpoints" / "step-00000003").glob("*.safetensors")))
                   for name in ("eager", "compiled")]  # fmt: skip
    assert checkpoints[0].keys() == checkpoints[1].keys()


# --- bf16 without ZeRO ------------------------------------------------------------------------------------------------

STEPS, ACCUMULATED = 20, 2


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))

    def forward(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.net(values.to(self.net[0].weight.dtype)).float(), target)


def half_precision(zero_stage: int, precision: str = "bf16") -> TrainSettings:
    """Settings of which those without ZeRO are refused."""
    settings = TrainSettings(
        steps=STEPS, warmup_steps=0, learning_rate=0.01, schedule="constant", epsilon=1e-8, precision=precision,
        global_batch_size=ACCUMULATED, micro_batch_size=1, zero_stage=1,
    )  # fmt: skip
    return settings.model_copy(update={"zero_stage": zero_stage})


def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    values = torch.randn(STEPS * ACCUMULATED, 8, 16, generator=torch.Generator().manual_seed(1))
    return [(one, one.sum(-1, keepdim=True)) for one in values]


def losses_of_torch() -> list[float]:
    """bf16 autocast over fp32 weights, in one process without DeepSpeed."""
    module, losses = Regression(), []
    optimizer = build_optimizer(module, half_precision(1))
    for index, batch in enumerate(micro_batches()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(*batch)
        (loss / ACCUMULATED).backward()
        losses.append(loss.item())
        if index % ACCUMULATED == ACCUMULATED - 1:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def losses_of_deepspeed(zero_stage: int, undo_hidden_step: bool = False) -> list[float]:
    engine, losses = Engine(Regression(), half_precision(zero_stage)), []
    counted = {float(state["step"]) for state in engine._adamw.state.values()}
    assert counted == ({1.0} if zero_stage == 0 else set())
    if undo_hidden_step:
        for state in engine._adamw.state.values():
            state["step"].zero_()
        for weights, masters in zip(engine._optimizer.fp16_groups, engine._optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                master.data.copy_(weight)  # which weight decay has moved
    for index, batch in enumerate(micro_batches()):
        loss = engine(*batch)
        engine.backward(loss / ACCUMULATED)
        losses.append(loss.item())
        engine.step(index // ACCUMULATED, index % ACCUMULATED == ACCUMULATED - 1)
    return losses


def test_bf16_without_zero_drifts_by_a_step_of_adamw_that_deepspeed_takes_before_the_first() -> None:
    expected = losses_of_torch()

    def drift(losses: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, expected, strict=True))

    first_stage, none = losses_of_deepspeed(1), losses_of_deepspeed(0)
    print(f"drift of 40 micro-steps, loss {expected[0]:.2f} to {expected[-1]:.2f}: "
          f"stage 1 {drift(first_stage):.3f}, stage 0 {drift(none):.3f}")  # fmt: skip
    assert drift(first_stage) < 0.05
    assert drift(none) > 0.5
    assert losses_of_deepspeed(0, undo_hidden_step=True) == first_stage


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_zero_is_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision={precision} with zero_stage=0 .*use zero_stage=1 or precision="):
        validate(TrainSettings, {"precision": precision, "zero_stage": 0})
