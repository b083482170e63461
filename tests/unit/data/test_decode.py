"""Decoding gives the same clip whatever the container, and every kind of bad file its reason."""

import io
import os
import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from beats_ray.data import decode_blocks, decode_ffmpeg
from beats_ray.data.decode import BadAudio, decode_clip
from beats_ray.data.flac import decode_flac, encode_flac
from tests.unit.data.broken_files import chunk, mp3_frame_end, wav

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
    monkeypatch.setattr(decode_blocks, "BLOCK_VALUES", 20_014)
    blocks = decode_clip(data, "x")
    assert whole.shape == blocks.shape
    assert np.abs(whole.astype(int) - blocks).max() <= 1


def test_flac_keeps_every_sample_and_is_deterministic() -> None:
    wave = np.random.default_rng(1).integers(-32768, 32768, 30_001).astype(np.int16)
    np.testing.assert_array_equal(decode_flac(encode_flac(wave), wave.size), wave)
    assert encode_flac(wave) == encode_flac(wave.copy())
    assert decode_flac(encode_flac(wave), wave.size).dtype == np.int16


def test_flac_that_is_not_what_the_shard_says_is_never_taken_for_it() -> None:
    wave = np.random.default_rng(1).integers(-32768, 32768, 30_001).astype(np.int16)
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([wave, wave], 1), 16_000, format="FLAC", subtype="PCM_16")
    for data, samples in ((stereo.getvalue(), 60_002), (b"fLaC", 1), (b"", 1)):
        with pytest.raises(ValueError, match="FLAC stream"):
            decode_flac(data, samples)
    assert decode_flac(encode_flac(wave)[:9_000], wave.size).size < wave.size
    assert decode_flac(encode_flac(wave), 30_000).size == 30_001


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


@pytest.mark.parametrize("limit_seconds", [0.0, 5.5])
def test_a_file_that_takes_too_long_is_given_up_between_two_blocks(
    monkeypatch: pytest.MonkeyPatch, limit_seconds: float
) -> None:
    data = _file(_tone(44_100), 44_100, "FLAC")
    monkeypatch.setattr(decode_blocks, "BLOCK_VALUES", 4_410)
    clock = iter(range(1000))
    monkeypatch.setattr(decode_blocks.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(BadAudio, match=f"clip.xyz: not decoded within {limit_seconds:g} s") as caught:
        decode_clip(data, "clip.xyz", timeout_seconds=limit_seconds)
    assert caught.value.reason == "timeout"
    assert next(clock) <= limit_seconds + 3  # one reading of the clock a block
    assert decode_clip(data, "clip.xyz", timeout_seconds=30.0).size == 32_000


def _peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_recording_of_two_hours_is_in_memory_once() -> None:
    data = io.BytesIO()
    with soundfile.SoundFile(data, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as sound:
        for _ in range(120):
            sound.write(np.zeros(60 * 8_000, np.int16))
    waves = []
    peak = _peak_bytes(lambda: waves.append(decode_clip(data.getvalue(), "x")))
    assert waves[0].size == 2 * 3600 * 16_000
    assert peak < 1.2 * waves[0].nbytes + 50 * 2**20


def test_many_channels_need_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wav(bytes(2 * 512 * 8_000), channels=512)
    monkeypatch.setattr(decode_blocks, "BLOCK_VALUES", 1 << 16)
    decode_clip(data, "x")  # what is imported and cached at the first call does not count
    assert _peak_bytes(lambda: decode_clip(data, "x")) < 2 * 2**20


def test_a_file_that_stands_for_weeks_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_blocks, "LONGEST_SECONDS", 1)
    assert _reason(_file(_tone(16_000), 16_000, "FLAC")) == "too-long"


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_file_that_does_not_tell_its_length_is_read_to_its_end(mode: str, rate_hz: int, channels: int) -> None:
    swelling = _tone(rate_hz, channels) * np.linspace(0, 1, int(SECONDS * rate_hz))[:, None]
    buffer = io.BytesIO()
    soundfile.write(buffer, swelling, rate_hz, format="MP3", bitrate_mode=mode, compression_level=0.5)
    told = buffer.getvalue()
    bare = told[mp3_frame_end(told) :]
    wave, expected = decode_clip(bare, "x"), decode_clip(told, "x")
    assert expected.size == 32_000
    assert abs(wave.size - 32_000) < 3 * 1152 * 16_000 / rate_hz
    loudest = np.abs(expected[-1600:]).max()
    assert np.abs(wave[-3 * 1152 - 1600 :]).max() > 0.9 * loudest  # the end is there
    assert decode_clip(bare + b"TAG" + bytes(125), "x").size == wave.size
    assert _reason(bare[:-1]) == "truncated"


def test_mp3_files_leave_the_error_stream_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    data = _file(_tone(44_100), 44_100, "MP3")
    decode_clip(data, "x")
    assert _reason(data[:1000] + bytes(2000)) in {"truncated", "damaged"}
    os.write(2, b"still here")
    assert capfd.readouterr() == ("", "still here")


@pytest.mark.parametrize("tail", [b"\xff\xf8", b"\xff", b"\x00"])
def test_telling_a_cut_flac_file_from_a_damaged_one_takes_no_time(tail: bytes) -> None:
    data = _file(_tone(16_000), 16_000, "FLAC")
    start = time.monotonic()
    assert _reason(data[: len(data) // 2] + tail * (1 << 16)) in {"truncated", "damaged"}
    assert time.monotonic() - start < 5


AAC = b"".join(b"\xff\xf1\x50\x80\x20\x1f\xfc" + random.Random(0).randbytes(249) for _ in range(20))
M4A = struct.pack(">I4s4s", 16, b"ftyp", b"M4A ") + bytes(4)
WMA = bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C") + bytes(1000)


@pytest.fixture
def no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_ffmpeg, "_torchcodec", lambda: None)


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_torchcodec: None) -> Callable[[str], Path]:
    """Puts a program `ffmpeg` on PATH; its code has the name of its input in `source` and `answer` to reply with."""

    def install(code: str) -> Path:
        program = tmp_path / "ffmpeg"
        start = f"#!{sys.executable} -ES\nimport sys, time\nsource = sys.argv[sys.argv.index('-i') + 1]\n"
        program.write_text(start + "answer = sys.stdout.buffer.write\n" + code)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    return install


@pytest.mark.parametrize(("data", "kind"), [(AAC, "AAC"), (M4A, "MP4"), (WMA, "WMA")])
def test_what_libsndfile_does_not_read_asks_for_ffmpeg(
    data: bytes, kind: str, no_torchcodec: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadAudio, match=f"^needs-ffmpeg: clip.wav is .*{kind}.*; install ffmpeg, or torchcodec$"):
        decode_clip(data, "clip.wav")


@pytest.mark.parametrize("data", [AAC, M4A, WMA])
def test_ffmpeg_decodes_what_libsndfile_does_not_read(data: bytes, fake_ffmpeg: Callable[[str], Path]) -> None:
    folder = fake_ffmpeg(
        "here = __file__.rsplit('/', 1)[0]\n"
        "assert open(source, 'rb').read() == open(here + '/input', 'rb').read()\n"
        "answer(open(here + '/output.wav', 'rb').read())\n"
    )
    stereo = _tone(44_100, 2) * [1.5, 0.5]
    answer = wav(
        stereo.astype("<f4").tobytes(),
        data_size=0xFFFFFFFF,
        riff_size=0xFFFFFFFF,
        tag=3,
        channels=2,
        rate_hz=44_100,
        bits=32,
        before=chunk(b"LIST", b"INFOISFT\x05\x00\x00\x00Lavf\x00\x00"),
    )
    (folder / "output.wav").write_bytes(answer)
    (folder / "input").write_bytes(data)
    wave = decode_clip(data, "x", timeout_seconds=60)
    assert wave.size == 32_000
    assert np.abs(wave[1600:-1600] - _tone(16_000)[1600:-1600, 0] * 32768).max() < 40


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        ("print('Invalid data', file=sys.stderr); sys.exit(1)", "damaged", "Invalid data"),
        ("pass", "damaged", "nothing"),
        ("answer(b'RIFF')", "damaged", "nothing"),
        ("answer(b'RIFF____WAVEfmt ' + bytes([40, 0, 0, 0]))", "damaged", "nothing"),
        ("answer(b'not a WAV file ' * 1000)", "damaged", "nothing"),
        ("answer(WAV); print('cut', file=sys.stderr); sys.exit(183)", "damaged", "cut"),
        ("answer(WAV[:46])", "too-short", ""),
        ("answer(WAV[:-4] + b'\\0\\0\\xc0\\x7f')", "non-finite", ""),
        ("answer(WAV[:24] + bytes(4) + WAV[28:])", "bad-sample-rate", "0 Hz"),
        ("answer(WAV[:22] + bytes(2) + WAV[24:])", "damaged", "nothing"),
    ],
)
def test_whatever_ffmpeg_answers_has_a_reason(
    code: str, reason: str, detail: str, fake_ffmpeg: Callable[[str], Path]
) -> None:
    data = wav(_tone(16_000).astype("<f4").tobytes()[:8000], tag=3, bits=32)
    fake_ffmpeg(f"WAV = {data!r}\n{code}\n")
    with pytest.raises(BadAudio, match=f"clip.m4a.*{detail}") as caught:
        decode_clip(M4A, "clip.m4a")
    assert caught.value.reason == reason


@pytest.mark.parametrize("code", ["", "answer(WAV); sys.stdout.flush()"])
def test_ffmpeg_is_stopped_at_the_time_limit(code: str, fake_ffmpeg: Callable[[str], Path]) -> None:
    data = wav(_tone(16_000).astype("<f4").tobytes()[:8000], tag=3, bits=32)
    folder = fake_ffmpeg(
        f"import os\nopen(__file__ + '.pid', 'w').write(str(os.getpid()))\nWAV = {data!r}\n{code}\ntime.sleep(60)\n"
    )
    start = time.monotonic()
    with pytest.raises(BadAudio, match=r"clip\.m4a: not decoded within 2 s") as caught:
        decode_clip(M4A, "clip.m4a", timeout_seconds=2.0)
    assert caught.value.reason == "timeout"
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "ffmpeg.pid").read_text()), 0)


@pytest.fixture
def fake_torchcodec(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A torchcodec that decodes everything to the attribute `samples`, and is asked for its length first."""
    import torch

    stereo = (_tone(44_100, 2) * [1.5, 0.5]).astype(np.float32)
    fake = SimpleNamespace(samples=torch.from_numpy(stereo.T), seconds=SECONDS, error="")

    class AudioDecoder:
        def __init__(self, data: bytes) -> None:
            if fake.error:
                raise RuntimeError(fake.error)
            self.metadata = SimpleNamespace(
                duration_seconds_from_header=fake.seconds, sample_rate=44_100, num_channels=2
            )

        def get_all_samples(self) -> SimpleNamespace:
            return SimpleNamespace(data=fake.samples, sample_rate=44_100)

    module = ModuleType("torchcodec.decoders")
    module.AudioDecoder = AudioDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setenv("PATH", "")
    decode_ffmpeg._torchcodec.cache_clear()
    monkeypatch.setattr(decode_blocks, "BLOCK_VALUES", 20_000)
    yield fake
    decode_ffmpeg._torchcodec.cache_clear()


@pytest.mark.parametrize("seconds", [SECONDS, None])
def test_torchcodec_decodes_what_libsndfile_does_not_read(
    fake_torchcodec: SimpleNamespace, seconds: float | None
) -> None:
    fake_torchcodec.seconds = seconds
    wave = decode_clip(M4A, "x")
    assert wave.size == 32_000
    assert np.abs(wave[1600:-1600] - _tone(16_000)[1600:-1600, 0] * 32768).max() < 40


def test_what_torchcodec_refuses_is_damaged(fake_torchcodec: SimpleNamespace) -> None:
    fake_torchcodec.error = "some lines\nInvalid data found"
    with pytest.raises(BadAudio, match=r"^damaged: clip\.m4a: torchcodec says: Invalid data found$"):
        decode_clip(M4A, "clip.m4a")


def test_a_recording_of_hours_is_left_to_ffmpeg_as_torchcodec_decodes_it_at_once(
    fake_torchcodec: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchcodec.seconds = 10 * 3600.0
    assert decode_clip(M4A, "x").size == 32_000  # no ffmpeg here
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho refused by ffmpeg >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadAudio, match="refused by ffmpeg"):
        decode_clip(M4A, "x")


def test_a_torchcodec_without_its_libraries_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise RuntimeError("Could not load libtorchcodec")

    decode_ffmpeg._torchcodec.cache_clear()
    monkeypatch.setattr(decode_ffmpeg.importlib, "import_module", fail)
    assert decode_ffmpeg._torchcodec() is None
    decode_ffmpeg._torchcodec.cache_clear()
