"""One optimizer step of fine-tuning with 527 classes, beside the same encoder trained by plain PyTorch.

Ours is the whole step of a worker: the copy of int16 samples, augmentation, filterbank, forward, backward, clipping and
AdamW under the engine. The others start from waveforms on the device and augment nothing, so they do a little less;
their AdamW is PyTorch's as one calls it, which is not fused on a CPU. Layer drop is off, because a skipped layer would
cost nothing. In bf16 ours has bf16 weights with fp32 masters (DeepSpeed); the others run under autocast.
"""

from dataclasses import replace
from typing import Any

from beats_ray.bench.cases import PlainEncoder, Step, engine_step, int16_batch, plain_step, seeded_encoder
from beats_ray.bench.costs import CLASSES, finetune_settings, labels
from beats_ray.config import BenchConfig


def our_step(config: BenchConfig, **options: Any) -> Step:
    """options: of `engine_step`."""
    return engine_step(config, *our_task(config), **options)


def our_task(config: BenchConfig) -> tuple[Any, Any, Any]:
    """The task, the settings of its training, and a batch in host memory."""
    import torch

    from beats_ray.train.finetune import FinetuneTask

    settings = finetune_settings(config)
    task = FinetuneTask(settings, seeded_encoder(config), labels())
    return task, settings.train, replace(int16_batch(config), targets_BC=_targets(config).to(torch.uint8))


def pooled_step(config: BenchConfig, plain: PlainEncoder) -> Step:
    """The encoder with a mean-pooled head."""
    import torch.nn.functional as F

    encoder, features = plain(config)
    targets_BC = _targets(config).to(config.device)

    def loss(head: Any) -> Any:
        return F.binary_cross_entropy_with_logits(head(features()).mean(1).float(), targets_BC)

    return plain_step(config, encoder, CLASSES, loss, finetune_settings(config).train)


def _targets(config: BenchConfig) -> Any:
    """targets_BC in host memory: one label a clip."""
    import torch

    return torch.eye(CLASSES)[torch.arange(config.num_clips) % CLASSES]
