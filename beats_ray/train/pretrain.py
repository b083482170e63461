"""Masked pre-training: predict the tokenizer's label of every masked patch (paper section 3.2).

The labels come with the batch (a labels stage wrote them) or from a frozen tokenizer on the training device. Beside the
loss stands the clip-band baseline: how well the labels that the encoder *sees* in the same clip and frequency band
predict the masked ones. A loss above it shows nothing but repetition within a clip.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beats_ray.baselines import clip_band_baseline
from beats_ray.config import MaskingSettings, PretrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.models import (
    BeatsEncoder,
    MaskedPatchPredictor,
    PatchMask,
    PredictorConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    compute_fbank,
    normalise_fbank,
    sample_patch_mask,
    save_model,
)
from beats_ray.models.patches import patch_padding
from beats_ray.train.loop import Prepared
from beats_ray.train.metrics import MetricSums, code_counts

Tokenizer = RandomProjectionTokenizer | SelfDistilledTokenizer


class PretrainModule(nn.Module):
    """Label prediction with its loss, as one module for the engine."""

    def __init__(self, predictor: MaskedPatchPredictor, compiled: bool = False) -> None:
        super().__init__()
        self.predictor = predictor
        # The baseline's shapes follow the clips: compiled, it would be so for each batch anew.
        self._baseline = torch.compiler.disable(clip_band_baseline) if compiled else clip_band_baseline

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor, mask: PatchMask, labels_BN: Tensor
    ) -> tuple[Tensor, MetricSums]:
        """Cross-entropy summed over target patches, and metric sums."""
        logits_BKV = self.predictor(fbank_BTF, num_frames_B, mask).float()
        labels_BK = labels_BN.gather(1, mask.target_BK.clamp(min=0)).masked_fill(mask.target_BK < 0, -1)
        loss = F.cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=-1, reduction="sum")
        with torch.no_grad():
            is_target_BK = labels_BK >= 0
            count = is_target_BK.sum()
            correct = (logits_BKV.argmax(-1) == labels_BK).sum()
            baseline = self._baseline(labels_BN, mask.visible_BM, mask.target_BK, logits_BKV.shape[-1])
        return loss, {
            "train/masked_accuracy": (correct, count),
            "train/clip_band_loss": (baseline.loss_sum, baseline.num_targets),
            "train/clip_band_accuracy": (baseline.num_correct, baseline.num_targets),
            "labels/code_counts": code_counts(labels_BN, logits_BKV.shape[-1]),
        }


class PretrainTask:
    """Masked label prediction on labels of the batch, or of `tokenizer` where the batch has none.

    initial: an encoder of the same settings, whose weights training goes on from.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        num_codes: int,
        tokenizer: Tokenizer | None,
        initial: BeatsEncoder | None = None,
    ) -> None:
        encoder = BeatsEncoder(settings.encoder.resolve(), settings.encoder.positions)
        if initial is not None:
            encoder.load_state_dict(initial.state_dict())
        encoder.use(checkpoint_layers=settings.train.activation_checkpointing)
        predictor = PredictorConfig(
            num_layers=settings.predictor.num_layers, mask_vector=settings.predictor.mask_vector, num_codes=num_codes
        )
        self.module = PretrainModule(MaskedPatchPredictor(encoder, predictor), settings.train.compile)
        self._masking: MaskingSettings = settings.masking
        self._config = encoder.config
        self._positions = encoder.positions
        self._tokenizer = tokenizer.eval() if tokenizer is not None else None

    def depths(self) -> Mapping[str, int]:
        depths = self.module.predictor.encoder.parameter_depths()
        return {f"predictor.encoder.{name}": depth for name, depth in depths.items()}

    @torch.no_grad()
    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        fbank_BTF, num_frames_B = compute_fbank(batch.audio_BS, batch.num_samples_B, self._config.num_mel_bins)
        fbank_BTF = normalise_fbank(fbank_BTF, self._config.fbank_mean, self._config.fbank_std)
        labels_BN = batch.patch_labels_BN
        if labels_BN is None:
            if self._tokenizer is None:
                raise RuntimeError("the batch has no patch labels and the task no tokenizer")
            labels_BN = self._tokenizer.to(fbank_BTF.device).label_patches(fbank_BTF, num_frames_B)
        is_pad_BN = patch_padding(num_frames_B, fbank_BTF.shape[1], self._config.patch_size)
        labels_BN = labels_BN.long().masked_fill(is_pad_BN, -1)
        mask = sample_patch_mask(
            is_pad_BN, self._masking.ratio, generator, self._masking.block_size, self._masking.max_targets
        )
        return Prepared((fbank_BTF, num_frames_B, mask, labels_BN), (mask.target_BK >= 0).sum())

    def publish(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        prefix = "predictor.encoder."
        encoder = BeatsEncoder(self._config, self._positions)
        weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        encoder.load_state_dict({name: value.float() for name, value in weights.items()})
        save_model(encoder, folder)


def num_codes_of(tokenizer: Tokenizer) -> int:
    """Size of a tokenizer's codebook."""
    config = tokenizer.config
    return config.quantizer.num_codes if isinstance(config, TokenizerConfig) else config.num_codes
