"""Model FLOPs of one clip in a training step, by formula, and what GPUs can do at most: MFU is the one over the other.

    step_flops_per_clip("pretrain", config, published)        # published: `config.json` of the tokenizer
    peak_flops("NVIDIA H100 80GB HBM3", "bf16")               # 989.5e12

Counted are matrix products and convolutions, a multiplication and an addition being two. Norms, softmax, the gate's
own arithmetic, the filterbank and the optimizer are left out (well under 1 % of a base encoder's step). A trained part
costs three forward passes: its own, and the gradients of its inputs and of its weights; the gradient of the
spectrogram, which nobody needs, is subtracted. A frozen part costs one. What is computed again in the backward pass
(attention, activation checkpointing) is not counted, as is the rule for MFU (PaLM, arXiv 2204.02311, appendix B): MFU
falls where recomputation costs time. Every clip counts with its full length, `data.clip_seconds`, padding included,
whether or not a batch's padding is computed.

Shapes: N patches of the grid, M visible patches, K targets, D width, V codes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from beats_ray.config import DistillConfig, FinetuneConfig, MaskingSettings, PretrainConfig
from beats_ray.models.config import NUM_MEL_BINS, EncoderConfig

RunKind = Literal["pretrain", "distill", "finetune"]
Precision = Literal["fp32", "bf16", "fp16"]

ESTIMATOR_LAYERS = 3  # of DistillationConfig
GATE_OUTPUTS = 8  # of the linear map that gates the relative bias


# --- forward passes ---------------------------------------------------------------------------------------------------


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """A matrix of `rows` x `inputs` times one of `inputs` x `outputs`."""
    return 2 * rows * inputs * outputs


def layer_flops(config: EncoderConfig, queries: int, keys: int) -> int:
    """One Transformer layer whose `queries` attend to `keys` patches."""
    width = config.width
    projections = linear_flops(2 * queries, width, width) + linear_flops(2 * keys, width, width)
    scores_and_values = 2 * linear_flops(queries, width, keys)
    gate = linear_flops(queries, width, GATE_OUTPUTS) if config.gated_relative_bias else 0
    feed_forward = 2 * linear_flops(queries, width, config.ffn_width)
    return projections + scores_and_values + gate + feed_forward


def stack_flops(config: EncoderConfig, num_layers: int, patches: int, last_queries: int | None = None) -> int:
    """A stack of layers; the last one answers for `last_queries` patches only, all where None."""
    if not num_layers:
        return 0
    whole = (num_layers - 1) * layer_flops(config, patches, patches)
    return whole + layer_flops(config, patches if last_queries is None else last_queries, patches)


def patch_embedding_flops(config: EncoderConfig, patches: int) -> int:
    """The linear map of the patches' values, the one product whose input needs no gradient."""
    return linear_flops(patches, config.patch_size**2, config.patch_embed_width)


def encoder_flops(
    config: EncoderConfig, patches: int, *, grid_patches: int | None = None, layers: int | None = None
) -> int:
    """Forward pass of the encoder over `patches` patches.

    grid_patches: places that the position convolution runs over, `patches` where None.
    layers: how many layers run, all where None.
    """
    grid = patches if grid_patches is None else grid_patches
    flops = patch_embedding_flops(config, patches)
    if config.patch_embed_width != config.width:
        flops += linear_flops(patches, config.patch_embed_width, config.width)
    flops += linear_flops(grid, config.width // config.conv_pos_groups * config.conv_pos_kernel, config.width)
    return flops + stack_flops(config, config.num_layers if layers is None else layers, patches)


def tokenizer_flops(published: Mapping[str, Any], patches: int) -> int:
    """Forward pass of a published tokenizer; `published` is its description."""
    settings = published["config"]["tokenizer"]
    if published["kind"] == "random_projection_tokenizer":
        size, width, codes = settings["patch_size"] ** 2, settings["code_dim"], settings["num_codes"]
        one = linear_flops(patches, size, width) + linear_flops(patches, width, codes)
        return num_codebooks_of_published(published) * one
    encoder = EncoderConfig.model_validate(settings["encoder"])
    quantizer = settings["quantizer"]
    window = settings["window_frames"] // encoder.patch_size * encoder.patches_per_row
    windows = 1 if patches <= window else -(-patches // window)  # longer clips are padded to whole windows
    patches = patches if windows == 1 else window
    one = encoder_flops(encoder, patches) + code_flops(encoder, quantizer["code_dim"], patches)
    return windows * (one + linear_flops(patches, quantizer["code_dim"], quantizer["num_codes"]))


def code_flops(config: EncoderConfig, code_dim: int, patches: int) -> int:
    """From the features to the vectors that are quantised."""
    return linear_flops(patches, config.width, config.width) + linear_flops(patches, config.width, code_dim)


def fbank_flops(num_samples: int) -> int:
    """Filterbank of one clip: a real Fourier transform of each frame (2.5 n log2 n) and the mel filters.

    Windows, powers and logarithms are left out. It is no part of what MFU counts.
    """
    from beats_ray.models.fbank import FFT_SAMPLES, num_frames  # which loads torch

    transform = round(2.5 * FFT_SAMPLES * math.log2(FFT_SAMPLES))
    return num_frames(num_samples) * (transform + linear_flops(1, FFT_SAMPLES // 2 + 1, NUM_MEL_BINS))


# --- training steps ---------------------------------------------------------------------------------------------------


def patches_of(clip_seconds: float, config: EncoderConfig) -> int:
    """Patches of the grid of a clip: 496 for 10 s and 128 mel bins."""
    from beats_ray.models.patches import grid_patches  # which loads torch

    return grid_patches(round(clip_seconds * config.sample_rate_hz), config)


def masked_counts(patches: int, masking: MaskingSettings) -> tuple[int, int]:
    """(visible, target) patches of a clip."""
    from beats_ray.models.masking import visible_and_target_counts

    return visible_and_target_counts(patches, masking.ratio, masking.max_targets)


def pretrain_flops(
    config: EncoderConfig,
    predictor_layers: int,
    num_logits: int,
    patches: int,
    masking: MaskingSettings,
    positions: Literal["true", "compact"] = "true",
) -> int:
    """Forward and backward of one clip of masked pre-training, without the tokenizer.

    The encoder runs over visible patches (its position convolution over the whole grid unless positions are compact),
    the predictor over visible and target ones, its last layer's queries and the head over targets alone.
    num_logits: of a target, the codes of all codebooks.
    """
    visible, targets = masked_counts(patches, masking)
    grid = patches if positions == "true" else visible
    forward = encoder_flops(config, visible, grid_patches=grid)
    forward += linear_flops(visible, config.width, config.width)
    forward += stack_flops(config, predictor_layers, visible + targets, last_queries=targets)
    forward += linear_flops(targets, config.width, num_logits)
    return 3 * forward - patch_embedding_flops(config, visible)


def distill_flops(
    config: EncoderConfig,
    code_dim: int,
    num_codes: int,
    teacher: EncoderConfig,
    patches: int,
    *,
    teacher_layers: int | None = None,
    teacher_classes: int = 0,
) -> int:
    """Forward and backward of one clip of tokenizer training, the teacher's forward pass included.

    teacher_classes: of a fine-tuned teacher, whose logits of each patch are the target; 0 for an encoder's features.
    The nearest code is looked up without a gradient. K-means on the first micro-batches is not counted.
    """
    forward = encoder_flops(config, patches) + code_flops(config, code_dim, patches)
    forward += linear_flops(patches, code_dim, config.width)
    forward += stack_flops(config, ESTIMATOR_LAYERS, patches)
    forward += linear_flops(patches, config.width, teacher_classes or teacher.width)
    frozen = linear_flops(patches, code_dim, num_codes) + encoder_flops(teacher, patches, layers=teacher_layers)
    frozen += linear_flops(patches, teacher.width, teacher_classes)
    return 3 * forward - patch_embedding_flops(config, patches) + frozen


def finetune_flops(config: EncoderConfig, num_outputs: int, patches: int, is_frozen: bool = False) -> int:
    """Forward and backward of one clip of fine-tuning; of a frozen encoder the forward pass alone.

    num_outputs: of the head for each patch, classes and a score where it pools by attention.
    """
    encoder, head = encoder_flops(config, patches), linear_flops(patches, config.width, num_outputs)
    if is_frozen:  # nor has the head's input a gradient
        return encoder + 2 * head
    return 3 * (encoder + head) - patch_embedding_flops(config, patches)


def step_flops_per_clip(
    kind: RunKind,
    config: PretrainConfig | DistillConfig | FinetuneConfig,
    published: Mapping[str, Any],
    num_classes: int = 0,
) -> int:
    """The model FLOPs of one clip in a training step of this run, the mean over its steps.

    published: the description (`config.json`, `describe_model`) of the tokenizer, teacher or encoder that the run
    starts from. num_classes: of the data set, for fine-tuning.
    """
    if isinstance(config, PretrainConfig):
        encoder = config.encoder.resolve()
        patches = patches_of(config.data.clip_seconds, encoder)
        flops = pretrain_flops(
            encoder,
            config.predictor.num_layers,
            num_codebooks_of_published(published) * num_codes_of_published(published),
            patches,
            config.masking,
            config.encoder.positions,
        )
        return flops if config.labels else flops + tokenizer_flops(published, patches)
    if isinstance(config, DistillConfig):
        encoder, chosen = config.encoder.resolve(), config.tokenizer
        teacher = EncoderConfig.model_validate(published["config"]["encoder"])
        patches = patches_of(config.data.clip_seconds, encoder)
        return distill_flops(
            encoder,
            chosen.code_dim,
            chosen.num_codes,
            teacher,
            patches,
            teacher_layers=chosen.teacher_layer,
            teacher_classes=num_classes_of_published(published),
        )
    assert kind == "finetune", kind
    encoder = EncoderConfig.model_validate(published["config"]["encoder"])
    patches = patches_of(config.data.clip_seconds, encoder)
    outputs = num_classes + (config.pooling == "attention")
    frozen_steps = config.train.steps if config.freeze_encoder else config.freeze_encoder_steps
    frozen = frozen_steps * finetune_flops(encoder, outputs, patches, is_frozen=True)
    tuned = (config.train.steps - frozen_steps) * finetune_flops(encoder, outputs, patches)
    return round((frozen + tuned) / config.train.steps)


def inference_flops(published: Mapping[str, Any], clip_seconds: float) -> int:
    """Forward pass of a published model over one clip."""
    if "tokenizer" in published["config"]:
        settings = published["config"]["tokenizer"]
        grid = EncoderConfig.model_validate(settings.get("encoder", {}))
        return tokenizer_flops(published, patches_of(clip_seconds, grid))
    encoder = EncoderConfig.model_validate(published["config"]["encoder"])
    patches = patches_of(clip_seconds, encoder)
    return encoder_flops(encoder, patches) + linear_flops(patches, encoder.width, num_classes_of_published(published))


def num_classes_of_published(model: Mapping[str, Any]) -> int:
    """Classes of a published classifier, by its description; 0 of an encoder."""
    return int(model["config"]["classifier"]["num_classes"]) if model["kind"] == "classifier" else 0


def num_codes_of_published(tokenizer: Mapping[str, Any]) -> int:
    """Size of a published tokenizer's codebook, or of each of several, by its description."""
    settings = tokenizer["config"]["tokenizer"]
    return int(settings.get("quantizer", settings)["num_codes"])


def num_codebooks_of_published(tokenizer: Mapping[str, Any]) -> int:
    """Labels that a published tokenizer gives each patch."""
    return int(tokenizer["config"]["tokenizer"].get("num_codebooks", 1))


# --- what a GPU can do ------------------------------------------------------------------------------------------------

_PEAK_TFLOPS: tuple[tuple[str, float | None, float | None, float], ...] = (
    # Name as CUDA gives it; dense bf16, fp16 and fp32 without TF32, in TFLOP/s. From NVIDIA's data sheet of each card;
    # where that gives tensor figures with sparsity only, they are halved. The first match counts.
    (r"B200", 2250.0, 2250.0, 75.0),  # HGX B200: 4.5 PFLOP/s with sparsity
    (r"H200 NVL", 835.5, 835.5, 60.0),  # H200: 1671 with sparsity
    (r"H200", 989.5, 989.5, 67.0),  # H200 SXM: 1979 with sparsity
    (r"H100 NVL", 835.5, 835.5, 60.0),  # H100: 1671 with sparsity
    (r"H100 PCIe", 756.5, 756.5, 51.0),  # H100 PCIe: 1513 with sparsity
    (r"H100 80GB HBM3", 989.5, 989.5, 67.0),  # H100 SXM: 1979 with sparsity
    (r"A100", 312.0, 312.0, 19.5),  # A100, SXM and PCIe alike
    (r"L40S", 362.05, 362.05, 91.6),
    (r"L4", 121.0, 121.0, 30.3),  # 242 with sparsity
    (r"A10G", 70.0, 70.0, 35.0),
    (r"T4", None, 65.0, 8.1),  # no bf16 units
    (r"V100S", None, 130.0, 16.4),
    (r"V100-PCIE", None, 112.0, 14.0),
    (r"V100", None, 125.0, 15.7),  # SXM2
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense peak of one GPU in FLOP/s; None for a device that is not in the table, or has no units of that precision.

    device_name: as `torch.cuda.get_device_name` gives it. A slice of a GPU (MIG) is not in the table.
    """
    if "MIG" in device_name:
        return None
    for pattern, bf16, fp16, fp32 in _PEAK_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", device_name):
            tera = {"bf16": bf16, "fp16": fp16, "fp32": fp32}[precision]
            return None if tera is None else tera * 1e12
    return None
