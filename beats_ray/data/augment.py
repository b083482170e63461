"""Augmentation on the training device: pure functions of tensors and an explicit generator.

Shapes: B clips, S samples, T frames, F mel bins, C classes, M masks; L samples or frames.
"""

from typing import NamedTuple

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


def change_gain(wave_BS: Tensor, max_db: float, generator: torch.Generator) -> Tensor:
    """Each clip louder or softer by one factor, drawn evenly in decibels up to `max_db` either way; never clipped."""
    if not max_db:
        return wave_BS
    gain_B1 = 2.0 * torch.rand(len(wave_BS), 1, generator=generator, device=wave_BS.device) - 1.0
    return wave_BS * 10.0 ** (gain_B1 * max_db / 20.0)


class Mixture(NamedTuple):
    """What mixup mixes: each clip with a partner of the same batch."""

    partner_B: Tensor
    share_B: Tensor
    """The clip's own share, from 0.5 to 1; 1 leaves it as it is. The rest is the partner's."""


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """The generator itself where it draws on the CPU, else one there of the same seed."""
    return generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())


def draw_mixture(batch: int, alpha: float, probability: float, generator: torch.Generator) -> Mixture:
    """Draws partners and shares (mixup, arXiv 1710.09412).

    The share of each clip comes from Beta(alpha, alpha) and is kept at 0.5 or more, so a clip leads its own mixture.
    With a probability below 1 the other clips keep a share of 1.
    """
    device = generator.device
    partner_B = torch.randperm(batch, generator=generator, device=device)
    gamma_B2 = torch._standard_gamma(torch.full((batch, 2), alpha, device=device), generator=generator)
    share_B = gamma_B2[:, 0] / gamma_B2.sum(1).clamp(min=1e-12)
    share_B = torch.maximum(share_B, 1.0 - share_B)
    if probability < 1.0:
        is_mixed_B = torch.rand(batch, generator=generator, device=device) < probability
        share_B = torch.where(is_mixed_B, share_B, 1.0)
    return Mixture(partner_B, share_B)


def mix(values: Tensor, length_B: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Returns mixed waveforms (B, S) or filterbanks (B, T, F), and their lengths.

    length_B: samples or frames of each clip. A mixture is as long as the longer of its two clips; past the end of one
    stands a zero: silence in a waveform, the mean in a normalised filterbank. A clip whose share is 1 stays as it is.
    """
    place_L = torch.arange(values.shape[1], device=values.device)
    is_past_BL = place_L >= length_B.unsqueeze(1)
    values = values.masked_fill(is_past_BL.view(*is_past_BL.shape, *[1] * (values.dim() - 2)), 0.0)
    share = mixture.share_B.view(-1, *[1] * (values.dim() - 1))
    mixed = share * values + (1.0 - share) * values[mixture.partner_B]
    return mixed, mixed_lengths(length_B, mixture)


def mixed_lengths(length_B: Tensor, mixture: Mixture) -> Tensor:
    """The lengths of mixed clips, in what the clips' are in."""
    longer_B = torch.maximum(length_B, length_B[mixture.partner_B])
    return torch.where(mixture.share_B < 1.0, longer_B, length_B)


def mix_targets(targets_BC: Tensor, mixture: Mixture) -> Tensor:
    """Targets in the shares of their clips, for cross-entropy and binary cross-entropy alike.

    One class a clip: they sum to 1. Several: a class that both clips have keeps 1.
    """
    share_B1 = mixture.share_B.unsqueeze(1)
    return share_B1 * targets_BC + (1.0 - share_B1) * targets_BC[mixture.partner_B]


def mask_spectrogram(
    fbank_BTF: Tensor,
    num_frames_B: Tensor,
    time_masks: tuple[int, float],
    freq_masks: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """SpecAugment's masks: spans of frames and bands of mel bins of each clip set to zero, the fbank's mean.

    time_masks: how many, and the longest as a fraction of the clip. freq_masks: how many, and the widest, mel bins.
    Width and place of each are drawn evenly (arXiv 1904.08779, section 2, without its time warp).
    """
    batch, frames, bins = fbank_BTF.shape
    device = fbank_BTF.device
    (num_times, fraction), (num_bands, widest) = time_masks, freq_masks
    random_BM2 = torch.rand(batch, num_times + num_bands, 2, generator=generator, device=device)
    time_BM2, band_BM2 = random_BM2.split((num_times, num_bands), dim=1)
    in_time_BT = _inside(time_BM2, num_frames_B.unsqueeze(1), fraction * num_frames_B.unsqueeze(1), frames)
    full_B1 = torch.full((batch, 1), bins, device=device)
    in_band_BF = _inside(band_BM2, full_B1, torch.full_like(full_B1, widest), bins)
    return fbank_BTF.masked_fill(in_time_BT[:, :, None] | in_band_BF[:, None, :], 0.0)


def _inside(random_BM2: Tensor, length_B1: Tensor, longest_B1: Tensor, places: int) -> Tensor:
    """Which places (B, L) lie in any of the spans that the random numbers choose within a clip's length."""
    width_BM = random_BM2[..., 0] * longest_B1
    start_BM = random_BM2[..., 1] * (length_B1 - width_BM)
    place_L = torch.arange(places, device=random_BM2.device)
    inside_BML = (place_L >= start_BM[..., None]) & (place_L < (start_BM + width_BM)[..., None])
    return inside_BML.any(dim=1)
