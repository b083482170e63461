"""Tokenizer training: distil a teacher's patch outputs through a vector quantiser (paper section 3.1).

A pre-trained encoder offers the features of each patch. A fine-tuned model, as for "iter3+", offers the logits of each
patch, those whose mean over a clip are the clip's logits, and has a learning rate of its own.

The loss is the negative cosine between the teacher's and the estimated patch features plus the commitment term; see
`beats_ray.models.DistillationModel`. The codebook moves at the end of each optimizer step, the first of which fit it by
k-means; the labels of a step are those of the codebook before it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from beats_ray.config import ConfigError, DistillConfig, DistillSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    DistillationConfig,
    DistillationModel,
    QuantizerConfig,
    SelfDistilledTokenizer,
    TokenizerConfig,
    compute_fbank,
    normalise_fbank,
    save_model,
)
from beats_ray.models.config import EncoderConfig
from beats_ray.models.patches import count_patches
from beats_ray.train.loop import Prepared
from beats_ray.train.metrics import MetricSums


def resolve_learning_rate(config: DistillConfig, teacher_kind: str) -> DistillConfig:
    """The same with the learning rate that counts for this kind of teacher, `encoder` or `classifier`."""
    if teacher_kind != "classifier":
        return config
    train = config.train.model_copy(update={"learning_rate": config.supervised_learning_rate})
    return config.model_copy(update={"train": train})


def tokenizer_config(settings: DistillSettings, teacher: EncoderConfig) -> TokenizerConfig:
    """The tokenizer that is trained: it sees what the teacher, which has this encoder, sees."""
    encoder = settings.encoder.resolve()
    for name in ("patch_size", "num_mel_bins"):
        if getattr(encoder, name) != getattr(teacher, name):
            raise ConfigError(
                f"encoder.overrides.{name}: the tokenizer has {getattr(encoder, name)}, its teacher "
                f"{getattr(teacher, name)}; they must agree, because each patch is estimated from its code"
            )
    chosen = settings.tokenizer
    normalisation = {"fbank_mean": teacher.fbank_mean, "fbank_std": teacher.fbank_std}
    return TokenizerConfig(
        encoder=encoder.model_copy(update=normalisation),
        quantizer=QuantizerConfig(
            num_codes=chosen.num_codes,
            code_dim=chosen.code_dim,
            ema_decay=chosen.ema_decay,
            init_batches=chosen.init_batches,
            restart_below=chosen.restart_below,
            seed=settings.train.seed,
        ),
    )


class DistillModule(nn.Module):
    """Distillation with its metrics, as one module for the engine."""

    def __init__(self, model: DistillationModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor, teacher_BND: Tensor, num_real: int | None = None
    ) -> tuple[Tensor, MetricSums]:
        """Distillation and commitment loss summed over patches, and metric sums. num_real: `BeatsEncoder.forward`."""
        output = self.model(fbank_BTF, num_frames_B, teacher_BND, num_real)
        return output.loss_sum, {
            "train/teacher_cosine": (output.metrics["cosine"], output.num_targets),
            "train/commitment": (output.metrics["commitment"], output.num_targets),
            "tokenizer/code_counts": output.metrics["code_counts"],
        }


class DistillTask:
    """Distils `teacher`, a frozen encoder or classifier, into a tokenizer."""

    def __init__(self, settings: DistillSettings, teacher: BeatsEncoder | AudioClassifier) -> None:
        self._settings = settings
        self._teacher = teacher.eval().requires_grad_(False)
        if isinstance(teacher, AudioClassifier):
            self._seen: EncoderConfig = teacher.encoder.config
            target_width = teacher.config.num_classes
        else:
            self._seen = teacher.config
            target_width = teacher.config.width
        self._config = tokenizer_config(settings, self._seen)
        distillation = DistillationConfig(
            teacher_dim=target_width, commitment_weight=settings.tokenizer.commitment_weight
        )
        tokenizer = SelfDistilledTokenizer(self._config)
        if settings.train.compile:  # what the quantizer collects outlives a pass, and is of any length at first
            tokenizer.quantizer.forward = torch.compiler.disable(tokenizer.quantizer.forward)  # type: ignore[method-assign]
        tokenizer.encoder.use(checkpoint_layers=settings.train.activation_checkpointing)
        self.module = DistillModule(DistillationModel(tokenizer, distillation))

    def depths(self) -> Mapping[str, int]:
        depths = self.module.model.tokenizer.encoder.parameter_depths()
        return {f"model.tokenizer.encoder.{name}": depth for name, depth in depths.items()}

    def frozen_steps(self) -> Mapping[str, int]:
        return {}

    def begin_step(self, step: int) -> None:
        pass

    def end_step(self, moved: bool) -> None:
        self.module.model.tokenizer.quantizer.end_step(moved)

    @property
    def can_resume(self) -> bool:
        return self.module.model.tokenizer.quantizer.is_fitted  # until then k-means needs the vectors of earlier steps

    @torch.no_grad()
    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        fbank_BTF, num_frames_B = compute_fbank(batch.audio_BS, batch.num_samples_B, self._config.encoder.num_mel_bins)
        fbank_BTF = normalise_fbank(fbank_BTF, self._seen.fbank_mean, self._seen.fbank_std)
        teacher = self._teacher.to(fbank_BTF.device)
        num_real = count_patches(batch.host_num_samples_B, self._config.encoder)
        is_half = self._settings.train.precision != "fp32"  # the teacher's weights stay as they are, in fp32
        with torch.autocast(fbank_BTF.device.type, torch.bfloat16, enabled=is_half):
            if isinstance(teacher, AudioClassifier):
                classified = teacher.classify(fbank_BTF, num_frames_B, num_real)
                target_BND, is_pad_BN = classified.patch_logits_BNC, classified.is_pad_BN
            else:
                depth = self._settings.tokenizer.teacher_layer
                encoded = teacher(fbank_BTF, num_frames_B, layer=depth, num_real=num_real)
                target_BND, is_pad_BN = encoded.features_BND, encoded.is_pad_BN
        return Prepared((fbank_BTF, num_frames_B, target_BND.float(), num_real), (~is_pad_BN).sum())

    def publish(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        prefix = "model.tokenizer."
        tokenizer = SelfDistilledTokenizer(self._config)
        tokenizer.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        )
        save_model(tokenizer, folder)
