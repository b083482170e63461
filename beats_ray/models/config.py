"""Typed settings of the encoder and the presets that name its sizes.

encoder_config("base")                       # the published size, 90.3 M parameters
encoder_config("tiny", layer_drop=0.1)       # a preset with differences
"""

import difflib
from collections.abc import Iterable
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

FBANK_MEAN = 15.41663  # released checkpoints
FBANK_STD = 6.55582  # released checkpoints
SAMPLE_RATE_HZ = 16_000  # the only rate the published models were trained at
NUM_MEL_BINS = 128
PATCH_SIZE = 16
RELEASED_SUFFIXES = (".pt", ".pth", ".ckpt")  # of checkpoint files that other projects write

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class ModelConfig(BaseModel):
    """Settings that cannot change after construction and accept no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EncoderConfig(ModelConfig):
    """Architecture of one BEATs encoder; every default is the published base model's."""

    num_layers: int = 12
    """Transformer layers. Paper: 12."""
    width: int = 768
    """Features per patch inside the Transformer. Paper: 768."""
    num_heads: int = 12
    """Attention heads; must divide `width`. Paper: 12, that is 64 features a head."""
    ffn_width: int = 3072
    """Features in the hidden layer of each feed-forward block. Paper: 3072."""
    patch_embed_width: int = 512
    """Features of a patch after the patch embedding; a linear map to `width` follows if they differ. Release: 512."""
    patch_size: int = PATCH_SIZE
    """Side of a square patch, in frames (10 ms) and in mel bins. Paper: 16."""
    num_mel_bins: int = NUM_MEL_BINS
    """Mel bins of the filterbank; must be a multiple of `patch_size`. Paper: 128."""
    conv_pos_kernel: int = 128
    """Kernel of the convolutional position embedding, in patches. Release: 128."""
    conv_pos_groups: int = 16
    """Channel groups of that convolution; must divide `width`. Release: 16."""
    relative_buckets: int = 320
    """Learned relative-position buckets, both directions together. Release: 320."""
    relative_max_distance: int = 800
    """Distance in patches from which on all positions share the last bucket. Released checkpoints: 800."""
    relative_bias_2d: bool = False
    """Relative bias of the distance in time plus one of the distance in frequency, instead of the release's bias of the
    distance between grid indices. Paper: False."""
    gated_relative_bias: bool = True
    """Whether each query gates its relative-position bias. Paper: True."""
    deep_norm: bool = True
    """DeepNorm residual scale and initialisation; excludes `pre_norm`. Release: True."""
    pre_norm: bool = False
    """Layer norm before each block instead of after it. Release: False."""
    dropout: float = 0.0
    """Dropout after the embedding, the attention and the feed-forward block; a probability. Fine-tuning, paper: 0."""
    attention_dropout: float = 0.0
    """Dropout on attention weights; a probability."""
    activation_dropout: float = 0.0
    """Dropout inside the feed-forward block; a probability."""
    layer_drop: float = 0.0
    """Probability that a layer is skipped for a clip in training. Fine-tuning, paper: 0.1."""
    fbank_mean: float = FBANK_MEAN
    """Mean that the log-mel filterbank is normalised with. Released checkpoints: 15.41663."""
    fbank_std: float = FBANK_STD
    """Deviation; the filterbank is divided by twice this value. Released checkpoints: 6.55582."""
    sample_rate_hz: int = SAMPLE_RATE_HZ
    """Sample rate of the waveforms, in Hz. Paper: 16000, the only one the filterbank implements."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("num_layers", "width", "num_heads", "ffn_width", "patch_embed_width", "patch_size",
                     "num_mel_bins", "conv_pos_kernel", "conv_pos_groups"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "raise it")
        for name in ("num_heads", "conv_pos_groups"):
            parts = getattr(self, name)
            _require(self.width % parts == 0, name, parts, f"must divide width={self.width}", "change either")
        _require(
            self.num_mel_bins % self.patch_size == 0, "num_mel_bins", self.num_mel_bins,
            f"must be a multiple of patch_size={self.patch_size}", f"use {NUM_MEL_BINS} with {PATCH_SIZE}",
        )  # fmt: skip
        _require(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0, "relative_buckets", self.relative_buckets,
            "must be a multiple of 4 (two directions, near and far)", "use 320",
        )  # fmt: skip
        _require(
            self.relative_max_distance > self.relative_buckets // 4,
            "relative_max_distance", self.relative_max_distance,
            f"must exceed relative_buckets / 4 = {self.relative_buckets // 4}", "use 800",
        )  # fmt: skip
        _require(
            not (self.deep_norm and self.pre_norm), "pre_norm", self.pre_norm,
            "excludes deep_norm=True, which scales post-norm residuals", "set deep_norm=False",
        )  # fmt: skip
        for name in ("dropout", "attention_dropout", "activation_dropout", "layer_drop"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, name, value, "must be a probability in [0, 1)", "use 0 to switch it off")
        _require(self.fbank_std > 0, "fbank_std", self.fbank_std, "must be positive", f"use {FBANK_STD}")
        _require(
            self.sample_rate_hz == SAMPLE_RATE_HZ, "sample_rate_hz", self.sample_rate_hz,
            f"must be {SAMPLE_RATE_HZ}", "resample the audio before the model",
        )  # fmt: skip
        return self

    @property
    def head_width(self) -> int:
        """Features per attention head."""
        return self.width // self.num_heads

    @property
    def patches_per_row(self) -> int:
        """Patches along frequency for each time step of the grid."""
        return self.num_mel_bins // self.patch_size


def _require(holds: bool, field: str, value: object, rule: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value} {rule}; {remedy}")


ENCODER_PRESETS: dict[str, EncoderConfig] = {
    # Ours, for tests and demonstrations on a CPU: a short convolution, and a narrow patch embedding.
    "tiny": EncoderConfig(
        num_layers=4, width=128, num_heads=4, ffn_width=512, patch_embed_width=256, conv_pos_kernel=32
    ),
    "mini": EncoderConfig(
        num_layers=4, width=192, num_heads=6, ffn_width=768, patch_embed_width=256, conv_pos_kernel=32
    ),
    "small": EncoderConfig(num_layers=12, width=384, num_heads=6, ffn_width=1536),
    "base": EncoderConfig(),  # paper, section 4.2
    "large": EncoderConfig(num_layers=24, width=1024, num_heads=16, ffn_width=4096),  # OpenBEATs large
}


def encoder_config(preset: str = "base", **overrides: Any) -> EncoderConfig:
    """Returns a preset with single fields replaced.

    Raises ValueError for an unknown preset or field, naming the valid ones, and for a value that breaks a rule.
    """
    if preset not in ENCODER_PRESETS:
        raise ValueError(unknown_name("encoder preset", preset, ENCODER_PRESETS))
    for name in overrides:
        if name not in EncoderConfig.model_fields:
            raise ValueError(unknown_name("encoder field", name, EncoderConfig.model_fields))
    return validated(EncoderConfig, ENCODER_PRESETS[preset].model_dump() | overrides)


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Error text for a name that does not exist: the nearest valid one, and all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Valid: {', '.join(names)}"


def validated(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Builds a config and turns pydantic's report into one plain ValueError."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            text = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                text = unknown_name("field", place, config_class.model_fields)
            elif place:
                text = f"{place}={item['input']!r}: {text}"
            problems.append(text)
        raise ValueError(f"{config_class.__name__}: " + "; ".join(problems)) from None
