"""A worker's whole steps on a CUDA device: copy, filterbank, module and engine. Run by `make test-gpu`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from beats_ray.bench.cases import engine_step, int16_batch, seeded_encoder
from beats_ray.bench.costs import CODES, finetune_settings, labels, pretrain_settings
from beats_ray.config import BenchConfig
from beats_ray.models import num_patches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

STEPS = 3


def settings(precision: Any = "bf16") -> BenchConfig:
    return BenchConfig(name="pretrain", preset="tiny", clips=8, seconds=5.0, device="cuda", precision=precision)


def pretraining(config: BenchConfig) -> tuple[Any, Any, Any]:
    from beats_ray.train.pretrain import PretrainTask

    run = pretrain_settings(config)
    patch_labels_BN = torch.randint(CODES, (config.num_clips, num_patches(80_000)), dtype=torch.int16)
    return PretrainTask(run, CODES, None), run.train, replace(int16_batch(config), patch_labels_BN=patch_labels_BN)


def finetuning(config: BenchConfig) -> tuple[Any, Any, Any]:
    from beats_ray.train.finetune import FinetuneTask

    run, manifest = finetune_settings(config), labels()
    targets_BC = torch.eye(len(manifest.label_names), dtype=torch.uint8)[: config.num_clips]
    return (
        FinetuneTask(run, seeded_encoder(config), manifest),
        run.train,
        replace(int16_batch(config), targets_BC=targets_BC),
    )


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [pretraining, finetuning])
def test_a_worker_moves_finite_weights(build: Any, precision: str, ema_decay: float) -> None:
    pytest.importorskip("deepspeed", reason="the engine's package is not installed")
    config = settings(precision)
    task, train, batch = build(config)
    train = train.model_copy(update={"ema_decay": ema_decay, "warmup_steps": 0, "learning_rate": 1e-2})
    step = engine_step(config, task, train, batch)
    before = [one.detach().clone() for one in task.module.parameters() if one.requires_grad]
    for _ in range(STEPS):
        step()
    after = [one for one in task.module.parameters() if one.requires_grad]
    assert {one.device.type for one in after} == {"cuda"}
    assert all(one.isfinite().all() for one in after)
    assert any(not torch.equal(old.to(new), new) for old, new in zip(before, after, strict=True))


def test_a_batch_in_pinned_memory_arrives_as_it_was() -> None:
    pinned, plain = int16_batch(settings()), int16_batch(settings().model_copy(update={"device": "cpu"}))
    arrived = pinned.to("cuda")
    for name in ("audio_BS", "num_samples_B", "targets_BC"):
        assert getattr(pinned, name).is_pinned(), name
        assert torch.equal(getattr(arrived, name).cpu(), getattr(plain, name)), name
