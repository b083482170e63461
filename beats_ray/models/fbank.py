"""Log-mel filterbank of a batch of clips on the device of the waveform, compatible with Kaldi's.

Shapes: B clips, S samples, T frames, F mel bins.
Source: paper section 4.1 and the released front end (Kaldi fbank: 25 ms Povey window, 10 ms shift, no dither).
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks  # type: ignore[import-untyped]

from beats_ray.models.config import FBANK_MEAN, FBANK_STD, NUM_MEL_BINS, PATCH_SIZE, SAMPLE_RATE_HZ

FRAME_SAMPLES = 400  # 25 ms
SHIFT_SAMPLES = 160  # 10 ms
FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0  # Kaldi's default
POWER_FLOOR = torch.finfo(torch.float32).eps  # Kaldi's, below which a bin counts as silence
INT16_SCALE = 2.0**15
CPU_BLOCK_FRAMES = 512  # 1 MiB of frames
LOUDEST = 2.0**40  # far beyond any audio; keeps the power of absurd samples finite in fp32

CountT = TypeVar("CountT", int, Tensor)


def num_frames(num_samples: CountT) -> CountT:
    """Frames of a clip: only windows that lie wholly inside it count; 0 for under 400 samples (25 ms)."""
    frames: Any = (num_samples - FRAME_SAMPLES) // SHIFT_SAMPLES + 1
    whole: Any = frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)
    return whole


def num_patch_rows(frames: CountT, patch_size: int = PATCH_SIZE) -> CountT:
    """Time steps of the patch grid: a rest under one patch is dropped, but a clip of 1-15 frames keeps one row."""
    if isinstance(frames, Tensor):
        return torch.maximum(frames // patch_size, (frames > 0).to(frames.dtype))
    return max(frames // patch_size, int(frames > 0))


def num_patches(num_samples: CountT) -> CountT:
    """Patches of a clip of so many samples at 16 kHz: 496 for 10 s, 248 for 5 s, 0 for under 25 ms."""
    rows: Any = num_patch_rows(num_frames(num_samples))
    return rows * (NUM_MEL_BINS // PATCH_SIZE)


def compute_fbank(
    wave_BS: Tensor, num_samples_B: Tensor | None = None, num_mel_bins: int = NUM_MEL_BINS
) -> tuple[Tensor, Tensor]:
    """Computes the log-mel filterbank of every clip as Kaldi would for that clip alone.

    wave_BS: 16 kHz, int16, or float in [-1, 1]. num_samples_B: samples of each clip before its padding; all of S
    where None. Runs in fp32 inside autocast too, without gradient.

    Returns fbank_BTF (float32; frames past a clip's end are 0, as `normalise_fbank` keeps them) and num_frames_B
    (int64; 0 for a clip under 400 samples, of which nothing is left). T is at least 1. Every value is finite unless a
    sample is NaN.
    Raises ValueError for a wrong rank, dtype or shape.
    """
    _check_wave(wave_BS, num_samples_B)
    batch, samples = wave_BS.shape
    if num_samples_B is None:
        frames_B = torch.full((batch,), num_frames(samples), dtype=torch.int64, device=wave_BS.device)
    else:
        frames_B = num_frames(num_samples_B.to(wave_BS.device, torch.int64).clamp(max=samples))
    with torch.no_grad(), torch.autocast(wave_BS.device.type, enabled=False):
        scaled_BS = wave_BS.float() if wave_BS.dtype == torch.int16 else wave_BS.float() * INT16_SCALE
        scaled_BS = scaled_BS.clamp(-LOUDEST, LOUDEST)
        if samples < FRAME_SAMPLES:
            scaled_BS = torch.nn.functional.pad(scaled_BS, (0, FRAME_SAMPLES - samples))
        fbank_BTF = _log_mel(scaled_BS, num_mel_bins)
        if num_samples_B is not None or samples < FRAME_SAMPLES:
            fbank_BTF = zero_past_end(fbank_BTF, frames_B)
    return fbank_BTF, frames_B


def normalise_fbank(
    fbank_BTF: Tensor, mean: float = FBANK_MEAN, std: float = FBANK_STD, num_frames_B: Tensor | None = None
) -> Tensor:
    """Returns (fbank - mean) / (2 std), as the release does; with `num_frames_B`, frames past a clip's end are 0."""
    normalised_BTF = (fbank_BTF.float() - mean) / (2.0 * std)
    return normalised_BTF if num_frames_B is None else zero_past_end(normalised_BTF, num_frames_B)


def zero_past_end(fbank_BTF: Tensor, num_frames_B: Tensor) -> Tensor:
    """Returns the features with every frame at or after a clip's end set to 0."""
    frame_T = torch.arange(fbank_BTF.shape[1], device=fbank_BTF.device)
    past_end_BT = frame_T >= num_frames_B.to(fbank_BTF.device).unsqueeze(1)
    return fbank_BTF.masked_fill(past_end_BT.unsqueeze(-1), 0.0)


def _log_mel(scaled_BS: Tensor, num_mel_bins: int) -> Tensor:
    frames_BTL = scaled_BS.unfold(-1, FRAME_SAMPLES, SHIFT_SAMPLES)
    if scaled_BS.device.type != "cpu" or torch.compiler.is_compiling():
        return _log_mel_of_frames(frames_BTL, num_mel_bins)
    # A batch has tens of megabytes of frames, several times over: on a CPU the time goes into moving them, so a stretch
    # of all clips that fits the cache is taken through all operations before the next one.
    stretch = max(1, CPU_BLOCK_FRAMES // len(scaled_BS)) if len(scaled_BS) else 1
    fbank_BTF = scaled_BS.new_empty(*frames_BTL.shape[:2], num_mel_bins)
    for start in range(0, frames_BTL.shape[1], stretch):
        part = slice(start, start + stretch)
        fbank_BTF[:, part] = _log_mel_of_frames(frames_BTL[:, part], num_mel_bins)
    return fbank_BTF


def _log_mel_of_frames(frames_BTL: Tensor, num_mel_bins: int) -> Tensor:
    # Kaldi's operations in Kaldi's order, so that rounding on silence, clicks and DC is Kaldi's too.
    device = frames_BTL.device
    frames_BTL = frames_BTL - frames_BTL.mean(dim=-1, keepdim=True)
    padded_BTL = frames_BTL.new_zeros(*frames_BTL.shape[:2], FFT_SAMPLES)
    padded_BTL[..., :1] = frames_BTL[..., :1] * -PREEMPHASIS
    torch.mul(frames_BTL[..., :-1], -PREEMPHASIS, out=padded_BTL[..., 1:FRAME_SAMPLES])
    padded_BTL[..., :FRAME_SAMPLES].add_(frames_BTL).mul_(_constant("window", 0, device))
    spectrum_BTK = torch.fft.rfft(padded_BTL)
    power_BTK = spectrum_BTK.real.square().addcmul_(spectrum_BTK.imag, spectrum_BTK.imag)
    energy_BTF = power_BTK @ _constant("mel", num_mel_bins, device)
    return energy_BTF.clamp_(min=POWER_FLOOR).log_()


_CONSTANTS: dict[tuple[str, int, torch.device], Tensor] = {}


def _constant(name: str, num_mel_bins: int, device: torch.device) -> Tensor:
    key = (name, num_mel_bins, device)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = (_povey_window() if name == "window" else _mel_filters_KF(num_mel_bins)).to(device)
    return _CONSTANTS[key]


def _povey_window() -> Tensor:
    return torch.hann_window(FRAME_SAMPLES, periodic=False).pow(0.85)


def _mel_filters_KF(num_mel_bins: int) -> Tensor:
    filters_FK, _ = get_mel_banks(num_mel_bins, FFT_SAMPLES, float(SAMPLE_RATE_HZ), LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)
    return torch.nn.functional.pad(filters_FK, (0, 1)).t().contiguous()  # the Nyquist bin has weight 0


def _check_wave(wave_BS: Tensor, num_samples_B: Tensor | None) -> None:
    if wave_BS.dim() != 2:
        raise ValueError(
            f"wave has shape {tuple(wave_BS.shape)}; it must be (clips, samples): use wave[None] for one clip"
        )
    if wave_BS.dtype != torch.int16 and not wave_BS.is_floating_point():
        raise ValueError(f"wave has dtype {wave_BS.dtype}; it must be int16, or float in [-1, 1]")
    if num_samples_B is None:
        return
    if num_samples_B.shape != wave_BS.shape[:1] or num_samples_B.is_floating_point():
        raise ValueError(
            f"num_samples has shape {tuple(num_samples_B.shape)} and dtype {num_samples_B.dtype}; "
            f"it must be ({wave_BS.shape[0]},) integers, one for each clip"
        )
