"""Audio files of any common kind to 16 kHz, mono, int16, and back to FLAC, the form that shards hold.

wave = decode_clip(path.read_bytes(), path.name)      # BadAudio tells why a file cannot be used
assert (decode_flac(encode_flac(wave)) == wave).all()
"""

import io
import struct
from typing import Protocol

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from beats_ray.data.manifest import SAMPLE_RATE_HZ

MIN_SAMPLES = 400  # 25 ms: a shorter clip has not a single filterbank frame
LOWEST_RATE_HZ = 1_000
HIGHEST_RATE_HZ = 768_000
MOST_FRAMES = 1 << 40
BLOCK_FRAMES = 1 << 20  # a recording of hours is never in memory at its full rate
UNKNOWN_SIZE = 0xFFFFFFFF  # what programs that write a WAV to a pipe put in its header
FLAC_TAIL_BYTES = 1 << 16  # more than any frame of 16 bit stereo
OGG_LAST_PAGE = 0x04  # header flag of a stream's last page

WaveInt16 = NDArray[np.int16]


class BadAudio(ValueError):
    """A file that cannot be used: `reason` is a short code, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[str, str]]:
        return BadAudio, (self.reason, self.detail)


def decode_clip(data: bytes, name: str) -> WaveInt16:
    """The whole recording at 16 kHz, channels averaged, values beyond full scale clipped.

    `name` only serves messages. Raises BadAudio with one of the reasons empty-file, not-audio, bad-sample-rate,
    zero-length, unknown-length, too-short, truncated, damaged, non-finite.
    """
    if not data:
        raise BadAudio("empty-file", f"{name} has 0 bytes")
    try:
        sound = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise BadAudio("not-audio", f"{name}: {error.error_string}") from None
    with sound:
        if not LOWEST_RATE_HZ <= sound.samplerate <= HIGHEST_RATE_HZ:
            raise BadAudio("bad-sample-rate", f"{name}: {sound.samplerate} Hz")
        _check_container(data, name)
        if sound.frames <= 0:
            raise BadAudio("zero-length", f"{name} holds no samples")
        if sound.frames > MOST_FRAMES:  # libsndfile's way of saying so; reading such a file fails at its end
            raise BadAudio("unknown-length", f"{name}: its header does not say how long it is; encode it again")
        wave = _read_at_target_rate(sound, data, name)
    if wave.size < MIN_SAMPLES:
        raise BadAudio("too-short", f"{name}: {wave.size / SAMPLE_RATE_HZ * 1000:.1f} ms, less than one 25 ms frame")
    return wave


def encode_flac(wave: WaveInt16) -> bytes:
    """The waveform as FLAC, 16 kHz, mono, 16 bit; the same samples give the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: bytes) -> WaveInt16:
    """The exact samples that `encode_flac` was given."""
    wave: WaveInt16 = soundfile.read(io.BytesIO(data), dtype="int16")[0]
    return wave


class _Resampler(Protocol):
    def resample_chunk(self, x: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]: ...


class _NoResampler:
    def resample_chunk(self, x: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:  # noqa: ARG002
        return x


def _read_at_target_rate(sound: soundfile.SoundFile, data: bytes, name: str) -> WaveInt16:
    resampler: _Resampler = _NoResampler()
    if sound.samplerate != SAMPLE_RATE_HZ:
        resampler = soxr.ResampleStream(sound.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    promised, done, parts = sound.frames, 0, []
    while done < promised:
        try:
            block = sound.read(min(BLOCK_FRAMES, promised - done), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            is_cut = sound.format == "FLAC" and not _ends_with_whole_flac_frame(data)
            detail = f"{name}: {error.error_string.strip().rstrip('.')}, {promised} frames were promised"
            raise BadAudio("truncated" if is_cut else "damaged", detail) from None
        if not len(block):
            raise BadAudio("truncated", f"{name} ends after {done} of {promised} frames")
        done += len(block)
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise BadAudio("non-finite", f"{name} has NaN or infinite samples")
        parts.append(_to_int16(resampler.resample_chunk(mono, last=done >= promised)))
    return np.concatenate(parts)


def _to_int16(wave: NDArray[np.float32]) -> WaveInt16:
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def _check_container(data: bytes, name: str) -> None:
    """Finds files that end early where libsndfile would return the part that is there without a word."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        position = 12
        while position + 8 <= len(data):
            kind, size = struct.unpack_from("<4sI", data, position)
            if kind == b"data":
                present = len(data) - position - 8
                if size != UNKNOWN_SIZE and size > present:
                    raise BadAudio("truncated", f"{name}: {present} of {size} bytes of audio are there")
                return
            position += 8 + size + size % 2
    elif data[:4] == b"FORM":
        size = struct.unpack_from(">I", data, 4)[0]
        if size > len(data) - 8:
            raise BadAudio("truncated", f"{name}: {len(data) - 8} of {size} bytes are there")
    elif data[:4] == b"OggS" and not _ends_with_last_ogg_page(data):
        raise BadAudio("truncated", f"{name} ends before the last page of its Ogg stream")


def _ends_with_last_ogg_page(data: bytes) -> bool:
    """Whether the last page is whole and carries the mark of a stream's end."""
    start = data.rfind(b"OggS")
    if start + 27 > len(data):
        return False
    sizes = data[start + 27 : start + 27 + data[start + 26]]
    is_whole = len(sizes) == data[start + 26] and start + 27 + len(sizes) + sum(sizes) <= len(data)
    return is_whole and bool(data[start + 5] & OGG_LAST_PAGE)


def _ends_with_whole_flac_frame(data: bytes) -> bool:
    """Whether the checksum of the last frame is right: tells a damaged file from one that was cut."""
    position = len(data)
    while (position := data.rfind(b"\xff", 0, position)) >= max(0, len(data) - FLAC_TAIL_BYTES):
        if data[position + 1 : position + 2] in (b"\xf8", b"\xf9") and _crc16(data[position:]) == 0:
            return True
    return False


def _crc16(data: bytes) -> int:
    """FLAC's frame checksum: polynomial 0x8005, most significant bit first, start 0."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ (0x18005 if crc & 0x8000 else 0)
    return crc
