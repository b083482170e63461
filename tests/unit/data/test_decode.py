"""Decoding gives the same clip whatever the container, and every kind of bad file its reason."""

import io
import struct

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from beats_ray.data import decode
from beats_ray.data.decode import BadAudio, decode_clip, decode_flac, encode_flac

pytestmark = pytest.mark.unit

SECONDS = 2.0


def _tone(rate_hz: int, channels: int = 1, hertz: float = 440.0, amplitude: float = 0.5) -> NDArray[np.float64]:
    time = np.arange(int(SECONDS * rate_hz)) / rate_hz
    return np.repeat(amplitude * np.sin(2 * np.pi * hertz * time)[:, None], channels, axis=1)


def _file(wave: NDArray[np.float64], rate_hz: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def _reason(data: bytes) -> str:
    with pytest.raises(BadAudio) as caught:
        decode_clip(data, "clip.xyz")
    assert "clip.xyz" in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", None)])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_comes_out_as_the_same_tone(rate_hz: int, kind: str, subtype: str | None, channels: int) -> None:
    wave = decode_clip(_file(_tone(rate_hz, channels), rate_hz, kind, subtype), "x")
    assert wave.dtype == np.int16
    assert wave.shape == (int(SECONDS * 16_000),)
    expected = _tone(16_000)[:, 0] * 32768
    middle = slice(1600, -1600)  # filters and lossy codecs ring at the ends
    assert np.abs(wave[middle] - expected[middle]).max() < (1500 if kind == "OGG" else 40)


def test_16_khz_mono_int16_is_untouched() -> None:
    wave = np.random.default_rng(0).integers(-32768, 32768, 20_000).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="WAV", subtype="PCM_16")
    np.testing.assert_array_equal(decode_clip(buffer.getvalue(), "x"), wave)


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(16_000, 0.5), np.full(16_000, -0.25)], axis=1)
    assert set(decode_clip(_file(stereo, 16_000, "WAV", "FLOAT"), "x")) == {4096}


def test_what_is_beyond_full_scale_is_clipped() -> None:
    loud = np.array([[3.0], [-3.0]] * 8_000)
    assert set(decode_clip(_file(loud, 16_000, "WAV", "FLOAT"), "x")) == {32767, -32768}


def test_nothing_above_half_the_target_rate_folds_down() -> None:
    wave = decode_clip(_file(_tone(48_000, hertz=11_000.0), 48_000, "WAV"), "x")
    assert np.abs(wave[1600:-1600]).max() < 4


def test_reading_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(size=(88_200, 2)) * 0.2
    data = _file(noise, 44_100, "FLAC")
    whole = decode_clip(data, "x")
    monkeypatch.setattr(decode, "BLOCK_FRAMES", 10_007)
    blocks = decode_clip(data, "x")
    assert whole.shape == blocks.shape
    assert np.abs(whole.astype(int) - blocks).max() <= 1


def test_flac_keeps_every_sample_and_is_deterministic() -> None:
    wave = np.random.default_rng(1).integers(-32768, 32768, 30_001).astype(np.int16)
    np.testing.assert_array_equal(decode_flac(encode_flac(wave)), wave)
    assert encode_flac(wave) == encode_flac(wave.copy())
    assert decode_flac(encode_flac(wave)).dtype == np.int16


def test_empty_and_foreign_files() -> None:
    assert _reason(b"") == "empty-file"
    assert _reason(b"This is a text file that somebody renamed.\n" * 100) == "not-audio"
    assert _reason(b"RIFF") == "not-audio"
    assert _reason(bytes(10_000)) == "not-audio"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_no_samples_or_too_few(kind: str) -> None:
    expected = "empty-file" if kind == "FLAC" else "zero-length"  # libsndfile writes no FLAC without samples
    assert _reason(_file(np.zeros((0, 1)), 44_100, kind)) == expected
    assert _reason(_file(np.zeros((1000, 1)), 44_100, kind)) == "too-short"  # 22.7 ms


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, -1])
def test_a_file_that_was_cut_is_truncated(kind: str, kept: float, channels: int) -> None:
    noise = np.random.default_rng(0).normal(size=(88_200, channels)) * 0.2
    data = _file(noise, 44_100, kind)
    size = int(len(data) * kept) if kept > 0 else len(data) - 1
    assert decode_clip(data, "x").size == 32_000
    assert _reason(data[:size]) == "truncated"


def test_an_ogg_file_that_was_cut_between_two_pages_is_truncated() -> None:
    data = _file(np.random.default_rng(0).normal(size=(88_200, 1)) * 0.2, 44_100, "OGG")
    assert _reason(data[: data.rindex(b"OggS")]) == "truncated"


def test_a_flac_file_with_broken_bytes_inside_is_damaged() -> None:
    data = bytearray(_file(np.random.default_rng(0).normal(size=(88_200, 1)) * 0.2, 44_100, "FLAC"))
    data[len(data) // 2] ^= 0xFF
    assert _reason(bytes(data)) == "damaged"


def test_a_flac_file_of_unknown_length_is_told_from_a_cut_one() -> None:
    data = bytearray(_file(_tone(16_000), 16_000, "FLAC"))
    data[21] &= 0xF0  # the 36 bits of the header that count the samples
    data[22:26] = bytes(4)
    assert _reason(bytes(data)) == "unknown-length"


def test_a_wav_of_unknown_size_from_a_pipe_is_read_whole() -> None:
    data = bytearray(_file(_tone(16_000), 16_000, "WAV"))
    place = data.index(b"data") + 4
    struct.pack_into("<I", data, place, 0xFFFFFFFF)
    assert decode_clip(bytes(data), "x").size == 32_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    wave = _tone(44_100, 2)
    wave[60_000, 1] = value
    assert _reason(_file(wave, 44_100, "WAV", "FLOAT")) == "non-finite"


@pytest.mark.parametrize("rate_hz", [0, 10, 4_000_000])
def test_a_sample_rate_that_no_recorder_has(rate_hz: int) -> None:
    data = bytearray(_file(_tone(16_000), 16_000, "WAV"))
    struct.pack_into("<I", data, 24, rate_hz)
    assert _reason(bytes(data)) in ({"bad-sample-rate"} if rate_hz else {"bad-sample-rate", "not-audio"})
