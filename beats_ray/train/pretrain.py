"""Masked pre-training: predict the tokenizer's label of every masked patch (paper section 3.2).

The labels come with the batch (a labels stage wrote them) or from a frozen tokenizer on the training device. Beside the
loss stands the clip-band baseline: how well the labels that the encoder *sees* in the same clip and frequency band
predict the masked ones. A loss above it shows nothing but repetition within a clip.

A random projection may have several codebooks (not the paper's): then a patch has a label of each, the loss is the mean
over them, accuracy and baseline count all, and `labels/...` are of the first.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beats_ray.baselines import clip_band_baseline
from beats_ray.config import MaskingSettings, PretrainSettings, RandomProjectionSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.models import (
    BeatsEncoder,
    MaskedPatchPredictor,
    PatchMask,
    PredictorConfig,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    compute_fbank,
    normalise_fbank,
    sample_patch_mask,
    save_model,
)
from beats_ray.models.patches import grid_patches, patch_padding, silent_patches
from beats_ray.train.loop import Prepared
from beats_ray.train.metrics import MetricSums, code_counts

Tokenizer = RandomProjectionTokenizer | SelfDistilledTokenizer


def build_random_projection(settings: RandomProjectionSettings) -> RandomProjectionTokenizer:
    """Iteration 1's tokenizer: drawn from its seed, and never trained."""
    return RandomProjectionTokenizer(RandomProjectionConfig(**settings.model_dump()))


class PretrainModule(nn.Module):
    """Label prediction with its loss, as one module for the engine."""

    def __init__(self, predictor: MaskedPatchPredictor, compiled: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.predictor = predictor
        self._label_smoothing = label_smoothing
        # The baseline's shapes follow the clips: compiled, it would be so for each batch anew.
        self._baseline = torch.compiler.disable(clip_band_baseline) if compiled else clip_band_baseline

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor, mask: PatchMask, labels: Tensor
    ) -> tuple[Tensor, MetricSums]:
        """Cross-entropy summed over target patches, the mean over codebooks, and metric sums.

        labels: labels_BN, or labels_BNQ of several codebooks.
        """
        logits = self.predictor(fbank_BTF, num_frames_B, mask).float()
        with torch.no_grad():
            is_silent_BN = silent_patches(fbank_BTF, self.predictor.encoder.config.patch_size)
        books = [(logits, labels)] if labels.dim() == 2 else list(zip(logits.unbind(2), labels.unbind(2), strict=True))
        losses, sums = zip(*(self._of_one_codebook(mask, is_silent_BN, *book) for book in books), strict=True)
        metrics: MetricSums = {
            name: (torch.stack([one[name][0] for one in sums]).sum(), torch.stack([one[name][1] for one in sums]).sum())
            for name in sums[0]
        }
        first_logits_BKV, first_labels_BN = books[0]
        metrics["labels/code_counts"] = code_counts(first_labels_BN, first_logits_BKV.shape[-1])
        return torch.stack(losses).mean(), metrics

    def _of_one_codebook(
        self, mask: PatchMask, is_silent_BN: Tensor, logits_BKV: Tensor, labels_BN: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        labels_BK = labels_BN.gather(1, mask.target_BK.clamp(min=0)).masked_fill(mask.target_BK < 0, -1)
        smoothing = self._label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )
        with torch.no_grad():
            correct = (logits_BKV.argmax(-1) == labels_BK).sum()
            baseline = self._baseline(labels_BN, mask.visible_BM, mask.target_BK, logits_BKV.shape[-1])
        return loss, {
            "train/masked_accuracy": (correct, (labels_BK >= 0).sum()),
            "train/clip_band_loss": (baseline.loss_sum, baseline.num_targets),
            "train/clip_band_accuracy": (baseline.num_correct, baseline.num_targets),
            **self._sounding_metrics(mask, is_silent_BN, logits_BKV, labels_BN),
        }

    @torch.no_grad()
    def _sounding_metrics(
        self, mask: PatchMask, is_silent_BN: Tensor, logits_BKV: Tensor, labels_BN: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss and baseline of the targets that are not silent, and the share of those that are.

        Silent patches are constant and always have one label, which flatters whatever predicts it.
        """
        is_silent_BK = is_silent_BN.gather(1, mask.target_BK.clamp(min=0)) & (mask.target_BK >= 0)
        sounding_BK = mask.target_BK.masked_fill(is_silent_BK, -1)
        labels_BK = labels_BN.gather(1, sounding_BK.clamp(min=0)).masked_fill(sounding_BK < 0, -1)
        loss = F.cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=-1, reduction="sum")
        baseline = self._baseline(labels_BN, mask.visible_BM, sounding_BK, logits_BKV.shape[-1])
        return {
            "train/sounding_loss": (loss, (labels_BK >= 0).sum()),
            "train/sounding_clip_band_loss": (baseline.loss_sum, baseline.num_targets),
            "train/silent_fraction": (is_silent_BK.sum(), (mask.target_BK >= 0).sum()),
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
        num_codebooks: int = 1,
    ) -> None:
        encoder = BeatsEncoder(settings.encoder.resolve(), settings.encoder.positions)
        if initial is not None:
            encoder.load_state_dict(initial.state_dict())
        encoder.use(checkpoint_layers=settings.train.activation_checkpointing)
        predictor = PredictorConfig(
            num_layers=settings.predictor.num_layers,
            mask_vector=settings.predictor.mask_vector,
            num_codes=num_codes,
            num_codebooks=num_codebooks,
        )
        self.module = PretrainModule(
            MaskedPatchPredictor(encoder, predictor), settings.train.compile, settings.predictor.label_smoothing
        )
        self._masking: MaskingSettings = settings.masking
        self._config = encoder.config
        self._positions = encoder.positions
        self._tokenizer = tokenizer.eval() if tokenizer is not None else None

    def depths(self) -> Mapping[str, int]:
        depths = self.module.predictor.encoder.parameter_depths()
        return {f"predictor.encoder.{name}": depth for name, depth in depths.items()}

    def frozen_steps(self) -> Mapping[str, int]:
        return {}

    def begin_step(self, step: int) -> None:
        pass

    def end_step(self, moved: bool) -> None:
        pass

    @property
    def can_resume(self) -> bool:
        return True

    @torch.no_grad()
    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        fbank_BTF, num_frames_B = compute_fbank(batch.audio_BS, batch.num_samples_B, self._config.num_mel_bins)
        labels = batch.patch_labels_BN
        if labels is None:
            if self._tokenizer is None:
                raise RuntimeError("the batch has no patch labels and the task no tokenizer")
            # The tokenizer normalises by its own statistics, as in a labels stage; the encoder may have others.
            labels = self._tokenizer.to(fbank_BTF.device).label_fbank(fbank_BTF, num_frames_B)
        fbank_BTF = normalise_fbank(fbank_BTF, self._config.fbank_mean, self._config.fbank_std)
        columns = self._config.patches_per_row
        is_pad_BN = patch_padding(num_frames_B, fbank_BTF.shape[1], self._config.patch_size, columns)
        labels = labels.long().masked_fill(is_pad_BN if labels.dim() == 2 else is_pad_BN.unsqueeze(-1), -1)
        on_host_B = batch.host_num_samples_B
        mask = sample_patch_mask(
            is_pad_BN,
            self._masking.ratio,
            generator,
            self._masking.block_size,
            self._masking.max_targets,
            patches_per_row=columns,
            num_real_B=None if on_host_B is None else grid_patches(on_host_B, self._config),
        )
        return Prepared((fbank_BTF, num_frames_B, mask, labels), (mask.target_BK >= 0).sum())

    def publish(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        prefix = "predictor.encoder."
        encoder = BeatsEncoder(self._config, self._positions)
        weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        encoder.load_state_dict({name: value.float() for name, value in weights.items()})
        save_model(encoder, folder)


def num_codes_of(tokenizer: Tokenizer) -> int:
    """Size of a tokenizer's codebook, or of each where it has several."""
    config = tokenizer.config
    return config.quantizer.num_codes if isinstance(config, TokenizerConfig) else config.num_codes


def num_codebooks_of(tokenizer: Tokenizer) -> int:
    """Labels that a tokenizer gives each patch; a learned one gives one."""
    config = tokenizer.config
    return 1 if isinstance(config, TokenizerConfig) else config.num_codebooks
