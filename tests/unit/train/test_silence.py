"""Silent patches are judged apart: they flatter every prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from beats_ray.models import compute_fbank, normalise_fbank
from beats_ray.models.patches import silent_patches

pytestmark = pytest.mark.unit


def fbank_of(wave_BS: torch.Tensor) -> torch.Tensor:
    fbank_BTF, num_frames_B = compute_fbank(wave_BS, torch.tensor([wave_BS.shape[1]] * len(wave_BS)))
    return normalise_fbank(fbank_BTF, 15.4, 6.5, num_frames_B)


def test_only_patches_of_digital_silence_are_silent() -> None:
    wave_BS = 1e-3 * torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0))
    wave_BS[1, 16_000:] = 0.0
    is_silent_BRC = silent_patches(fbank_of(wave_BS)).unflatten(1, (-1, 8))
    assert not is_silent_BRC[0].any(), "quiet noise is no silence"
    assert not is_silent_BRC[1, :6].any()
    assert is_silent_BRC[1, 7:].all(), "the patch that the sound ends in may be either"


def last_report(folder: Path) -> dict[str, float]:
    report: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return report


def test_losses_of_sounding_patches_leave_silence_out(
    tmp_path: Path, pretraining, synthetic_batches, monkeypatch
) -> None:
    pretraining.run(tmp_path / "noise", steps=2, warmup_steps=0)
    noise = last_report(tmp_path / "noise")
    assert noise["train/silent_fraction"] == 0.0
    assert noise["train/sounding_loss"] == pytest.approx(noise["train/loss"], rel=1e-5)
    assert noise["train/sounding_clip_band_loss"] == pytest.approx(noise["train/clip_band_loss"], rel=1e-5)

    def with_silence(self, positions: np.ndarray):
        batch = make(self, positions)
        for row, length in enumerate(batch.num_samples_B.tolist()):
            batch.audio_BS[row, length // 2 :] = 0
        return batch

    make = synthetic_batches._batch
    monkeypatch.setattr(synthetic_batches, "_batch", with_silence)
    pretraining.run(tmp_path / "half", steps=2, warmup_steps=0)
    half = last_report(tmp_path / "half")
    assert 0.1 < half["train/silent_fraction"] < 0.6
    assert half["train/sounding_clip_band_loss"] > half["train/clip_band_loss"], "silence is easy to guess"
    shares = half["train/silent_fraction"], 1 - half["train/silent_fraction"]
    assert half["train/sounding_loss"] * shares[1] < half["train/loss"], "the rest is what silent patches cost"
