"""The stages of a BEATs run and the device's ceilings, each as a step. What they cost by formula is in `costs.py`.

Stages after the filterbank start from its result, so that none is measured twice.
Shapes: B clips, S samples, T frames, F mel bins, N patches, D width, C classes.
"""

from typing import Any

from beats_ray.bench.cases import Step, patches_of_clip, random_waves, sampled_mask, seeded_encoder, training_step
from beats_ray.bench.costs import (
    CLASSES,
    CODES,
    COPIED_BYTES,
    MATRIX_SIDE,
    distill_settings,
    finetune_settings,
    labels,
    pretrain_settings,
)
from beats_ray.bench.tokenize_cases import fitted_tokenizer
from beats_ray.config import BenchConfig

# --- ceilings ---------------------------------------------------------------------------------------------------------


def matrix_product(config: BenchConfig) -> Step:
    """A square matrix product in the precision of the run."""
    import torch

    side = MATRIX_SIDE[config.device]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, dtype=dtype, device=config.device) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: (torch.mm(left, right, out=product), None)[1]


def memory_copy(config: BenchConfig) -> Step:
    """A copy of more than any cache holds."""
    import torch

    source = torch.ones(COPIED_BYTES // 4, device=config.device)
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source), None)[1]


# --- stages -----------------------------------------------------------------------------------------------------------


def _num_real(config: BenchConfig) -> int:
    """Patches of all clips, none of them padding, which the host of a worker knows too."""
    return config.num_clips * patches_of_clip(config)


def _fbank(config: BenchConfig) -> tuple[Any, Any]:
    """(fbank_BTF as the models take it, num_frames_B)"""
    from beats_ray.models import compute_fbank, normalise_fbank

    fbank_BTF, num_frames_B = compute_fbank(random_waves(config))
    return normalise_fbank(fbank_BTF), num_frames_B


def _summed(config: BenchConfig, module: Any, inputs: tuple[Any, ...]) -> Step:
    """Forward and backward of a task's module, whose first output is the summed loss."""
    import torch

    def step() -> None:
        module.zero_grad(set_to_none=False)
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = module(*inputs)[0]
        loss.backward()

    return step


def filterbank(config: BenchConfig) -> Step:
    from beats_ray.models import compute_fbank

    wave_BS = (random_waves(config) * 2**15).clamp(-(2**15), 2**15 - 1).short()
    return lambda: (compute_fbank(wave_BS), None)[1]


def encoder_forward(config: BenchConfig) -> Step:
    import torch

    encoder, inputs, num_real = seeded_encoder(config).eval(), _fbank(config), _num_real(config)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            encoder(*inputs, num_real=num_real)

    return step


def encoder_step(config: BenchConfig) -> Step:
    encoder, inputs, num_real = seeded_encoder(config), _fbank(config), _num_real(config)
    return training_step(config, encoder, lambda: encoder(*inputs, num_real=num_real).features_BND)


def masked_encoder_step(config: BenchConfig) -> Step:
    encoder, inputs, mask = seeded_encoder(config), _fbank(config), sampled_mask(config)
    options = {"visible_BM": mask.visible_BM, "num_real": mask.num_visible}
    return training_step(config, encoder, lambda: encoder(*inputs, **options).features_BND)


def random_labels(config: BenchConfig) -> Step:
    from beats_ray.models import RandomProjectionTokenizer

    tokenizer, inputs = RandomProjectionTokenizer().to(config.device), _fbank(config)
    return lambda: (tokenizer.label_patches(*inputs), None)[1]


def distilled_labels(config: BenchConfig) -> Step:
    import torch

    tokenizer, inputs = fitted_tokenizer(config).to(config.device), _fbank(config)

    def step() -> None:
        with torch.inference_mode():
            tokenizer.label_patches(*inputs)

    return step


def pretraining_step(config: BenchConfig) -> Step:
    from beats_ray.models import RandomProjectionTokenizer
    from beats_ray.train.pretrain import PretrainTask

    inputs, mask = _fbank(config), sampled_mask(config)
    tokenizer = RandomProjectionTokenizer().to(config.device)
    task = PretrainTask(pretrain_settings(config), CODES, tokenizer)
    return _summed(config, task.module.to(config.device).train(), (*inputs, mask, tokenizer.label_patches(*inputs)))


def tokenizer_step(config: BenchConfig) -> Step:
    """The teacher's forward pass, and the tokenizer's step, past the k-means of its first batches."""
    import torch

    from beats_ray.train.distill import DistillTask

    teacher, inputs, num_real = seeded_encoder(config).eval(), _fbank(config), _num_real(config)
    settings = distill_settings(config)
    module = DistillTask(settings, teacher).module.to(config.device).train()
    quantizer = module.model.tokenizer.quantizer
    quantizer.codebook_VD.normal_()
    quantizer.batches_seen.fill_(settings.tokenizer.init_batches)

    def step() -> None:
        with torch.no_grad(), torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
            features_BND = teacher(*inputs, num_real=num_real).features_BND
        _summed(config, module, (*inputs, features_BND, num_real))()

    return step


def finetuning_step(config: BenchConfig) -> Step:
    import torch

    from beats_ray.train.finetune import FinetuneTask

    inputs = _fbank(config)
    module = FinetuneTask(finetune_settings(config), seeded_encoder(config), labels()).module
    targets_BC = torch.eye(CLASSES, device=config.device)[torch.arange(config.num_clips) % CLASSES]
    return _summed(config, module.to(config.device).train(), (*inputs, targets_BC, _num_real(config)))
