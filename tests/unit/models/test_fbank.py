"""The filterbank against torchaudio's port of Kaldi, on audio and on the inputs that break naive versions."""

import pytest
import torch
from torch import Tensor
from torchaudio.compliance import kaldi  # type: ignore[import-untyped]

from beats_ray.models import compute_fbank, normalise_fbank, num_frames, num_patches
from beats_ray.models.fbank import num_patch_rows

pytestmark = pytest.mark.unit


def kaldi_fbank(wave_S: Tensor) -> Tensor:
    scaled = wave_S.float() if wave_S.dtype == torch.int16 else wave_S * 2**15
    return kaldi.fbank(
        scaled[None], num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10, dither=0.0
    )


def signals() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    second = torch.arange(16_000) / 16_000
    click = torch.zeros(16_000)
    click[5000] = 1.0
    noise = torch.randn(16_000, generator=generator)
    speechlike = (second * 2 * torch.pi * 180).sin() * (1 + (second * 2 * torch.pi * 4).sin()) * 0.2 + 0.01 * noise
    return {
        "noise": noise * 0.1,
        "harmonic": speechlike,
        "silence": torch.zeros(16_000),
        "one_bit": torch.randint(-1, 2, (16_000,), generator=generator) / 2**15,
        "click": click,
        "dc": torch.full((16_000,), 0.5),
        "odd_dc": torch.full((16_000,), 12345 / 2**15),
        "full_scale": (second * 2 * torch.pi * 440).sin().sign() * (32767 / 2**15),
        "tenth_second": noise[:1600] * 0.1,
        "one_frame": noise[:400] * 0.1,
    }


@pytest.mark.parametrize("name", signals())
@pytest.mark.parametrize("as_int16", [False, True])
def test_log_mel_equals_kaldis_within_a_thousandth(name: str, as_int16: bool) -> None:
    wave = signals()[name]
    if as_int16:
        wave = (wave * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    fbank, frames = compute_fbank(wave[None])
    expected = kaldi_fbank(wave)
    assert fbank.dtype == torch.float32
    assert frames.tolist() == [len(expected)]
    assert fbank.shape[1:] == expected.shape
    assert (fbank[0] - expected).abs().max() < 1e-3


def test_a_batch_of_unequal_clips_equals_the_clips_alone_and_is_zero_past_their_ends() -> None:
    lengths = [16_000, 9999, 400, 399, 5360]
    wave = torch.randn(5, 16_000, generator=torch.Generator().manual_seed(0))
    fbank, frames = compute_fbank(wave * 0.1, torch.tensor(lengths))
    assert frames.dtype == torch.int64
    for clip, length in enumerate(lengths):
        count = num_frames(length)
        assert frames[clip] == count
        assert (fbank[clip, count:] == 0).all()
        if count:
            alone, _ = compute_fbank(wave[clip : clip + 1, :length] * 0.1)
            torch.testing.assert_close(fbank[clip, :count], alone[0], atol=1e-5, rtol=0)
    normalised = normalise_fbank(fbank, num_frames_B=frames)
    assert (normalised[3] == 0).all()
    assert normalised[0].abs().min() > 0


def test_half_precision_autocast_leaves_the_filterbank_in_fp32() -> None:
    wave = torch.randn(1, 16_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = compute_fbank(wave)
    assert torch.equal(inside, compute_fbank(wave)[0])


@pytest.mark.parametrize(
    ("samples", "frames", "patches"),
    [(160_000, 998, 496), (80_000, 498, 248), (400, 1, 8), (399, 0, 0), (0, 0, 0), (2959, 16, 8), (5359, 31, 8)],
)
def test_counts_are_those_of_the_paper(samples: int, frames: int, patches: int) -> None:
    assert num_frames(samples) == frames
    assert num_patches(samples) == patches
    counts = torch.tensor([samples])
    assert num_frames(counts).tolist() == [frames]
    assert num_patches(counts).tolist() == [patches]


def test_a_clip_under_one_patch_row_keeps_one_and_a_rest_is_dropped() -> None:
    assert [num_patch_rows(frames) for frames in (0, 1, 15, 16, 31, 32)] == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("wave", "count", "word"),
    [
        (torch.zeros(16_000), None, "shape"),
        (torch.zeros(1, 1, 16_000), None, "shape"),
        (torch.zeros(1, 16_000, dtype=torch.int32), None, "int32"),
        (torch.zeros(2, 16_000), torch.tensor([16_000]), "num_samples"),
        (torch.zeros(1, 16_000), torch.tensor([1.0]), "num_samples"),
    ],
)
def test_a_wave_of_the_wrong_kind_is_refused_by_name(wave: Tensor, count: Tensor | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        compute_fbank(wave, count)
