"""What the stages of a BEATs run cost by formula: FLOPs and bytes of one step, for floors and MFU.

FLOPs are those of `train/flops.py`. Bytes are those that go to and from memory: everything that a layer keeps for
the backward pass (`train/memory.py`) is written once and read once, weights are read in each pass, and their gradients
written. Caches hold some of it back, kernels move more, and a CPU keeps less than a GPU, for which the formula is: a
yardstick and no count.
"""

from collections.abc import Callable
from typing import Any, Literal

from beats_ray.bench.cases import Cost
from beats_ray.config import BenchConfig
from beats_ray.data.manifest import DatasetManifest

CODES = 1024
CLASSES = 527
MASKED = 0.75
COPIED_BYTES = 2**28
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


def labels() -> DatasetManifest:
    """Of a data set without clips: its vocabulary is all that a fine-tuning task reads."""
    names = tuple(f"class {index}" for index in range(CLASSES))
    return DatasetManifest(
        name="bench", label_names=names, multi_label=True, clips=0, clips_by_fold={}, clips_by_split={}, seconds=0.0,
        fbank_mean=0.0, fbank_std=1.0, source="bench", source_files=0, quarantined=0, shards=(),
    )  # fmt: skip


# --- settings that steps and costs share ------------------------------------------------------------------------------


def _common(config: BenchConfig) -> dict[str, Any]:
    clips = config.num_clips
    train = {
        "micro_batch_size": clips, "global_batch_size": clips, "precision": config.precision,
        "use_gpu": config.device == "cuda",
    }  # fmt: skip
    return {"output": "-", "data": {"clip_seconds": config.seconds}, "train": train}


def pretrain_settings(config: BenchConfig) -> Any:
    """Of pre-training on labels that come with the clips, as from iteration 2 on."""
    from beats_ray.config import PretrainConfig

    masking = {"ratio": MASKED}
    return PretrainConfig(**_common(config), encoder={"preset": config.preset}, masking=masking, labels="-")


def distill_settings(config: BenchConfig) -> Any:
    from beats_ray.config import DistillConfig

    return DistillConfig(**_common(config), encoder={"preset": config.preset})


def finetune_settings(config: BenchConfig) -> Any:
    from beats_ray.config import FinetuneConfig

    return FinetuneConfig(**_common(config), layer_drop=0.0)  # a skipped layer would cost nothing


# --- costs ------------------------------------------------------------------------------------------------------------


def _encoder_of(config: BenchConfig) -> tuple[Any, int]:
    """(encoder's settings, patches of a clip)"""
    from beats_ray.models import encoder_config
    from beats_ray.train.flops import patches_of

    encoder = encoder_config(config.preset)
    return encoder, patches_of(config.seconds, encoder)


def _weight_bytes(config: BenchConfig, module: Callable[[], Any]) -> int:
    """Of a module that is built without memory."""
    import torch

    from beats_ray.train.memory import value_bytes

    with torch.device("meta"):
        values = sum(one.numel() for one in module().parameters())
    return values * value_bytes(config.precision)


def _encoder_weights(config: BenchConfig) -> int:
    from beats_ray.models import BeatsEncoder

    return _weight_bytes(config, lambda: BeatsEncoder(_encoder_of(config)[0]))


def _step_bytes(kept_bytes: int, weight_bytes: int) -> int:
    """What is kept is written and read; weights are read in both passes, gradients written."""
    return 2 * kept_bytes + 3 * weight_bytes


def matrix_product_cost(config: BenchConfig) -> Cost:
    side = MATRIX_SIDE[config.device]
    return Cost(2.0 * side**3, 3.0 * side**2 * (2 if config.precision == "bf16" else 4))


def memory_copy_cost(_config: BenchConfig) -> Cost:
    return Cost(0.0, 2.0 * COPIED_BYTES)


def filterbank_cost(config: BenchConfig) -> Cost:
    from beats_ray.models.config import NUM_MEL_BINS
    from beats_ray.models.fbank import num_frames
    from beats_ray.train.flops import fbank_flops

    samples = round(config.seconds * 16_000)
    moved = 2 * samples + 4 * num_frames(samples) * NUM_MEL_BINS  # int16 read, fp32 written
    return Cost(config.num_clips * fbank_flops(samples), config.num_clips * moved)


def encoder_forward_cost(config: BenchConfig) -> Cost:
    from beats_ray.train.flops import encoder_flops
    from beats_ray.train.memory import encoder_bytes

    encoder, patches = _encoder_of(config)
    between_layers = encoder_bytes(encoder, config.num_clips, patches, config.precision)
    return Cost(
        config.num_clips * encoder_flops(encoder, patches), 2 * between_layers + _encoder_weights(config)
    )  # fmt: skip


def encoder_step_cost(config: BenchConfig) -> Cost:
    from beats_ray.train.flops import encoder_flops, patch_embedding_flops
    from beats_ray.train.memory import encoder_bytes

    encoder, patches = _encoder_of(config)
    flops = 3 * encoder_flops(encoder, patches) - patch_embedding_flops(encoder, patches)
    kept = encoder_bytes(encoder, config.num_clips, patches, config.precision)
    return Cost(config.num_clips * flops, _step_bytes(kept, _encoder_weights(config)))


def every_patch_step_cost(config: BenchConfig) -> Cost:
    """Masked prediction with an encoder that sees every patch, and one linear layer for the labels of the masked."""
    from beats_ray.train.flops import masked_counts
    from beats_ray.train.memory import value_bytes

    encoder, patches = _encoder_of(config)
    _, targets = masked_counts(patches, pretrain_settings(config).masking)
    predictions, weights = config.num_clips * targets, encoder.width * CODES
    kept_bytes = predictions * (encoder.width * value_bytes(config.precision) + 4 * CODES)  # the logits in fp32
    head_bytes = _step_bytes(kept_bytes, weights * value_bytes(config.precision))
    step = encoder_step_cost(config)
    return Cost(step.flops + 6.0 * predictions * weights, step.bytes + head_bytes)


def masked_encoder_step_cost(config: BenchConfig, positions: Literal["true", "compact"] = "true") -> Cost:
    from beats_ray.train.flops import encoder_flops, masked_counts, patch_embedding_flops
    from beats_ray.train.memory import encoder_bytes

    encoder, patches = _encoder_of(config)
    visible, _ = masked_counts(patches, pretrain_settings(config).masking)
    grid = patches if positions == "true" else visible
    forward = encoder_flops(encoder, visible, grid_patches=grid)
    kept = encoder_bytes(encoder, config.num_clips, visible, config.precision, grid_patches=grid)
    return Cost(
        config.num_clips * (3 * forward - patch_embedding_flops(encoder, visible)),
        _step_bytes(kept, _encoder_weights(config)),
    )


def random_labels_cost(config: BenchConfig) -> Cost:
    from beats_ray.models import RandomProjectionTokenizer, describe_model
    from beats_ray.train.flops import tokenizer_flops

    tokenizer = RandomProjectionTokenizer()
    _, patches = _encoder_of(config)
    values = tokenizer.config.patch_size**2
    moved = config.num_clips * patches * (4 * values + 8)  # patches read, int64 labels written
    weights = sum(one.nbytes for one in tokenizer.buffers())
    return Cost(config.num_clips * tokenizer_flops(describe_model(tokenizer), patches), moved + weights)


def distilled_labels_cost(config: BenchConfig) -> Cost:
    """Of the encoder's pass and the nearest codes; the bytes of the latter, a per cent, are left out."""
    from beats_ray.models.tokenizers import TokenizerConfig
    from beats_ray.train.flops import tokenizer_flops

    encoder, patches = _encoder_of(config)
    tokenizer = TokenizerConfig(encoder=encoder).model_dump()
    published = {"kind": "self_distilled_tokenizer", "config": {"tokenizer": tokenizer}}
    return Cost(config.num_clips * tokenizer_flops(published, patches), encoder_forward_cost(config).bytes)


def _task_cost(config: BenchConfig, kind: Any, settings: Any, published: Any, module: Callable[[], Any]) -> Cost:
    from beats_ray.train.flops import step_flops_per_clip
    from beats_ray.train.memory import step_activations

    flops = config.num_clips * step_flops_per_clip(kind, settings, published, CLASSES)
    kept = step_activations(kind, settings, published, CLASSES).kept_bytes
    return Cost(flops, _step_bytes(kept, _weight_bytes(config, module)))


def pretraining_step_cost(config: BenchConfig) -> Cost:
    from beats_ray.models import RandomProjectionTokenizer, describe_model
    from beats_ray.train.pretrain import PretrainTask

    settings, published = pretrain_settings(config), describe_model(RandomProjectionTokenizer())
    return _task_cost(config, "pretrain", settings, published, lambda: PretrainTask(settings, CODES, None).module)


def _published_encoder(config: BenchConfig) -> dict[str, Any]:
    return {"kind": "encoder", "config": {"encoder": _encoder_of(config)[0].model_dump()}}


def tokenizer_step_cost(config: BenchConfig) -> Cost:
    from beats_ray.models import BeatsEncoder
    from beats_ray.train.distill import DistillTask

    settings, teacher = distill_settings(config), _encoder_of(config)[0]
    step = _task_cost(
        config, "distill", settings, _published_encoder(config),
        lambda: DistillTask(settings, BeatsEncoder(teacher)).module,
    )  # fmt: skip
    return Cost(step.flops, step.bytes + encoder_forward_cost(config).bytes)


def finetuning_step_cost(config: BenchConfig) -> Cost:
    from beats_ray.models import BeatsEncoder
    from beats_ray.train.finetune import FinetuneTask

    settings, encoder = finetune_settings(config), _encoder_of(config)[0]
    return _task_cost(
        config, "finetune", settings, _published_encoder(config),
        lambda: FinetuneTask(settings, BeatsEncoder(encoder), labels()).module,
    )  # fmt: skip


COSTS: dict[str, Callable[..., Cost]] = {
    "matrix_product": matrix_product_cost,
    "memory_copy": memory_copy_cost,
    "filterbank": filterbank_cost,
    "encoder_forward": encoder_forward_cost,
    "encoder_step": encoder_step_cost,
    "every_patch_step": every_patch_step_cost,
    "masked_encoder_step": masked_encoder_step_cost,
    "random_labels": random_labels_cost,
    "distilled_labels": distilled_labels_cost,
    "pretraining_step": pretraining_step_cost,
    "tokenizer_step": tokenizer_step_cost,
    "finetuning_step": finetuning_step_cost,
}
