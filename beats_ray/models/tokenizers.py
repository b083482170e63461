"""Acoustic tokenizers: one label for each patch, in the encoder's patch order.

    labels_BN = RandomProjectionTokenizer().label_patches(fbank_BTF, num_frames_B)     # iteration 1
    labels_BN = SelfDistilledTokenizer(config).label_patches(fbank_BTF, num_frames_B)  # iterations 2 and 3
    labels_BN = tokenizer.label_fbank(*compute_fbank(wave_BS, num_samples_B))          # either, not yet normalised
    labels_BN = tokenizer.extract_labels(wave_BS, padding_mask)                        # either, from waveforms

Shapes: B clips, S samples, T frames, F mel bins, N patches, P values in a patch, D width, V codes, Q codebooks,
W windows of a clip.
Source: paper sections 3.3.1 (random projection, as in BEST-RQ) and 3.3.2 (self-distilled).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from beats_ray.models.config import FBANK_MEAN, FBANK_STD, EncoderConfig, ModelConfig
from beats_ray.models.encoder import BeatsEncoder, Compat, check_waveform
from beats_ray.models.fbank import compute_fbank, normalise_fbank
from beats_ray.models.fp32_buffers import Float32Buffers
from beats_ray.models.patches import patchify
from beats_ray.models.quantizer import CosineQuantizer, Quantized, QuantizerConfig
from beats_ray.models.transformer import TransformerStack


class RandomProjectionConfig(ModelConfig):
    """Settings of the random-projection tokenizer."""

    num_codes: int = 1024
    """Random codes. Paper: 1024."""
    code_dim: int = 256
    """Dimensions of the projection and of a code. Paper: 256."""
    normalization: Literal["none", "l2", "standardize"] = "l2"
    """What makes patches comparable: nothing (loudness then decides the label), l2 norm of projection and codes
    (BEST-RQ), or zero mean and unit deviation of each patch before that."""
    num_codebooks: int = Field(default=1, ge=1)
    """Codebooks, each with a projection of its own, which give a patch so many labels (USM, arXiv 2303.01037, section
    3.1). Paper: 1."""
    seed: int = 0
    """Seed of projections and codebooks; two tokenizers of one seed are equal."""
    patch_size: int = 16
    """Side of a patch, in frames and mel bins. Paper: 16."""


class RandomProjectionTokenizer(Float32Buffers):
    """Labels a patch with the nearest of some random codes after a random linear map; nothing is ever trained.

    Of several codebooks the first is that of a tokenizer of one codebook and the same seed. Their projections stand
    side by side in the buffers (P, Q x D), their codes one below the other (Q x V, D).
    """

    projection_PD: Tensor
    codebook_VD: Tensor

    def __init__(self, config: RandomProjectionConfig | None = None) -> None:
        super().__init__()
        self.config = config or RandomProjectionConfig()
        values = self.config.patch_size**2
        generator = torch.Generator().manual_seed(self.config.seed)
        projections, codebooks = [], []
        for _ in range(self.config.num_codebooks):
            projections.append(torch.randn(values, self.config.code_dim, generator=generator) / values**0.5)
            codebooks.append(torch.randn(self.config.num_codes, self.config.code_dim, generator=generator))
        projection_PD, codebook_VD = torch.cat(projections, dim=1), torch.cat(codebooks)
        if self.config.normalization != "none":
            codebook_VD = F.normalize(codebook_VD, dim=-1)
        self.register_buffer("projection_PD", projection_PD)
        self.register_buffer("codebook_VD", codebook_VD)

    @torch.no_grad()
    def extract_labels(self, wave_BS: Tensor, padding_mask_BS: Tensor | None = None) -> Tensor:
        """Returns labels_BN (int64, -1 at padding) of 16 kHz waveforms in [-1, 1].

        padding_mask_BS: True at padding, which must follow the clip. Errors as for `BeatsEncoder.extract_features`.
        """
        return self.label_fbank(*_front_end(wave_BS, padding_mask_BS))

    @torch.no_grad()
    def label_fbank(self, fbank_BTF: Tensor, num_frames_B: Tensor) -> Tensor:
        """The same of filterbanks as `compute_fbank` gives them, normalised by the released checkpoints' statistics."""
        return self.label_patches(normalise_fbank(fbank_BTF, FBANK_MEAN, FBANK_STD, num_frames_B), num_frames_B)

    @torch.no_grad()
    def label_patches(self, fbank_BTF: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """Returns labels_BN (int64, -1 at padding) of normalised filterbanks of any length.

        With several codebooks, labels_BNQ.
        """
        with torch.autocast(fbank_BTF.device.type, enabled=False):
            patches_BNP, is_pad_BN = patchify(fbank_BTF.float(), num_frames_B, self.config.patch_size)
            if self.config.normalization == "standardize":
                patches_BNP = F.layer_norm(patches_BNP, patches_BNP.shape[-1:])
            labels = [
                self._nearest(patches_BNP, projection_PD, codebook_VD).masked_fill(is_pad_BN, -1)
                for projection_PD, codebook_VD in zip(
                    self.projection_PD.split(self.config.code_dim, dim=1),
                    self.codebook_VD.split(self.config.num_codes),
                    strict=True,
                )
            ]
            return labels[0] if len(labels) == 1 else torch.stack(labels, dim=-1)

    def _nearest(self, patches_BNP: Tensor, projection_PD: Tensor, codebook_VD: Tensor) -> Tensor:
        score_BNV = (patches_BNP @ projection_PD) @ codebook_VD.t()
        if self.config.normalization == "none":
            # Nearest by distance: |p - c|^2 = |p|^2 - 2 p.c + |c|^2, and |p| is the same for all codes.
            score_BNV = score_BNV - 0.5 * codebook_VD.square().sum(dim=-1)
        return score_BNV.argmax(dim=-1)


class TokenizerConfig(ModelConfig):
    """Settings of a self-distilled tokenizer."""

    encoder: EncoderConfig = EncoderConfig()
    """Its encoder. Paper: the base size."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Its codebook."""
    window_frames: int = Field(default=992, ge=16)
    """Longer clips are labelled in windows of so many frames (10 ms), a multiple of `patch_size`. Paper: 10 s clips."""


class SelfDistilledTokenizer(nn.Module):
    """Encoder, projection to the code space, and a learned codebook."""

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or TokenizerConfig()
        size = self.config.encoder.patch_size
        if self.config.window_frames % size:
            raise ValueError(f"window_frames={self.config.window_frames} must be a multiple of patch_size={size}")
        width = self.config.encoder.width
        self.encoder = BeatsEncoder(self.config.encoder)
        self.to_code = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, self.config.quantizer.code_dim)
        )
        self.quantizer = CosineQuantizer(self.config.quantizer)

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor | None = None, num_real: int | None = None
    ) -> tuple[Quantized, Tensor]:
        """Returns the codes of all patches, flattened to (B x N, ...), and is_pad_BN. Arguments: `BeatsEncoder`'s."""
        encoded = self.encoder(fbank_BTF, num_frames_B, num_real=num_real)
        code_BND = self.to_code(encoded.features_BND)
        return self.quantizer(code_BND.flatten(0, 1), encoded.is_pad_BN.flatten()), encoded.is_pad_BN

    @torch.no_grad()
    def extract_labels(
        self, wave_BS: Tensor, padding_mask_BS: Tensor | None = None, compat: Compat = "exact"
    ) -> Tensor:
        """Returns labels_BN (int64, -1 at padding) of 16 kHz waveforms in [-1, 1]; long clips go in windows.

        compat="release" returns what the released tokenizers do: the labels of all clips in one row (B x N), clips of
        any length whole, padding treated as the release treats it and labelled too.
        Errors as for `BeatsEncoder.extract_features`; ValueError before the codebook was ever fitted.
        """
        if compat not in ("exact", "release"):
            raise ValueError(f"compat={compat!r} is unknown; use 'exact' or 'release'")
        if compat == "release":
            self._check_fitted()
            features_BND = self.encoder.encode_checked(wave_BS, padding_mask_BS, compat).features_BND
            return self.quantizer.labels(self.to_code(features_BND).flatten(0, 1))
        return self.label_fbank(*_front_end(wave_BS, padding_mask_BS))

    @torch.no_grad()
    def label_fbank(self, fbank_BTF: Tensor, num_frames_B: Tensor) -> Tensor:
        """The same of filterbanks as `compute_fbank` gives them, normalised by the statistics of its own encoder."""
        mean, std = self.config.encoder.fbank_mean, self.config.encoder.fbank_std
        return self.label_patches(normalise_fbank(fbank_BTF, mean, std, num_frames_B), num_frames_B)

    def _check_fitted(self) -> None:
        if self.quantizer.batches_fitted == 0:
            raise ValueError("the tokenizer's codebook was never fitted: train it, or load a trained one")

    @torch.no_grad()
    def label_patches(self, fbank_BTF: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """Returns labels_BN (int64, -1 at padding) of normalised filterbanks; long clips go in windows.

        Raises ValueError before the codebook was ever fitted.
        """
        self._check_fitted()
        batch, frames, bins = fbank_BTF.shape
        window, size = self.config.window_frames, self.config.encoder.patch_size
        if frames < window + size:
            return self._labels(fbank_BTF, num_frames_B)
        if num_frames_B is None:
            num_frames_B = torch.full((batch,), frames, device=fbank_BTF.device)
        num_windows = -(-frames // window)
        padded = F.pad(fbank_BTF, (0, 0, 0, num_windows * window - frames))
        start_W = torch.arange(num_windows, device=fbank_BTF.device) * window
        # A rest of under one patch after a full window is no window: a longer clip drops it, as a shorter one does.
        whole_B = num_frames_B.to(fbank_BTF.device)
        whole_B = torch.where(whole_B < size, whole_B, whole_B - whole_B % size)
        inside_BW = (whole_B.unsqueeze(1) - start_W).clamp(0, window)
        labels = self._labels(padded.reshape(-1, window, bins), inside_BW.flatten())
        return labels.reshape(batch, -1)[:, : (frames // size) * (bins // size)]

    def _labels(self, fbank_BTF: Tensor, num_frames_B: Tensor | None) -> Tensor:
        encoded = self.encoder(fbank_BTF, num_frames_B)
        labels_N = self.quantizer.labels(self.to_code(encoded.features_BND).flatten(0, 1))
        return labels_N.view_as(encoded.is_pad_BN).masked_fill(encoded.is_pad_BN, -1)


def _front_end(wave_BS: Tensor, padding_mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    return compute_fbank(wave_BS, check_waveform(wave_BS, padding_mask_BS))


class DistillationConfig(ModelConfig):
    """Settings of the training of a self-distilled tokenizer."""

    teacher_dim: int
    """Features of a teacher's patch, or classes of a supervised teacher."""
    num_layers: int = 3
    """Layers of the estimator. Paper: 3."""
    commitment_weight: float = 1.0
    """Weight of the commitment loss. Release: 1."""


class DistillationOutput(NamedTuple):
    """A loss to be divided by its number of targets, summed over all workers first."""

    loss_sum: Tensor
    num_targets: Tensor
    metrics: dict[str, Tensor]
    """Sums over targets: `cosine`, `commitment`; and `code_counts` (V)."""


class DistillationModel(nn.Module):
    """Tokenizer plus the estimator that guesses the teacher's output from the codes and is dropped in the end."""

    def __init__(self, tokenizer: SelfDistilledTokenizer, config: DistillationConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        encoder_config = tokenizer.config.encoder
        self.input_proj = nn.Linear(tokenizer.config.quantizer.code_dim, encoder_config.width)
        self.estimator = TransformerStack(encoder_config.model_copy(update={"num_layers": config.num_layers}))
        self.layer_norm = nn.LayerNorm(encoder_config.width)
        self.teacher_proj = nn.Linear(encoder_config.width, config.teacher_dim)

    def forward(
        self, fbank_BTF: Tensor, num_frames_B: Tensor | None, teacher: Tensor, num_real: int | None = None
    ) -> DistillationOutput:
        """Compares the estimate with the teacher's output by cosine, on real patches only.

        teacher: a feature vector or logits for each patch (B, N, D), or one vector of logits for each clip (B, D);
        then the estimates of a clip's patches are averaged, as a classifier averages their logits. A commitment term
        always counts once for each target: the mean over a clip's patches where targets are clips.
        num_real: see `BeatsEncoder.forward`.
        """
        quantized, is_pad_BN = self.tokenizer(fbank_BTF, num_frames_B, num_real)
        self._check_teacher(teacher, is_pad_BN)
        code_BND = quantized.vectors_ND.unflatten(0, is_pad_BN.shape)
        x_BND = self.input_proj(code_BND.to(self.input_proj.weight.dtype))
        bias = self.estimator.relative_bias(is_pad_BN.shape[1])
        hidden = None if num_frames_B is None else is_pad_BN
        x_BND = self.estimator.run_layers(x_BND, bias, hidden, num_real=num_real)[-1]
        estimate = self.teacher_proj(self.layer_norm(x_BND)).float()
        is_real = ~is_pad_BN
        num_patches = is_real.sum()
        if teacher.dim() == 2:
            weight_BN1 = is_real.unsqueeze(-1).float()
            estimate = (estimate * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1.0)
            is_real = is_real.any(dim=1)
        cosine = F.cosine_similarity(estimate, teacher.detach().float(), dim=-1)
        cosine_sum = torch.where(is_real, cosine, 0.0).sum()
        num_targets = is_real.sum()
        commitment_sum = quantized.commitment_sum * (num_targets / num_patches.clamp(min=1))
        loss_sum = self.config.commitment_weight * commitment_sum - cosine_sum
        metrics = {
            "cosine": cosine_sum.detach(),
            "commitment": commitment_sum.detach(),
            "code_counts": quantized.counts_V.detach(),
        }
        return DistillationOutput(loss_sum, num_targets, metrics)

    def _check_teacher(self, teacher: Tensor, is_pad_BN: Tensor) -> None:
        batch, patches = is_pad_BN.shape
        valid = ((batch, patches, self.config.teacher_dim), (batch, self.config.teacher_dim))
        if tuple(teacher.shape) not in valid:
            raise ValueError(
                f"the teacher's output has shape {tuple(teacher.shape)}; it must be {valid[0]} or {valid[1]}"
            )
