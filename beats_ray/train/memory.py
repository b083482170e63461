"""Memory of one worker's device by formula: weights and optimizer under ZeRO, and the activations of a micro-batch.

    step = step_activations("pretrain", config, published)
    step.peak_bytes                                           # at the worst moment of a step

`kept_bytes` is what the forward pass keeps for the backward pass. Per patch a layer keeps 8 vectors of `width` (its
input; queries, keys, values; the attended values; both sums that are normalised; the feed-forward block's input), one
of `ffn_width` and 4 numbers a head (the gate). Attention weights and GELU are computed again in the backward pass, so
that only the relative bias is of the size (heads, patches, patches): one for all clips where these see the whole grid,
one for each clip, with int64 offsets, in masked pre-training. With activation checkpointing a layer of the encoder
keeps its input alone; those of the label predictor and the estimator are not checkpointed. On a CPU a layer keeps two
vectors less: the norms that its two blocks start from are computed again. A tokenizer also keeps,
through a step, what its codebook will move by. The peak adds what a layer, or the head, needs for itself while its
gradient is computed.

Left out: the allocator's fragments, the CUDA context and the libraries' workspaces (1-2 GiB on a GPU).

Shapes: B clips, N patches, D width, V codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from beats_ray.config import DistillConfig, FinetuneConfig, PretrainConfig, TrainSettings
from beats_ray.models.config import EncoderConfig
from beats_ray.models.spectral import SPECTRAL_CLIPS, num_frequencies
from beats_ray.train.flops import (
    ESTIMATOR_LAYERS,
    Precision,
    RunKind,
    masked_counts,
    num_classes_of_published,
    num_codebooks_of_published,
    num_codes_of_published,
    patches_of,
)

FP32_BYTES = 4
INDEX_BYTES = 8
ATTENTION_COPIES = 3
"""Tensors of the size (clips, heads, patches, patches) that live at one time while a layer's attention is computed
again and differentiated: the gated bias with its padding, its gradient, and one product of that with gate or bias."""
LOGIT_COPIES = 2
"""fp32 tensors of logits beside the kept one: the logits, and their gradient."""

BUCKET_ELEMENTS = 500_000_000  # zero_optimization.reduce_bucket_size, DeepSpeed's default
MAX_GATHERED = 1_000_000_000  # zero_optimization.stage3_max_live_parameters, DeepSpeed's default


def value_bytes(precision: Precision) -> int:
    """Bytes of one value in the forward and backward pass."""
    return FP32_BYTES if precision == "fp32" else 2


# --- activations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of consecutive parts of a model. `a + b` is a before b: in b's backward pass all that a kept is there."""

    kept_bytes: int
    peak_bytes: int
    """At the worst moment of both passes, what is kept included."""

    def __add__(self, other: "Activations") -> "Activations":
        peak = max(self.peak_bytes, self.kept_bytes + other.peak_bytes)
        return Activations(self.kept_bytes + other.kept_bytes, peak)

    def working_on(self, nbytes: int) -> "Activations":
        """The same with so much more while it is computed."""
        return Activations(self.kept_bytes, max(self.peak_bytes, self.kept_bytes + nbytes))


NOTHING = Activations(0, 0)


@dataclass(frozen=True)
class _Batch:
    """What all parts of one step share."""

    clips: int
    value_bytes: int
    checkpointed: bool
    """Whether the encoder's layers are; the label predictor and the estimator never are."""

    def kept(self, values: float, fp32_values: float = 0) -> Activations:
        """So many values for each clip, in the arithmetic's precision and in fp32."""
        nbytes = round(self.clips * (values * self.value_bytes + fp32_values * FP32_BYTES))
        return Activations(nbytes, nbytes)


def _layer(config: EncoderConfig, batch: _Batch, queries: int, keys: int) -> Activations:
    """One layer, its attention recomputed."""
    width = config.width
    values = 3 * keys * width + 5 * queries * width + queries * config.ffn_width * (1 + bool(config.activation_dropout))
    if queries != keys:
        values += queries * width  # the queries' part of the input is copied
    if config.gated_relative_bias:
        values += queries * 4 * config.num_heads
    masks = queries * (2 * width * bool(config.dropout) + config.ffn_width * bool(config.activation_dropout))
    statistics = 4 * queries  # mean and deviation of two norms
    kept = batch.kept(values + masks / batch.value_bytes, statistics)
    attention = ATTENTION_COPIES * config.num_heads * queries * keys
    return kept.working_on(batch.kept(attention).kept_bytes)


def _stack(
    config: EncoderConfig,
    batch: _Batch,
    num_layers: int,
    patches: int,
    last_queries: int | None = None,
    checkpointed: bool = False,
) -> Activations:
    total = NOTHING
    for number in range(num_layers):
        queries = last_queries if last_queries is not None and number == num_layers - 1 else patches
        layer = _layer(config, batch, queries, patches)
        if checkpointed:  # the layer's own activations come and go
            layer = batch.kept(patches * config.width).working_on(layer.peak_bytes)
        total += layer
    return total


def _bias(config: EncoderConfig, batch: _Batch, patches: int, per_clip: bool) -> Activations:
    one = config.num_heads * patches * patches * batch.value_bytes
    indices = INDEX_BYTES * (1 + config.relative_bias_2d) * patches * patches
    nbytes = batch.clips * (one + indices) if per_clip else one
    return Activations(nbytes, nbytes)


def _encoder(config: EncoderConfig, batch: _Batch, patches: int, grid: int, per_clip_bias: bool) -> Activations:
    """The encoder with its last layer's output, which whatever follows keeps."""
    normed = config.width * (config.width // config.conv_pos_groups) * config.conv_pos_kernel * batch.value_bytes
    total = Activations(normed, normed)  # the convolution's weight
    embedded = patches * (config.patch_size**2 + config.patch_embed_width)
    if config.patch_embed_width != config.width:
        embedded += patches * config.patch_embed_width
    positions = (grid + patches) * config.width  # the convolution's output, and the sum
    if batch.clips < SPECTRAL_CLIPS:
        positions += grid * config.width  # its input
    else:
        total += batch.kept(0, 2 * num_frequencies(grid, config.conv_pos_kernel) * config.width)  # its input's spectrum
    total += batch.kept(embedded + positions + patches * config.width, 4 * patches)
    layers = _stack(config, batch, config.num_layers, patches, checkpointed=batch.checkpointed)
    return total + _bias(config, batch, patches, per_clip_bias) + layers


def encoder_bytes(
    config: EncoderConfig, clips: int, patches: int, precision: Precision, *, grid_patches: int | None = None
) -> int:
    """Bytes that a forward pass of the encoder alone keeps for its backward pass.

    patches: of a clip, those that are visible; grid_patches: of its whole grid where that is more (masked, true
    positions), so that every clip has a relative bias of its own.
    """
    batch = _Batch(clips, value_bytes(precision), checkpointed=False)
    grid = patches if grid_patches is None else grid_patches
    return _encoder(config, batch, patches, grid, per_clip_bias=grid_patches is not None).kept_bytes


def _frozen_encoder(config: EncoderConfig, batch: _Batch, patches: int) -> Activations:
    """The encoder without a gradient: layers come and go, beside the stack's input and the layer's."""
    normed = config.width * (config.width // config.conv_pos_groups) * config.conv_pos_kernel * batch.value_bytes
    shared = _bias(config, batch, patches, per_clip=False).kept_bytes + normed
    attention = 4 * patches * config.width + config.num_heads * patches**2  # the gated bias
    feed_forward = 2 * patches * (config.width + config.ffn_width)
    inputs = 2 * patches * config.width
    working = shared + batch.kept(inputs + max(attention, feed_forward)).kept_bytes
    return batch.kept(patches * config.width).working_on(working)


def _pretrain(config: PretrainConfig, batch: _Batch, num_logits: int) -> Activations:
    encoder = config.encoder.resolve()
    patches = patches_of(config.data.clip_seconds, encoder)
    visible, targets = masked_counts(patches, config.masking)
    true = config.encoder.positions == "true"
    total = _encoder(encoder, batch, visible, patches if true else visible, per_clip_bias=true)
    total += _bias(encoder, batch, visible + targets, per_clip=True)
    total += _stack(encoder, batch, config.predictor.num_layers, visible + targets, targets)
    logits = targets * num_logits
    head = batch.kept(2 * targets * encoder.width, logits)
    return total + head.working_on(batch.kept(0, LOGIT_COPIES * logits).kept_bytes)


def _code_statistics(config: DistillConfig) -> Activations:
    """What the codebook moves by at the end of a step: of each code the sum of its vectors, and their number."""
    nbytes = config.tokenizer.num_codes * (config.tokenizer.code_dim + 1) * FP32_BYTES
    if config.tokenizer.restart_below > 0:  # the vectors too, of all micro-batches
        clips = config.train.micro_batch_size * config.train.accumulation_steps(config.train.min_workers)
        patches = patches_of(config.data.clip_seconds, config.encoder.resolve())
        nbytes += clips * patches * config.tokenizer.code_dim * FP32_BYTES
    return Activations(nbytes, nbytes)


def _distill(config: DistillConfig, batch: _Batch, teacher_width: int) -> Activations:
    encoder, code_dim = config.encoder.resolve(), config.tokenizer.code_dim
    patches = patches_of(config.data.clip_seconds, encoder)
    total = _encoder(encoder, batch, patches, patches, per_clip_bias=False)
    # Tanh's output; the vector, its distance to the code, and the code as the estimator's input.
    total += batch.kept(patches * (encoder.width + code_dim), 2 * patches * code_dim) + _code_statistics(config)
    total += _bias(encoder, batch, patches, per_clip=False) + _stack(encoder, batch, ESTIMATOR_LAYERS, patches)
    # The estimate, and both it and the teacher's features normalised.
    estimate = 3 * patches * teacher_width
    head = batch.kept(2 * patches * encoder.width, estimate)
    return total + head.working_on(batch.kept(0, estimate).kept_bytes)  # as many gradients


def _finetune(config: FinetuneConfig, batch: _Batch, encoder: EncoderConfig, num_classes: int) -> Activations:
    patches = patches_of(config.data.clip_seconds, encoder)
    if config.freeze_encoder:
        total = _frozen_encoder(encoder, batch, patches)
    else:
        total = _encoder(encoder, batch, patches, patches, per_clip_bias=False)
    head = batch.kept(0, patches * (num_classes + 1))  # logits and weights of the patches
    return total + head.working_on(batch.kept(0, patches * num_classes).kept_bytes)


def step_activations(
    kind: RunKind,
    config: PretrainConfig | DistillConfig | FinetuneConfig,
    published: Mapping[str, Any],
    num_classes: int = 0,
    *,
    checkpointed: bool | None = None,
) -> Activations:
    """Activations of one micro-batch of this run on one worker; arguments as for `step_flops_per_clip`.

    checkpointed: as if `train.activation_checkpointing` were so; as it is where None.
    """
    train = config.train
    checkpointed = train.activation_checkpointing if checkpointed is None else checkpointed
    batch = _Batch(train.micro_batch_size, value_bytes(train.precision), checkpointed)
    if isinstance(config, PretrainConfig):
        inputs = _inputs(batch, config, config.encoder.resolve())
        num_logits = num_codebooks_of_published(published) * num_codes_of_published(published)
        return inputs + _pretrain(config, batch, num_logits)
    source = EncoderConfig.model_validate(published["config"]["encoder"])
    if isinstance(config, DistillConfig):
        target_width = num_classes_of_published(published) or source.width
        inputs = _inputs(batch, config, config.encoder.resolve(), target_width)
        return inputs + _distill(config, batch, target_width)
    assert kind == "finetune", kind
    encoder = source.model_copy(update={"dropout": config.dropout, "layer_drop": config.layer_drop})
    return _inputs(batch, config, encoder) + _finetune(config, batch, encoder, num_classes)


def _inputs(
    batch: _Batch,
    config: PretrainConfig | DistillConfig | FinetuneConfig,
    encoder: EncoderConfig,
    teacher_width: int = 0,
) -> Activations:
    """Filterbanks and the teacher's features, fp32, of all micro-batches of a step: they are made before the first.

    The fewest workers have the most of them.
    """
    patches = patches_of(config.data.clip_seconds, encoder) * config.train.accumulation_steps(config.train.min_workers)
    return batch.kept(0, patches * (encoder.patch_size**2 + teacher_width))


# --- weights and optimizer --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingState:
    """Bytes on one worker that do not depend on the batch, under one ZeRO stage."""

    zero_stage: int
    weights: int
    """In the precision of the arithmetic, with those of frozen models in fp32."""
    masters: int
    """fp32 master weights."""
    gradients: int
    moments: int
    """AdamW's two moments."""
    average: int
    """Average of the masters, with `train.ema_decay` or `train.average_last`."""
    buckets: int
    """DeepSpeed's buffer of gradients on their way between workers."""
    host: int = 0
    """What offloading puts into the memory of the host; no part of the total."""

    @property
    def total_bytes(self) -> int:
        return self.weights + self.masters + self.gradients + self.moments + self.average + self.buckets


def training_state(zero_stage: int, settings: TrainSettings, trained: int, frozen_bytes: int) -> TrainingState:
    """What DeepSpeed 0.19 holds on one worker for `trained` parameters, when there are the fewest: the worst case.

    Stage 0 in fp32 trains the weights themselves. From stage 1 on the masters are a copy even in fp32, and they, the
    moments and the average are divided by the workers; from stage 2 on the gradients too; in stage 3 the weights, which
    are then gathered for their use and, below `stage3_max_live_parameters`, stay gathered. In bf16 and stage 1
    gradients are accumulated in fp32. An offloaded optimizer has its part of the gradients beside it, in fp32.
    """
    size, workers = value_bytes(settings.precision), settings.min_workers
    part = -(-trained // workers)
    extra = settings.deepspeed.get("zero_optimization") or {}
    bucket = _elements(extra, "reduce_bucket_size", BUCKET_ELEMENTS)
    if zero_stage == 0:
        masters = 0 if settings.precision == "fp32" else FP32_BYTES * trained
        return TrainingState(
            zero_stage,
            weights=size * trained + frozen_bytes,
            masters=masters,
            gradients=size * trained,
            moments=2 * FP32_BYTES * trained,
            average=FP32_BYTES * trained if settings.averages_weights else 0,
            buckets=0,
        )
    weights = size * trained
    if zero_stage == 3:
        live = _elements(extra, "stage3_max_live_parameters", MAX_GATHERED)
        weights = size * part + size * min(trained, live)
    accumulated = size if settings.precision == "fp16" else FP32_BYTES
    gradients = accumulated * trained if zero_stage == 1 else FP32_BYTES * part
    state = TrainingState(
        zero_stage,
        weights=weights + frozen_bytes,
        masters=FP32_BYTES * part,
        gradients=gradients,
        moments=2 * FP32_BYTES * part,
        average=FP32_BYTES * part if settings.averages_weights else 0,
        buckets=bucket * (accumulated if zero_stage == 1 else size),
    )
    if settings.optimizer_is_offloaded:
        on_host = state.masters + state.moments + state.average + FP32_BYTES * part
        state = replace(state, masters=0, gradients=0, moments=0, average=0, host=on_host)
    if settings.offload_parameters and zero_stage == 3:
        state = replace(state, weights=state.weights - size * part, host=state.host + size * part)
    return state


def _elements(extra: Mapping[str, Any], key: str, default: int) -> int:
    """A size that `train.deepspeed` may set; DeepSpeed takes "auto" for "not set"."""
    value = extra.get(key, default)
    return default if value == "auto" else int(value)
