"""Augmentation on the training device: pure functions of tensors and an explicit generator.

Shapes: B clips, S samples, T frames, F mel bins, C classes.
"""

import torch
from torch import Tensor


def roll(wave_BS: Tensor, num_samples_B: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Each clip shifted in a circle by up to `max_shift` samples either way; padding stays where it is."""
    if not max_shift:
        return wave_BS
    batch, samples = wave_BS.shape
    shift_B1 = torch.randint(-max_shift, max_shift + 1, (batch, 1), generator=generator, device=wave_BS.device)
    place_BS = torch.arange(samples, device=wave_BS.device).expand(batch, -1)
    length_B1 = num_samples_B.unsqueeze(1).clamp(min=1)
    source_BS = torch.where(place_BS < length_B1, (place_BS - shift_B1) % length_B1, place_BS)
    return wave_BS.gather(1, source_BS)


def mixup(
    wave_BS: Tensor,
    num_samples_B: Tensor,
    targets_BC: Tensor,
    alpha: float,
    generator: torch.Generator,
    multi_label: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Waveform mixup with a partner of the same batch; returns waves, sample counts and targets.

    The share of each clip is drawn from Beta(alpha, alpha) and kept at 0.5 or more, so a clip leads its own mixture.
    Targets are mixed in the same shares; in multi-label data a class's target is the larger of the two shares.
    """
    batch = len(wave_BS)
    partner_B = torch.randperm(batch, generator=generator, device=wave_BS.device)
    gamma_B2 = torch._standard_gamma(torch.full((batch, 2), alpha, device=wave_BS.device), generator=generator)
    share_B = gamma_B2[:, 0] / gamma_B2.sum(1).clamp(min=1e-12)
    share_B1 = torch.maximum(share_B, 1.0 - share_B).unsqueeze(1)
    mixed_BS = share_B1 * wave_BS + (1.0 - share_B1) * wave_BS[partner_B]
    own_BC, other_BC = share_B1 * targets_BC, (1.0 - share_B1) * targets_BC[partner_B]
    mixed_BC = torch.maximum(own_BC, other_BC) if multi_label else own_BC + other_BC
    return mixed_BS, torch.maximum(num_samples_B, num_samples_B[partner_B]), mixed_BC


def mask_spectrogram(
    fbank_BTF: Tensor,
    num_frames_B: Tensor,
    time_fraction: float,
    freq_bins: int,
    generator: torch.Generator,
) -> Tensor:
    """SpecAugment's masks: one span of frames and one band of mel bins of each clip set to zero, the fbank's mean."""
    batch, frames, bins = fbank_BTF.shape
    device = fbank_BTF.device
    random_B4 = torch.rand(batch, 4, generator=generator, device=device)
    width_B = random_B4[:, 0] * time_fraction * num_frames_B
    start_B = random_B4[:, 1] * (num_frames_B - width_B)
    band_B = random_B4[:, 2] * freq_bins
    low_B = random_B4[:, 3] * (bins - band_B)
    frame_T, bin_F = torch.arange(frames, device=device), torch.arange(bins, device=device)
    in_time_BT = (frame_T >= start_B[:, None]) & (frame_T < (start_B + width_B)[:, None])
    in_band_BF = (bin_F >= low_B[:, None]) & (bin_F < (low_B + band_B)[:, None])
    return fbank_BTF.masked_fill(in_time_BT[:, :, None] | in_band_BF[:, None, :], 0.0)
