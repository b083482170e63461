"""Tokenizer training: distil a teacher encoder's patch outputs through a vector quantiser (paper section 3.1).

The loss is the negative cosine between the teacher's and the estimated patch features plus the commitment term; see
`beats_ray.models.DistillationModel`. The codebook is initialised by k-means on several batches before the first step.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from beats_ray.config import DistillSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.models import (
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
from beats_ray.train.loop import Prepared
from beats_ray.train.metrics import MetricSums


class DistillModule(nn.Module):
    """Distillation with its metrics, as one module for the engine."""

    def __init__(self, model: DistillationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, fbank_BTF: Tensor, num_frames_B: Tensor, teacher_BND: Tensor) -> tuple[Tensor, MetricSums]:
        """Distillation and commitment loss summed over patches, and metric sums."""
        output = self.model(fbank_BTF, num_frames_B, teacher_BND)
        return output.loss_sum, {
            "train/teacher_cosine": (output.metrics["cosine"], output.num_targets),
            "train/commitment": (output.metrics["commitment"], output.num_targets),
            "tokenizer/code_counts": output.metrics["code_counts"],
        }


class DistillTask:
    """Distils `teacher`, a frozen encoder, into a tokenizer."""

    def __init__(self, settings: DistillSettings, teacher: BeatsEncoder) -> None:
        self._settings = settings
        self._teacher = teacher.eval().requires_grad_(False)
        chosen = settings.tokenizer
        normalisation = {"fbank_mean": teacher.config.fbank_mean, "fbank_std": teacher.config.fbank_std}
        self._config = TokenizerConfig(
            encoder=settings.encoder.resolve().model_copy(update=normalisation),  # it sees what the teacher sees
            quantizer=QuantizerConfig(
                num_codes=chosen.num_codes,
                code_dim=chosen.code_dim,
                ema_decay=chosen.ema_decay,
                init_batches=chosen.init_batches,
                restart_below=chosen.restart_below,
                seed=settings.train.seed,
            ),
        )
        distillation = DistillationConfig(teacher_dim=teacher.config.width, commitment_weight=chosen.commitment_weight)
        tokenizer = SelfDistilledTokenizer(self._config)
        if settings.train.compile:  # workers talk in the quantizer, and its first batches fit the codebook
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

    @torch.no_grad()
    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        teacher = self._teacher.to(batch.audio_BS.device)
        fbank_BTF, num_frames_B = compute_fbank(batch.audio_BS, batch.num_samples_B, self._config.encoder.num_mel_bins)
        fbank_BTF = normalise_fbank(fbank_BTF, teacher.config.fbank_mean, teacher.config.fbank_std)
        target = teacher(fbank_BTF, num_frames_B, layer=self._settings.tokenizer.teacher_layer)
        return Prepared((fbank_BTF, num_frames_B, target.features_BND), (~target.is_pad_BN).sum())

    def publish(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        prefix = "model.tokenizer."
        tokenizer = SelfDistilledTokenizer(self._config)
        tokenizer.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        )
        save_model(tokenizer, folder)
