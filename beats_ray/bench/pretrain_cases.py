"""One optimizer step of masked pre-training, beside the same encoder trained by plain PyTorch on every patch.

Ours is the whole step of a worker: the copy of int16 samples, filterbank, masks, forward, backward, clipping and AdamW
under the engine; labels come with the batch, as from iteration 2 on. The encoder sees a quarter of the patches, the
label predictor all of them. The others start from waveforms on the device, encode every patch and predict the labels
of three quarters of them with one linear layer, as masked prediction is done where nothing is left out (HuBERT). Their
AdamW is PyTorch's as one calls it, which is not fused on a CPU. In bf16 ours has bf16 weights with fp32 masters
(DeepSpeed); the others run under autocast.
"""

from dataclasses import replace
from typing import Any

from beats_ray.bench.cases import PlainEncoder, Step, engine_step, int16_batch, patches_of_clip, plain_step
from beats_ray.bench.costs import CODES, MASKED, pretrain_settings
from beats_ray.config import BenchConfig


def our_step(config: BenchConfig, **options: Any) -> Step:
    """options: of `engine_step`."""
    return engine_step(config, *our_task(config), **options)


def our_task(config: BenchConfig) -> tuple[Any, Any, Any]:
    """The task, the settings of its training, and a batch in host memory."""
    import torch

    from beats_ray.train.pretrain import PretrainTask

    settings = pretrain_settings(config)
    torch.manual_seed(config.seed)
    task = PretrainTask(settings, CODES, None)
    return task, settings.train, replace(int16_batch(config), patch_labels_BN=_labels(config).to(torch.int16))


def every_patch_step(config: BenchConfig, plain: PlainEncoder) -> Step:
    import torch
    import torch.nn.functional as F

    encoder, features = plain(config)
    labels_BN = _labels(config).to(config.device)
    order_N = torch.randperm(labels_BN.shape[1], generator=torch.Generator().manual_seed(config.seed))
    targets_K = order_N[: round(MASKED * labels_BN.shape[1])].to(config.device)

    def loss(head: Any) -> Any:
        logits_BKV = head(features()[:, targets_K])
        return F.cross_entropy(logits_BKV.float().flatten(0, 1), labels_BN[:, targets_K].flatten())

    return plain_step(config, encoder, CODES, loss, pretrain_settings(config).train)


def _labels(config: BenchConfig) -> Any:
    """labels_BN in host memory, one for each patch."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(CODES, (config.num_clips, patches_of_clip(config)), generator=generator)
