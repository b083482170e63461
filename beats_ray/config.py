"""Typed configuration: frozen pydantic models, YAML files and `section.field=value` overrides.

One job, one config class: `PrepareConfig`, `PretrainConfig`, `DistillConfig`, `TokenizeConfig`, `FinetuneConfig`,
`SweepConfig`, `EvaluateConfig`, `CrossValidateConfig`, `IterateConfig`, `ConvergenceConfig`. The classes share their
sections, so `train.steps` means the same thing everywhere. `load_config` is the one way in; it turns every mistake into
a `ConfigError` of one line that names the field, the value, the rule and the remedy.

    config = load_config(PretrainConfig, "jobs/pretrain.yaml", ["train.steps=1000", "encoder.preset=tiny"])

Paths are local, `s3://bucket/key` or `gs://bucket/key`. Keys and endpoints of object stores never appear here: they
come from the environment variables that the stores' own programs read.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from beats_ray.errors import ConfigError, UserError
from beats_ray.models.config import ENCODER_PRESETS, EncoderConfig, encoder_config
from beats_ray.settings import (
    Fraction,
    FractionBelowOne,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    field_names,
    fingerprint,
    load_config,
    read_values,
    replace,
    section_fields,
    validate,
)
from beats_ray.tune.settings import SearchParameter, SweepSettings

__all__ = [  # the mechanism, imported from here by the rest of the package; the settings follow
    "ConfigError",
    "SearchParameter",
    "Section",
    "SweepSettings",
    "UserError",
    "field_names",
    "fingerprint",
    "load_config",
    "read_values",
    "replace",
    "section_fields",
    "validate",
]

PATCH_SECONDS = 0.16  # 16 frames of 10 ms
LoggerName = Literal["tensorboard", "prometheus", "mlflow", "wandb"]
TeacherName = Literal["pretrained", "finetuned"]


# --- shared sections ------------------------------------------------------------------------------------------------


class RaySettings(Section):
    address: str = "auto"
    """Cluster to use: `auto` joins the running cluster (the one of `ray job submit`, or RAY_ADDRESS) and starts a
    private one on this machine where there is none; `local` always starts a private one."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a private cluster; default twice the cores, so that light tasks never wait for trainers."""
    object_store_mib: PositiveInt = 1024
    """Shared-memory object store of a private cluster, MiB."""


class LayoutSettings(Section):
    table: str = ""
    """kind=csv: the table with the columns path, labels, split, fold; default SRC itself, or SRC/metadata.csv.
    kind=audioset: the folder of the segment tables and class_labels_indices.csv; default SRC."""
    subsets: tuple[str, ...] = ()
    """kind=audioset: segment tables to use, of balanced_train, unbalanced_train and eval; empty means all present."""
    classes: Literal[12, 35] = 35
    """kind=speech_commands: all 35 words, or the 10 commands, `_unknown_` and `_silence_`."""
    label_separator: str = ";"
    """kind=csv: between the labels of one recording."""
    audio_column: str = "audio"
    """kind=parquet: the column that holds the files' bytes, plain or as the struct {bytes, path} of other tools."""
    label_column: str = "label"
    """kind=parquet, webdataset: the column, or the extension of the member, that holds the label; may be missing."""


class PrepareSettings(Section):
    max_bad_clip_fraction: Fraction = 0.01
    """`prepare` fails when more than this fraction of the input files had to be quarantined."""
    shard_mib: PositiveFloat = 256.0
    """Target size of one Parquet shard, MiB."""
    row_group_clips: PositiveInt = 64
    """Clips in one Parquet row group: the unit of one range read during training."""
    max_clip_seconds: PositiveFloat = 30.0
    """Longer recordings are cut into clips of at most this length."""
    overlap_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """What neighbouring clips of a longer recording share; with 0 it is cut into pieces of equal length."""
    file_timeout_seconds: PositiveFloat = 300.0
    """A file that takes longer to decode is quarantined."""
    retry_seconds: PositiveFloat = 120.0
    """How long a read or a write is tried again while the object store answers with errors or not at all."""

    @model_validator(mode="after")
    def _overlap(self) -> Self:
        if self.overlap_seconds > self.max_clip_seconds / 2:
            raise ValueError(
                f"overlap_seconds={self.overlap_seconds:g} must be at most half of max_clip_seconds="
                f"{self.max_clip_seconds:g}; use {self.max_clip_seconds / 2:g} or less"
            )
        return self


class VerifySettings(Section):
    retry_seconds: PositiveFloat = 120.0
    """How long a read is tried again while the object store answers with errors or not at all."""


class StreamSettings(Section):
    path: str = ""
    """Prepared data set: the folder that holds `dataset.json`."""
    clip_seconds: PositiveFloat = 10.0
    """Length of a training example; longer clips are cropped at random, shorter ones padded. Paper: 10 s."""
    folds: tuple[int, ...] = ()
    """Folds to train on; empty means all."""
    splits: tuple[str, ...] = ()
    """Splits to train on; empty means all."""
    length_bucket_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Clips of a shuffle window come together by length, in steps of so many seconds, and a micro-batch is padded to
    the next step instead of to clip_seconds: for clips of very different lengths. 0 turns it off. Paper: off."""
    shuffle_window_clips: PositiveInt = 1024
    """Clips that are shuffled together, drawn from row groups taken in a random order over the whole data set."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """`balanced` draws clips of rare labels more often (AudioSet recipe): an epoch is as long, with some clips several
    times and some not at all. Paper, AudioSet-2M fine-tuning: balanced."""
    cache: Literal["auto", "always", "never"] = "auto"
    """Fine-tuning: whether decoded clips stay in the object store, where `always` needs them to take at most 40 % of
    it, and `auto` keeps them if they do; otherwise they are streamed, in the same batches. Trials of a sweep share
    what is kept."""
    retry_seconds: PositiveFloat = 120.0
    """How long a read is tried again while the object store answers with errors or not at all."""
    prefetch_blocks: NonNegativeInt = 2
    """Blocks that wait, ready, in front of each worker: a micro-batch, or several that make at most 24 MiB."""
    read_tasks: PositiveInt = 2
    """Tasks that read shards at one time; each needs a quarter of a logical CPU."""
    decode_cpus: PositiveFloat = 1.0
    """Logical CPUs of one decode task; as many tasks run as the training workers leave room for."""
    placement: Literal["auto", "data-nodes", "anywhere"] = "auto"
    """Where clips are read and decoded: on nodes with the label beats-ray/role=data where the cluster has some, on
    these only (an autoscaler then starts them), or anywhere."""
    streams: PositiveInt = 1
    """Streams that the clips of a step come from, in equal parts: for runs on so many GPUs that one coordinator of Ray
    Data, with its 20 ms for each block, is too slow. Divides the number of workers or is a multiple of it."""
    buffer_mib: PositiveInt = 512
    """Object-store memory that the stream may fill for each training worker, MiB; never more than half of the cluster's
    object store (`ray.object_store_mib` of a private one)."""

    @model_validator(mode="after")
    def _buckets_hold_a_patch(self) -> Self:
        if 0.0 < self.length_bucket_seconds < PATCH_SECONDS:
            raise ValueError(
                f"length_bucket_seconds={self.length_bucket_seconds:g} is shorter than a patch, {PATCH_SECONDS:g} s; "
                "use at least that, or 0 for off"
            )
        return self


class EncoderSettings(Section):
    preset: str = "base"
    """Encoder size: tiny, mini, small, base (the paper's) or large."""
    positions: Literal["true", "compact"] = "true"
    """`true` keeps each visible patch's place in the grid; `compact` packs the visible patches (the public recipe)."""
    overrides: dict[str, int | float | bool] = {}
    """Single fields of the preset replaced, e.g. `encoder.overrides.num_layers=6`."""

    @field_validator("positions", mode="before")
    @classmethod
    def _yaml_true(cls, value: Any) -> Any:
        return "true" if value is True else value  # what YAML makes of an unquoted `positions: true`

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.preset not in ENCODER_PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(ENCODER_PRESETS)}")
        try:
            config = self.resolve()
        except ValueError as error:
            raise ValueError(f"overrides: {error}") from None
        if config.relative_bias_2d and self.positions == "compact":
            raise ValueError(
                "positions='compact' leaves patches without a row and a column, which overrides.relative_bias_2d=true "
                "needs; use positions=true"
            )
        return self

    def resolve(self) -> EncoderConfig:
        """The full encoder configuration: preset with overrides."""
        return encoder_config(self.preset, **self.overrides)


class MaskingSettings(Section):
    ratio: FractionBelowOne = 0.75
    """Fraction of a clip's patches hidden from the encoder. Paper: 0.75."""
    block_size: PositiveInt = 1
    """Side of the square blocks that are masked together, in patches; 1 masks single patches. Paper: 1."""
    max_targets: PositiveInt | None = None
    """Predict only this many of a clip's masked patches, drawn at random; none means all of them. Paper: all."""


class PredictorSettings(Section):
    num_layers: PositiveInt = 3
    """Transformer layers of the label predictor (ESPnet's statement of the paper's setting)."""
    mask_vector: Literal["zero", "learned"] = "zero"
    """What stands at a masked place in the label predictor's input: zeros, or one vector (ESPnet). Paper: zeros."""
    label_smoothing: FractionBelowOne = 0.0
    """Share of a masked patch's target that is spread over all codes. Paper: 0."""


class RandomProjectionSettings(Section):
    num_codes: Annotated[int, Field(gt=0, le=32_768)] = 1024
    """Size of the frozen random codebook. Paper: 1024."""
    code_dim: PositiveInt = 256
    """Width of a code. Paper: 256."""
    normalization: Literal["none", "l2", "standardize"] = "l2"
    """How patch projections and codes are normalised before the nearest code is looked up."""
    num_codebooks: PositiveInt = 1
    """Projections with a codebook each: so many labels a patch, all of which pre-training predicts, the loss being the
    mean (USM's multi-softmax). Learned tokenizers have one. Paper: 1."""
    seed: int = 0
    """Seed of the frozen projection and codebook."""


class TokenizerSettings(Section):
    num_codes: Annotated[int, Field(gt=0, le=32_768)] = 1024
    """Codes of the learned codebook. Paper: 1024."""
    code_dim: PositiveInt = 256
    """Width of a code. Paper: 256."""
    ema_decay: Fraction = 0.99
    """Decay of the codebook's moving averages, per optimizer step. Paper: 0.99."""
    init_batches: PositiveInt = 4
    """First optimizer steps after which the codebook is fitted by k-means, each time to the global batches of all of
    them since the start, or since a restart. Release: 1."""
    commitment_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the commitment term beside the cosine distillation term."""
    restart_below: Annotated[float, Field(ge=0.0)] = 0.0
    """Codes that fewer patches of a global batch take on average move onto one of its patches; 0 turns it off. Paper:
    off."""
    teacher_layer: NonNegativeInt | None = None
    """Encoder layer whose patch outputs are distilled; none means the last."""


class TrainSettings(Section):
    instead_of: ClassVar[dict[str, str]] = {"global_batch_seconds": "global_batch_size"}

    steps: PositiveInt = 400_000
    """Optimizer steps. Paper: 400k for pre-training and for tokenizers."""
    warmup_steps: NonNegativeInt = 32_000
    """Steps of linear learning-rate warm-up; at most `steps`. Paper: 32k."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate. Paper: 5e-4 for pre-training."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up, to zero (or none). Paper: linear."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW's decay rates. Paper (E): 0.9, 0.98."""
    epsilon: PositiveFloat = 1e-12
    """AdamW's epsilon. Paper (E): 1e-12."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay, not applied to biases and norms. Paper (E): 0.01."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate for each layer further from the output; 1 turns it off."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping by global norm. Paper (E): 1.0."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay, per optimizer step, of a moving average of the trained weights; validation, test and the published model
    use the average. It begins at the initial weights; buffers, such as a codebook, stay as they are. 0 turns it off.
    Paper: not stated."""
    average_last: NonNegativeInt = 0
    """Points whose weights are averaged, in equal shares, in place of `ema_decay`: the last step and those before it in
    distances of `average_every_steps`. Test and the published model use the mean, validation from the first point on.
    It costs one copy of the weights however many points there are. 0 turns it off. Paper: not stated."""
    average_every_steps: PositiveInt = 1000
    """Optimizer steps between two such points; an epoch is usual (AST, arXiv 2104.01778, section 3.1)."""
    global_batch_size: PositiveInt = 560
    """Clips in one optimizer step over all workers. Paper: about 560 clips of 10 s for pre-training."""
    global_batch_seconds: PositiveFloat | None = None
    """Seconds of sound in one optimizer step, instead of `global_batch_size`, which then follows from
    `data.clip_seconds`: the nearest multiple of micro_batch_size x num_workers. Paper: 5.6k for pre-training, 1.4k for
    tokenizers."""
    micro_batch_size: PositiveInt = 8
    """Clips in one forward pass on one worker; accumulation follows from the global batch size."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Ray Train workers (data parallel), or [fewest, most] for elastic training: as many as the cluster has room for,
    changed in mid-run as nodes come and go."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs reserved for a worker."""
    use_gpu: bool = False
    """One GPU for each worker."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; master weights are fp32 always."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    offload_optimizer: bool = False
    """Master weights, gradients and AdamW's moments in host memory, its step on the CPU; needs zero_stage 1, 2 or 3.
    NVMe goes through `deepspeed` and is tested nowhere."""
    offload_parameters: bool = False
    """Weights that are not in use in host memory; needs zero_stage 3."""
    compile: bool = False
    """torch.compile of the module: minutes before the first step, for faster ones. It is compiled once, for the shapes
    of a micro-batch; evaluation is not compiled."""
    attention: Literal["auto", "flex"] = "auto"
    """Kernel of self-attention: PyTorch's fused one on a GPU, or FlexAttention, which never has the gated position bias
    in memory; needs use_gpu."""
    deepspeed: dict[str, Any] = {}
    """Extra DeepSpeed settings, merged deep; keys that this section derives and keys that DeepSpeed does not know are
    refused. What only moves values (buckets, offloading) may change when a run goes on."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, masks, augmentation and data order."""
    log_every_steps: PositiveInt = 10
    """Steps between two metric reports, for which the host waits for the device, as it does in every step to learn
    whether the gradient is finite."""
    checkpoint_every_steps: PositiveInt = 1000
    """Steps between two resume checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest resume checkpoints that stay on storage; the one with the best validation result stays too. In fine-tuning
    alone a checkpoint has one, and only where `checkpoint_every_steps` falls on a validation step."""
    storage_retry_seconds: PositiveFloat = 300.0
    """How long a checkpoint or a record is tried again while the object store fails."""
    max_failures: NonNegativeInt = 3
    """Failures of workers that a run steps over without a new checkpoint in between; each checkpoint gives all of them
    back, so the length of a run does not matter. Nodes that announce their end (spot) do not count, and a mistake in
    the settings or the data ends the run at once."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is no finite number; each is skipped, then the run ends."""
    collective_timeout_seconds: PositiveFloat = 900.0
    """A collective operation that takes longer has lost a worker: the run restarts from its last checkpoint."""
    loggers: tuple[LoggerName, ...] = ("tensorboard", "prometheus")
    """Where reports go beside `metrics.jsonl`; mlflow and wandb are extras of the package. No part of what a run is."""

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers={list(self.worker_range)}: fewest is more than most; swap them")
        clips = self.clips_at_once
        if self.global_batch_seconds is None and self.global_batch_size % clips:
            nearest = max(1, round(self.global_batch_size / clips)) * clips
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by {self.clips_at_once_shown()}; "
                f"use {nearest}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than steps={self.steps}; use at most {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _averages(self) -> Self:
        if self.average_last and self.ema_decay:
            raise ValueError(
                f"average_last={self.average_last} and ema_decay={self.ema_decay:g} are two averages of the weights; "
                "set one of them to 0"
            )
        if self.average_last and self.first_average_step < 1:
            most = (self.steps - 1) // self.average_every_steps + 1
            raise ValueError(
                f"average_last={self.average_last} points every average_every_steps={self.average_every_steps} steps "
                f"begin before the first of steps={self.steps}; use average_last={most}, or closer points"
            )
        return self

    @property
    def averages_weights(self) -> bool:
        """Whether an average of the weights is kept."""
        return bool(self.ema_decay or self.average_last)

    @property
    def first_average_step(self) -> float:
        """Steps after which the average over the last points begins; infinity where there is none."""
        return self.steps - (self.average_last - 1) * self.average_every_steps if self.average_last else math.inf

    def average_point(self, steps_done: int) -> int:
        """Which point of that average, from 1 on, so many steps make; 0 where they make none."""
        if steps_done < self.first_average_step:
            return 0
        index, rest = divmod(steps_done - int(self.first_average_step), self.average_every_steps)
        return 0 if rest else index + 1

    @model_validator(mode="after")
    def _zero_stage(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer=true needs a zero_stage of 1, 2 or 3, and it is 0; use zero_stage=2, or "
                "offload_optimizer=false"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters=true needs zero_stage=3, and it is {self.zero_stage}; use zero_stage=3, or "
                "offload_parameters=false"
            )
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision={self.precision} with zero_stage=0 makes DeepSpeed count an AdamW step that was none, so "
                "that the first steps are too small; use zero_stage=1 or precision=fp32"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.worker_range[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run uses."""
        return self.worker_range[1]

    @property
    def clips_at_once(self) -> int:
        """What the global batch size is a multiple of: a micro-batch on each worker, however many there are."""
        return self.micro_batch_size * math.lcm(*range(self.min_workers, self.max_workers + 1))

    def clips_at_once_shown(self) -> str:
        """The same with its factors, for errors."""
        workers = self.min_workers if self.min_workers == self.max_workers else f"each of {list(self.worker_range)}"
        return f"micro_batch_size ({self.micro_batch_size}) x num_workers ({workers}) = {self.clips_at_once}"

    def count_clips(self, clip_seconds: float, name: str) -> Self:
        """The same with the global batch in clips, where it is given in seconds. `name`: this section's, for errors."""
        if self.global_batch_seconds is None:
            return self
        field = f"{name}.global_batch_seconds={self.global_batch_seconds:g}"
        clips = round(self.global_batch_seconds / clip_seconds / self.clips_at_once) * self.clips_at_once
        if not clips:
            raise ValueError(
                f"{field} is less than half of {self.clips_at_once_shown()} clips of {clip_seconds:g} s, the least "
                f"that a step can hold; use {self.clips_at_once * clip_seconds:g}, or lower micro_batch_size"
            )
        if "global_batch_size" in self.model_fields_set and self.global_batch_size != clips:
            raise ValueError(
                f"{field} makes {clips} clips of {clip_seconds:g} s, and global_batch_size={self.global_batch_size} is "
                "set too; set one of them to null"
            )
        return self.model_copy(update={"global_batch_size": clips})

    @property
    def optimizer_is_offloaded(self) -> bool:
        """Whether AdamW moves in host memory, by `offload_optimizer` or by `deepspeed`."""
        extra = (self.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
        return self.offload_optimizer or extra.get("device", "none") != "none"

    def accumulation_steps(self, num_workers: int) -> int:
        """Micro-batches that one of so many workers accumulates in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * num_workers)


class AugmentSettings(Section):
    mixup: Annotated[float, Field(ge=0.0)] = 0.8
    """Alpha of mixup's Beta distribution; 0 turns it off. Paper: 0.8 on AudioSet."""
    mixup_of: Literal["waveform", "fbank"] = "waveform"
    """What is mixed: sounds, or log-mel energies. Targets are mixed alike. Paper: not stated."""
    mixup_probability: Fraction = 1.0
    """Part of the clips that are mixed with another one. Paper: not stated."""
    gain_db: Annotated[float, Field(ge=0.0)] = 0.0
    """Largest change of a clip's loudness either way, dB, drawn evenly; 0 turns it off. Paper: not used."""
    roll_seconds: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest circular shift of the waveform, seconds."""
    time_mask_fraction: Fraction = 0.06
    """Longest time mask as a fraction of the clip. Paper: at most 0.06 on AudioSet."""
    num_time_masks: NonNegativeInt = 1
    """Time masks of each clip; they may overlap."""
    freq_mask_bins: Annotated[int, Field(ge=0, le=128)] = 24
    """Widest frequency mask, mel bins (of 128)."""
    num_freq_masks: NonNegativeInt = 1
    """Frequency masks of each clip."""


class FoldSettings(Section):
    """The parts of a data set that are kept apart: each a fold or a split, validation also a draw of training clips."""

    test_fold: int | None = None
    """Held-out fold: evaluated once, never used to choose anything. -1 keeps none apart. By default the first fold of a
    data set that has folds."""
    test_split: str | None = None
    """Held-out split instead. By default, of a data set without folds, `test` or `eval`, where there is one."""
    validation_fold: int | None = None
    """Fold that settings are chosen by, in a sweep, and by which its trials are stopped; a single run only reports it.
    -1 keeps none apart. By default the fold after the test fold."""
    validation_split: str | None = None
    """Split that does so instead. By default, of a data set without folds, `validation` where there is one."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Fraction of the clips of each label that is kept apart for it instead, by a hash of the clip id; 0 keeps none
    and trains on all clips that are not tested. By default 0.1 where there is neither fold nor split."""
    seed: int = 0
    """Seed of that draw; the same clips whatever `train.seed` is."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for part, kinds in (("test", ("fold", "split")), ("validation", ("fold", "split", "fraction"))):
            names = [name for name in (f"{part}_{kind}" for kind in kinds) if getattr(self, name) is not None]
            if len(names) > 1:
                shown = " and ".join(f"{name}={getattr(self, name)}" for name in names)
                raise ValueError(f"{shown} each say what the {part} part is; set one of them")
        for kind, none in (("fold", -1), ("split", None)):
            test, validation = getattr(self, f"test_{kind}"), getattr(self, f"validation_{kind}")
            if test == validation and test not in (None, none):
                raise ValueError(f"validation_{kind}={validation} is also the test {kind}; choose another {kind}")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any part is kept apart to choose by."""
        return self.validation_fold != -1 and self.validation_split != "none" and self.validation_fraction != 0.0


# --- settings of the stages, nested in `iterate` ----------------------------------------------------------------------


class PretrainSettings(Section):
    encoder: EncoderSettings = EncoderSettings()
    masking: MaskingSettings = MaskingSettings()
    predictor: PredictorSettings = PredictorSettings()
    train: TrainSettings = TrainSettings()


class DistillSettings(Section):
    encoder: EncoderSettings = EncoderSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    train: TrainSettings = TrainSettings(learning_rate=5e-5, global_batch_size=144)
    """As in pre-training, but for rate and batch. Paper: 5e-5 and 1.4k seconds, 140 clips; 144 is the nearest multiple
    of the default micro-batch of 8. `global_batch_seconds: 1400` with a micro-batch of 10 or 20 is the paper's."""
    supervised_learning_rate: PositiveFloat = 5e-4
    """Peak learning rate instead of `train.learning_rate` where the teacher is a fine-tuned model. `train-tokenizer`
    refuses one of the other that would be of no effect; `iterate` has both, for teachers of both kinds. Paper: 5e-4."""


class FinetuneSettings(Section):
    folds: FoldSettings = FoldSettings()
    augment: AugmentSettings = AugmentSettings()
    pooling: Literal["mean", "attention"] = "mean"
    """How patches vote for a clip's classes: alike, or weighted by a learned score of each. Paper: mean."""
    freeze_encoder: bool = False
    """Trains the head alone on the frozen encoder's features, a linear probe by gradient descent."""
    freeze_encoder_steps: NonNegativeInt = 0
    """First optimizer steps in which the head alone is trained; less than `train.steps`. Paper: not used."""
    label_smoothing: FractionBelowOne = 0.1
    """Share of the target that is spread over all classes, in training on single-label data; targets of multi-label
    data, which have a decision for each class, are left as they are."""
    dropout: FractionBelowOne = 0.0
    """Dropout in the encoder's layers. Paper: 0."""
    layer_drop: FractionBelowOne = 0.1
    """Probability of skipping an encoder layer during training. Paper: 0.1."""
    validate_every_steps: PositiveInt = 100
    """Optimizer steps between two evaluations on the validation part. A run goes on to its last step whatever they say;
    in a sweep they are the unit in which ASHA stops trials."""
    train: TrainSettings = TrainSettings(
        steps=6000, warmup_steps=600, learning_rate=1e-4, layer_decay=0.6, global_batch_size=64, zero_stage=1
    )

    @model_validator(mode="after")
    def _freezes(self) -> Self:
        if self.freeze_encoder and self.freeze_encoder_steps:
            raise ValueError(
                f"freeze_encoder=true freezes it for good, freeze_encoder_steps={self.freeze_encoder_steps} for the "
                "first steps; set freeze_encoder_steps=0, or freeze_encoder=false"
            )
        if self.freeze_encoder_steps >= self.train.steps:
            raise ValueError(
                f"freeze_encoder_steps={self.freeze_encoder_steps} leaves none of train.steps={self.train.steps} to "
                "the encoder; use freeze_encoder=true, or fewer"
            )
        return self


class ProbeSettings(Section):
    c: PositiveFloat = 1.0
    """Inverse regularisation strength of the logistic regression."""


# --- jobs -------------------------------------------------------------------------------------------------------------


class InferenceSettings(Section):
    batch_clips: PositiveInt = 16
    """Clips in one forward pass."""
    num_workers: PositiveInt = 2
    """Actors that run the model, each with one CPU."""
    use_gpu: bool = False
    """One GPU for each actor."""


class Job(Section):
    """What every command's config has."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields that name what the job reads beside its data: what they hold is part of what it is, not their paths."""
    reads_labels: ClassVar[bool] = False
    """Whether the clips' labels and their names are part of what the job makes."""

    output: Annotated[str, Field(min_length=1)]
    """Where the job writes: a folder, local, s3:// or gs://."""
    ray: RaySettings = RaySettings()


class TrainingJob(Job):
    """A job that trains on a data set."""

    data: StreamSettings = StreamSettings()

    @model_validator(mode="after")
    def _count_clips(self) -> Self:
        """Whoever reads a config finds each global batch in clips, however it was given."""
        seconds = self.data.clip_seconds
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, TrainSettings):
                self.__dict__[name] = value.count_clips(seconds, name)
            elif isinstance(train := getattr(value, "train", None), TrainSettings):
                self.__dict__[name] = value.model_copy(update={"train": train.count_clips(seconds, f"{name}.train")})
        return self


class PrepareConfig(Job):
    kind: Literal["esc50", "audioset", "speech_commands", "folder", "csv", "unlabelled", "parquet", "webdataset"] = (
        "esc50"
    )
    """Layout of the source."""
    layout: LayoutSettings = LayoutSettings()
    source: Annotated[str, Field(min_length=1)]
    """Folder of the raw clips, local, s3:// or gs://."""
    data: PrepareSettings = PrepareSettings()


class VerifyConfig(Section):
    ray: RaySettings = RaySettings()
    data: VerifySettings = VerifySettings()


class PretrainConfig(TrainingJob, PretrainSettings):
    reads: ClassVar[tuple[str, ...]] = ("tokenizer", "labels", "initial")

    tokenizer: str = ""
    """Published tokenizer whose labels are predicted, computed on the fly where `labels` is empty; without one the
    tokenizer is `random_projection`, as in the paper's iteration 1."""
    random_projection: RandomProjectionSettings = RandomProjectionSettings()
    labels: str = ""
    """Labels stage: patch labels that `tokenize` wrote for `data.path`."""
    initial: str = ""
    """Published encoder whose weights training goes on from, for another domain; from scratch without. Paper: from
    scratch."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if self.tokenizer and "random_projection" in self.model_fields_set:
            raise ValueError(f"random_projection and tokenizer={self.tokenizer} are both set; set one of them")
        return self


class DistillConfig(TrainingJob, DistillSettings):
    reads: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = ""
    """Published model that is distilled: an encoder by its features, a fine-tuned classifier by its logits."""


class TokenizeConfig(Job, InferenceSettings):
    reads: ClassVar[tuple[str, ...]] = ("tokenizer",)

    data: StreamSettings = StreamSettings()
    tokenizer: str = ""
    """Published tokenizer."""


class FinetuneConfig(TrainingJob, FinetuneSettings):
    reads: ClassVar[tuple[str, ...]] = ("encoder",)
    reads_labels: ClassVar[bool] = True

    encoder: str = ""
    """Published encoder to start from."""


class EncoderJob(TrainingJob):
    """A job that fine-tunes one encoder, or several to compare them."""

    encoder: str = ""
    """Published encoder that every run starts from."""
    encoders: dict[str, str] = {}
    """Several encoders, by names of your own, instead of `encoder`; the others are compared with the first."""

    @model_validator(mode="after")
    def _names_are_folders(self) -> Self:
        if self.encoder and self.encoders:
            raise ValueError(f"encoders={list(self.encoders)} and encoder={self.encoder} are both set; set one of them")
        check_folder_names("encoders", self.encoders)
        return self

    @property
    def compared(self) -> dict[str, str]:
        """The encoders by name; a single one is called `encoder`."""
        return self.encoders or {"encoder": self.encoder}


class SweepConfig(EncoderJob):
    reads: ClassVar[tuple[str, ...]] = ("encoder", "encoders")
    reads_labels: ClassVar[bool] = True

    finetune: FinetuneSettings = FinetuneSettings()
    sweep: SweepSettings = SweepSettings()


class EvaluatedData(Section):
    path: Annotated[str, Field(min_length=1)]
    """Prepared data set: the folder that holds `dataset.json`."""
    folds: tuple[int, ...] = ()
    """Folds to judge; empty means all."""
    splits: tuple[str, ...] = ()
    """Splits to judge; empty means all."""

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values


class EvaluateConfig(Job, InferenceSettings):
    reads: ClassVar[tuple[str, ...]] = ("model",)
    reads_labels: ClassVar[bool] = True

    data: StreamSettings = StreamSettings()
    also: tuple[EvaluatedData, ...] = ()
    """Further data sets that the same job judges, each with a result of its own: paths, or {path, folds, splits}."""
    model: str = ""
    """Published model: a frozen linear probe over the folds judges an encoder, its predictions a classifier."""
    models: tuple[str, ...] = ()
    """Published classifiers that are judged as one, instead of `model`. Paper: ten models, 50.6 mAP on AudioSet-2M."""
    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged over the `models` and over the windows of a clip. A mean of logits is what the classifier itself
    takes over the patches of a clip, and a model that is sure counts for more. Paper: not stated."""
    window_seconds: Annotated[float, Field(ge=0.25)] | None = None
    """Clips that are longer are heard in windows of this length, seconds; a clip is heard whole where not set."""
    hop_seconds: PositiveFloat | None = None
    """From the start of one window to that of the next, seconds; default window_seconds."""
    class_table: str = ""
    """AudioSet's class_labels_indices.csv, for classifiers that name their classes by its ids (`/m/09x0r`)."""
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _one_way_to_name_models(self) -> Self:
        if self.model and self.models:
            raise ValueError(f"models={list(self.models)} and model={self.model} are both set; set one of them")
        return self

    @model_validator(mode="after")
    def _windows_leave_nothing_out(self) -> Self:
        if self.hop_seconds is None:
            return self
        if self.window_seconds is None:
            raise ValueError(f"hop_seconds={self.hop_seconds:g} needs window_seconds; set both, or neither")
        if self.hop_seconds > self.window_seconds:
            raise ValueError(
                f"hop_seconds={self.hop_seconds:g} leaves out sound between windows of {self.window_seconds:g} s; use "
                f"at most {self.window_seconds:g}"
            )
        return self

    @property
    def judged_models(self) -> tuple[str, ...]:
        """The models that are judged together: one, or an ensemble."""
        return self.models or (self.model,)


class CrossValidationSettings(Section):
    folds: tuple[int, ...] = ()
    """Folds that take their turn as the test fold; empty means each fold of the data set. Paper, ESC-50: 1 to 5."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Seeds: each is a fine-tuning run of every fold, in place of `finetune.train.seed`."""
    selection: Literal["none", "inner"] = "none"
    """`none` trains on all folds but the test fold and takes the last weights. `inner` keeps the next fold in the cycle
    for validation; its accuracy chooses the learning rate among `learning_rates`."""
    learning_rates: tuple[PositiveFloat, ...] = ()
    """selection=inner: peak learning rates that each fold chooses from by its validation fold; empty means
    `finetune.train.learning_rate` alone."""
    max_concurrent_runs: PositiveInt | None = None
    """Most runs at one time; as many as the cluster has room for where not set."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for name in ("folds", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} names one twice; list each once")
        if not self.seeds:
            raise ValueError("seeds=[] is empty; give at least one, as in seeds=[0]")
        if self.learning_rates and self.selection == "none":
            raise ValueError(
                f"learning_rates={list(self.learning_rates)} need a validation fold to choose by; use selection=inner"
            )
        return self


def check_folder_names(field: str, names: Iterable[str]) -> None:
    """ValueError for a name that is to be a folder's and cannot be."""
    for name in names:
        if not name or set(name) & set("/\\ ") or name.startswith("."):
            raise ValueError(f"{field}: {name!r} is to be a folder's name; use letters, digits and hyphens")


class CrossValidateConfig(EncoderJob):
    reads: ClassVar[tuple[str, ...]] = ("encoder",)
    reads_labels: ClassVar[bool] = True

    finetune: FinetuneSettings = FinetuneSettings()
    cross_validation: CrossValidationSettings = CrossValidationSettings()


class EmbedConfig(Job, InferenceSettings):
    reads: ClassVar[tuple[str, ...]] = ("model",)

    data: StreamSettings = StreamSettings()
    model: str = ""
    """Published encoder or classifier, or a released `.pt` file; of a classifier its encoder is used."""
    pooling: Literal["mean", "none"] = "mean"
    """One vector for each clip, the mean over its patches, or one for each patch."""
    layer: NonNegativeInt | None = None
    """Layer after which to stop, 0 for the input of the first; the last where not set."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the written values."""

    @model_validator(mode="after")
    def _whole_set(self) -> Self:
        for name in ("folds", "splits"):
            if values := getattr(self.data, name):
                raise ValueError(
                    f"data.{name}={list(values)}: every clip of a data set is embedded; leave it out and choose "
                    "among the rows of the result"
                )
        return self


class BenchConfig(Section):
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "end-to-end": {
            "preset": "tiny", "clips": 256, "seconds": 1.0, "repetitions": 1, "warmup": 0, "rounds": 1, "threads": 1,
        },
        "gpu": {"device": "cuda", "precision": "bf16", "repetitions": 10, "warmup": 3, "rounds": 1},
        "profile": {"repetitions": 5, "warmup": 3},
    }  # fmt: skip
    """Benchmarks with other defaults than those below."""

    name: Literal[
        "ceilings", "checkpoint", "compiled", "data", "encoder", "end-to-end", "fbank", "finetune", "gpu", "padding",
        "pretrain", "profile", "tokenize",
    ]  # fmt: skip
    """What is measured. `gpu` is all of it that needs no cluster, on a GPU: bf16, 10 repetitions after 3 of warm-up,
    one round; `profile` names the kernels of the pre-training step (5 repetitions after 3); `padding` has clips of a
    quarter of `seconds` to all of it."""
    preset: Literal["tiny", "mini", "small", "base", "large"] = "base"
    """Size of the encoder; by default tiny for end-to-end."""
    clips: PositiveInt | None = None
    """Clips of a step; by default 4, for fbank 64. A step of data is one pass over them, 2048; one of end-to-end a
    whole run, 256 and 10 and 100 times as many. For gpu each part has its own number, which fits a GPU of 80 GB."""
    seconds: PositiveFloat = 10.0
    """Length of a clip; by default 1 for end-to-end."""
    repetitions: PositiveInt = 3
    """Measured steps of each case in each round; by default 1 for end-to-end."""
    warmup: NonNegativeInt = 1
    """Steps before them that do not count; by default 0 for end-to-end."""
    rounds: PositiveInt = 2
    """How often the cases take turns, each time in new processes; by default 1 for end-to-end."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; by default cuda for gpu."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs under autocast, with weights and gradients in fp32; what runs under DeepSpeed (checkpoint, compiled,
    end-to-end, padding, profile, our whole steps of pretrain and finetune) has bf16 weights and fp32 masters."""
    threads: PositiveInt = 2
    """Threads of PyTorch on the CPU; of each worker of end-to-end, by default 1."""
    micro_batch_size: PositiveInt = 4
    """Clips of a micro-batch of end-to-end, whose optimizer steps have four of them, or one for each of more workers;
    for a GPU some 64."""
    minutes: PositiveFloat = 7.0
    """What gpu takes at most; a part that is not measured by then is named, and the exit status is 1."""
    same_allocator: bool = False
    """Whether on a CPU every process allocates memory as our workers do; else ours alone does, others as Python starts
    them."""
    seed: int = 0
    """Seed of weights, clips and masks."""
    cases: tuple[str, ...] = ()
    """Rows to measure, by their names; empty means all, of end-to-end all of up to 4 workers."""
    output: str = ""
    """Folder that all nodes of a running cluster reach (s3://bucket/x): end-to-end joins the cluster of RAY_ADDRESS,
    which `ray job submit` sets, and runs its rows of workers there. Empty: a cluster of its own on this machine."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_name(cls, values: Any) -> Any:
        return cls.defaults.get(str(values.get("name")), {}) | values if isinstance(values, dict) else values

    @property
    def num_clips(self) -> int:
        """Clips of a step."""
        return self.clips or {"fbank": 64, "data": 2048}.get(self.name, 4)


class StartSettings(Section):
    encoder: str = ""
    """Encoder or fine-tuned model, published or released, that iteration 1's tokenizer is distilled from."""
    tokenizer: str = ""
    """Tokenizer, published or released, that iteration 1 uses; its labels are computed once. Without either, iteration
    1 has a random projection, as in the paper."""
    initial: str = ""
    """Encoder, published or released, whose weights iteration 1's pre-training begins with; random ones if empty, as in
    the paper."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.encoder and self.tokenizer:
            raise ValueError(
                f"tokenizer={self.tokenizer} leaves encoder={self.encoder} without a use: iteration 1's tokenizer is "
                "given or distilled; set one of them"
            )
        return self


Protocol = Literal["sweep", "finetune", "cross-validate", "probe"]


class TaskSettings(Section):
    """A labelled data set that every iteration's encoder is fine-tuned on, and how."""

    protocol: Protocol = "sweep"
    """`sweep` searches the settings of fine-tuning, `finetune` runs them once, `cross-validate` once for every fold and
    seed; `probe` leaves the encoder frozen. Paper: fine-tuned once, ESC-50 and IEMOCAP over five folds."""
    data: StreamSettings = StreamSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    """Of every protocol but `probe`."""
    sweep: SweepSettings = SweepSettings()
    cross_validation: CrossValidationSettings = CrossValidationSettings()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.data.path:
            raise ValueError("data.path is empty; give the prepared data set of this task")
        train = self.finetune.train.count_clips(self.data.clip_seconds, "finetune.train")
        self.__dict__["finetune"] = self.finetune.model_copy(update={"train": train})
        return self


class IterateConfig(TrainingJob):
    iterations: PositiveInt = 3
    """BEATs iterations. Paper: 3."""
    start: StartSettings = StartSettings()
    teacher: tuple[TeacherName, ...] = ("pretrained",)
    """Whose outputs the tokenizers of iterations 2 and on are distilled from: of the iteration before, the `pretrained`
    encoder or the `finetuned` model. One for all, or a list with one for each. Paper: pretrained; the last one
    finetuned for "iter3+", on AudioSet-2M."""
    random_projection: RandomProjectionSettings = RandomProjectionSettings()
    pretrain: PretrainSettings = PretrainSettings()
    distill: DistillSettings = DistillSettings()
    tasks: dict[str, TaskSettings] = {}
    """What every encoder is fine-tuned on and judged by, under names of your own. Where there are none and the data set
    itself is labelled, it is the task: `finetune` and `sweep` are for that. A fine-tuned teacher is the model of the
    first task that is a sweep or a fine-tuning."""
    finetune: FinetuneSettings = FinetuneSettings()
    sweep: SweepSettings = SweepSettings()
    probe: ProbeSettings = ProbeSettings()
    inference: InferenceSettings = InferenceSettings()

    @model_validator(mode="after")
    def _tasks_have_their_own(self) -> Self:
        check_folder_names("tasks", self.tasks)
        if dotted := [name for name in self.tasks if "." in name]:
            raise ValueError(f"tasks: {dotted[0]!r} has a dot, which parts the names of settings; use hyphens")
        for name in ("finetune", "sweep"):
            if self.tasks and name in self.model_fields_set:
                raise ValueError(
                    f"{name} is for a run without tasks, and this one has {', '.join(self.tasks)}; move it to "
                    f"tasks.NAME.{name}"
                )
        return self

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _teachers(self) -> Self:
        if len(self.teacher) not in (1, self.iterations - 1):
            raise ValueError(
                f"teacher={list(self.teacher)}: has {len(self.teacher)} entries for the tokenizers of "
                f"{self.iterations - 1} iterations, those after the first of iterations={self.iterations}; give one "
                "for all, or one for each"
            )
        return self

    def teacher_of(self, iteration: int) -> TeacherName:
        """What the tokenizer of iteration 2 or later is distilled from."""
        return self.teacher[0] if len(self.teacher) == 1 else self.teacher[iteration - 2]


class ConvergenceConfig(IterateConfig):
    judged: str = ""
    """Prepared, labelled data set whose folds judge every encoder; clips of it are pre-trained on only where they are
    in `data.path` too."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of everything random in a run: weights, order, masks, random projection. More may be added later."""
    compact: bool = True
    """Whether iteration 1 is run with compact positions too, by the same budget."""
    finetuned: bool = False
    """Whether every encoder is also fine-tuned on `judged`, each fold being the test fold in turn, with the settings of
    `finetune` and `cross_validation`: a training run for each fold, encoder and seed. May be set later."""
    cross_validation: CrossValidationSettings = CrossValidationSettings()
    minutes: PositiveFloat | None = None
    """Minutes for each pre-training, a quarter of it for each tokenizer: their steps, warm-up and checkpoints then
    follow. None leaves `pretrain.train` and `distill.train` as they are."""
    clips_per_s: PositiveFloat = 40.0
    """Rate by which `minutes` becomes steps, clips/s: what the machine at hand trains. It is a setting, and not
    measured, so that a run that is repeated has the same steps."""

    @model_validator(mode="after")
    def _seeds_are_those_of_the_runs(self) -> Self:
        given = self.cross_validation.seeds
        if given != CrossValidationSettings().seeds:
            raise ValueError(
                f"cross_validation.seeds={list(given)}: an encoder is fine-tuned with the seed that it was trained "
                "with; leave it out, and set seeds"
            )
        return self
