"""One optimizer step of fine-tuning with 527 classes, beside the same encoder trained by plain PyTorch.

Ours is the whole step of a worker: the copy of int16 samples, augmentation, filterbank, forward, backward, clipping and
AdamW under the engine. The others start from waveforms on the device and augment nothing, so they do a little less.
Layer drop is off, because a skipped layer would cost nothing. In bf16 ours has bf16 weights with fp32 masters
(DeepSpeed); the others run under autocast.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from beats_ray.bench.cases import Step, engine_step, int16_batch, openbeats_encoder, random_waves, seeded_encoder
from beats_ray.bench.costs import CLASSES, finetune_settings, labels
from beats_ray.config import BenchConfig


def our_step(config: BenchConfig) -> Step:
    import torch

    from beats_ray.train.finetune import FinetuneTask

    settings = finetune_settings(config)
    task = FinetuneTask(settings, seeded_encoder(config), labels())
    batch = replace(int16_batch(config), targets_BC=_targets(config).to(torch.uint8))
    return engine_step(config, task, settings.train, batch)


def formula_step(config: BenchConfig) -> Step:
    from beats_ray.bench.released_formula import FormulaEncoder
    from beats_ray.models import encoder_config

    encoder, wave_BS = FormulaEncoder(encoder_config(config.preset)).to(config.device).train(), random_waves(config)
    return _plain_step(config, encoder, lambda: encoder(wave_BS))


def openbeats_step(config: BenchConfig) -> Step:
    return _plain_step(config, *openbeats_encoder(config))


def _plain_step(config: BenchConfig, encoder: Any, features: Callable[[], Any]) -> Step:
    """The encoder with a mean-pooled head, moved by AdamW as one would write it."""
    import torch
    import torch.nn.functional as F

    from beats_ray.models import encoder_config

    head = torch.nn.Linear(encoder_config(config.preset).width, CLASSES).to(config.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    train = finetune_settings(config).train
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=train.betas, eps=train.epsilon, weight_decay=train.weight_decay
    )
    targets_BC = _targets(config).to(config.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            logits_BC = head(features()).mean(1)
        loss = F.binary_cross_entropy_with_logits(logits_BC.float(), targets_BC)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()

    return step


def _targets(config: BenchConfig) -> Any:
    """targets_BC in host memory: one label a clip."""
    import torch

    return torch.eye(CLASSES)[torch.arange(config.num_clips) % CLASSES]
