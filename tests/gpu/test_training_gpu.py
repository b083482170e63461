"""A worker's whole steps on a CUDA device: copy, filterbank, module and engine. Run by `make test-gpu`."""

from typing import Any

import pytest
import torch

from beats_ray.bench import finetune_cases, pretrain_cases
from beats_ray.bench.cases import engine_step, int16_batch, with_padding
from beats_ray.config import BenchConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

STEPS = 3


def settings(precision: Any = "bf16") -> BenchConfig:
    return BenchConfig(name="pretrain", preset="tiny", clips=8, seconds=5.0, device="cuda", precision=precision)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("padding", ["none", "left out", "computed"])
@pytest.mark.parametrize("cases", [pretrain_cases, finetune_cases])
@pytest.mark.parametrize("attention", ["auto", "flex"])
def test_a_worker_moves_finite_weights(
    cases: Any, padding: Any, precision: str, ema_decay: float, attention: str
) -> None:
    pytest.importorskip("deepspeed", reason="the engine's package is not installed")
    config = settings(precision)
    task, train, batch = cases.our_task(config)
    more = {"ema_decay": ema_decay, "attention": attention, "warmup_steps": 0, "learning_rate": 1e-2}
    train = train.model_copy(update=more)
    step = engine_step(config, task, train, batch, padding=padding)
    before = [one.detach().clone() for one in task.module.parameters() if one.requires_grad]
    for _ in range(STEPS):
        step()
    after = [one for one in task.module.parameters() if one.requires_grad]
    assert {one.device.type for one in after} == {"cuda"}
    assert all(one.isfinite().all() for one in after)
    assert any(not torch.equal(old.to(new), new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("cases", [pretrain_cases, finetune_cases])
def test_neither_forward_nor_backward_pass_waits_for_the_device(cases: Any, is_padded: bool) -> None:
    task, _, batch = cases.our_task(settings())
    batch = with_padding(batch) if is_padded else batch
    module = task.module.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    for mode in ("default", "error"):  # what is set up once may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss_sum, _ = module(*task.prepare(batch.to("cuda"), generator, training=True).inputs)
            loss_sum.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_in_pinned_memory_arrives_as_it_was() -> None:
    pinned, plain = int16_batch(settings()), int16_batch(settings().model_copy(update={"device": "cpu"}))
    arrived = pinned.to("cuda")
    for name in ("audio_BS", "num_samples_B", "targets_BC"):
        assert getattr(pinned, name).is_pinned(), name
        assert torch.equal(getattr(arrived, name).cpu(), getattr(plain, name)), name
