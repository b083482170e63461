"""Fine-tuning: a mean-pooled classifier on a pre-trained encoder (paper section 4.2), or its head alone.

Single-label data are trained with (soft) cross-entropy, multi-label data with binary cross-entropy; mixup mixes
waveforms, or filterbanks, and targets alike. Layer-wise learning-rate decay follows the encoder's depth.

While the encoder is frozen (`freeze_encoder`, or in the first `freeze_encoder_steps`) it is in evaluation mode and runs
without a gradient: a step costs its forward pass.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beats_ray.config import FinetuneSettings
from beats_ray.data.augment import (
    Mixture,
    change_gain,
    draw_mixture,
    mask_spectrogram,
    mix,
    mix_targets,
    mixed_lengths,
    on_cpu,
    roll,
)
from beats_ray.data.batches import MicroBatch
from beats_ray.data.manifest import DatasetManifest
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    compute_fbank,
    normalise_fbank,
    save_model,
)
from beats_ray.models.patches import count_patches
from beats_ray.train.loop import Prepared
from beats_ray.train.metrics import MetricSums, RankedScores


class FinetuneModule(nn.Module):
    """Classifier with its loss, as one module for the engine."""

    def __init__(self, classifier: AudioClassifier, label_smoothing: float) -> None:
        super().__init__()
        self.classifier = classifier
        self._label_smoothing = label_smoothing
        self._encoder_is_frozen = False

    def freeze_encoder(self, is_frozen: bool) -> None:
        """From now on the encoder is used as it is, or trained again."""
        self._encoder_is_frozen = is_frozen
        self.classifier.encoder.train(self.training and not is_frozen)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self._encoder_is_frozen:
            self.classifier.encoder.eval()
        return self

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor, targets_BC: Tensor, num_real: int | None = None
    ) -> tuple[Tensor, MetricSums]:
        """Loss summed over clips, and metric sums. num_real: see `BeatsEncoder.forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._encoder_is_frozen):
            encoded = self.classifier.encoder(fbank_BTF, num_frames_B, num_real=num_real)
        logits_BC = self.classifier.pool(encoded).logits_BC.float()
        if self.classifier.config.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none").mean(1).sum()
        else:
            smoothing = self._label_smoothing if self.training else 0.0
            loss = F.cross_entropy(logits_BC, targets_BC, reduction="sum", label_smoothing=smoothing)
        with torch.no_grad():
            correct = targets_BC.gather(1, logits_BC.argmax(1, keepdim=True)).round().sum()
            count = logits_BC.new_full((), len(logits_BC))  # filled on the device: the host does not wait
        sums: MetricSums = {"train/accuracy": (correct, count)}
        if self.classifier.config.multi_label and not self.training:
            sums["train/mean_average_precision"] = RankedScores(logits_BC, targets_BC)
        return loss, sums


class FinetuneTask:
    """Classification of whole clips, starting from `encoder`'s weights."""

    def __init__(
        self,
        settings: FinetuneSettings,
        encoder: BeatsEncoder,
        manifest: DatasetManifest,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        """trained_on: kept in the published model, see `provenance.py`."""
        self._trained_on = trained_on
        self._settings = settings
        changes = {"dropout": settings.dropout, "layer_drop": settings.layer_drop}
        self._config = encoder.config.model_copy(update=changes)
        tuned = BeatsEncoder(self._config, encoder.positions)
        tuned.load_state_dict(encoder.state_dict())
        self._classes = ClassifierConfig(
            num_classes=len(manifest.label_names), multi_label=manifest.multi_label, pooling=settings.pooling
        )
        self._class_names = manifest.label_names
        classifier = AudioClassifier(tuned, self._classes, self._class_names)
        self.module = FinetuneModule(classifier, settings.label_smoothing)
        tuned.use(checkpoint_layers=settings.train.activation_checkpointing)
        tuned.requires_grad_(not settings.freeze_encoder)
        self.begin_step(0)

    def depths(self) -> Mapping[str, int]:
        depths = self.module.classifier.parameter_depths()
        return {f"classifier.{name}": depth for name, depth in depths.items()}

    def frozen_steps(self) -> Mapping[str, int]:
        steps = self._settings.freeze_encoder_steps
        return {name: steps for name in self.depths() if name.startswith("classifier.encoder.")} if steps else {}

    def begin_step(self, step: int) -> None:
        self.module.freeze_encoder(self._settings.freeze_encoder or step < self._settings.freeze_encoder_steps)

    def end_step(self, moved: bool) -> None:
        pass

    @property
    def can_resume(self) -> bool:
        return True

    @torch.no_grad()
    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        augment = self._settings.augment
        wave_BS, targets_BC = batch.audio_BS.float() / 32768.0, batch.targets_BC.float()
        num_samples_B, host_num_samples_B = batch.num_samples_B, batch.host_num_samples_B
        mixture = None
        if training:
            wave_BS = roll(wave_BS, num_samples_B, round(augment.roll_seconds * self._config.sample_rate_hz), generator)
            wave_BS = change_gain(wave_BS, augment.gain_db, generator)
            if augment.mixup:
                on_host = draw_mixture(len(wave_BS), augment.mixup, augment.mixup_probability, on_cpu(generator))
                if host_num_samples_B is not None:
                    host_num_samples_B = mixed_lengths(host_num_samples_B, on_host)
                mixture = Mixture(*(drawn.to(wave_BS.device, non_blocking=True) for drawn in on_host))
                targets_BC = mix_targets(targets_BC, mixture)
        if mixture is not None and augment.mixup_of == "waveform":
            wave_BS, num_samples_B = mix(wave_BS, num_samples_B, mixture)
        fbank_BTF, num_frames_B = compute_fbank(wave_BS, num_samples_B, self._config.num_mel_bins)
        fbank_BTF = normalise_fbank(fbank_BTF, self._config.fbank_mean, self._config.fbank_std)
        if mixture is not None and augment.mixup_of == "fbank":
            fbank_BTF, num_frames_B = mix(fbank_BTF, num_frames_B, mixture)
        if training:
            fbank_BTF = mask_spectrogram(
                fbank_BTF,
                num_frames_B,
                (augment.num_time_masks, augment.time_mask_fraction),
                (augment.num_freq_masks, augment.freq_mask_bins),
                generator,
            )
        clips = torch.full((), len(wave_BS), device=wave_BS.device)
        num_real = count_patches(host_num_samples_B, self._config)
        return Prepared((fbank_BTF, num_frames_B, targets_BC, num_real), clips)

    def publish(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        prefix = "classifier."
        classifier = AudioClassifier(BeatsEncoder(self._config), self._classes, self._class_names)
        classifier.load_state_dict(
            {name.removeprefix(prefix): value.float() for name, value in state_dict.items() if name.startswith(prefix)}
        )
        save_model(classifier, folder, {"data": self._trained_on} if self._trained_on else None)
