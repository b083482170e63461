"""Audio files of any common kind to 16 kHz, mono, int16.

wave = decode_clip(path.read_bytes(), path.name)  # BadAudio tells why a file cannot be used

libsndfile reads WAV, FLAC, Ogg, MP3, AIFF, AU, CAF and their like; AAC, WMA, WebM and others are left to torchcodec or
to an `ffmpeg` program, whichever is there.
"""

import importlib
import io
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import IO, Any, Literal, Protocol

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from beats_ray.data.flac import WaveInt16
from beats_ray.data.plan import SAMPLE_RATE_HZ

MIN_SAMPLES = 400  # 25 ms: a shorter clip has not a single filterbank frame
LOWEST_RATE_HZ = 1_000
HIGHEST_RATE_HZ = 768_000
LONGEST_SECONDS = 24 * 3600  # a FLAC file of a few MB can stand for weeks of silence
MOST_FRAMES = 1 << 40
BLOCK_VALUES = 1 << 20  # of all channels: a recording of hours is never in memory at its full rate
LOUDEST = 2.0**31  # times full scale; the resampler makes silence of what is much louder
UNKNOWN_SIZE = 0xFFFFFFFF  # what programs that write a WAV to a pipe put in its header
FLAC_TAIL_BYTES = 1 << 16  # more than any frame of 16 bit stereo
OGG_LAST_PAGE = 0x04  # header flag of a stream's last page
MP3_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG-1
MP3_KBPS_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
MP3_RATES_HZ = (44_100, 48_000, 32_000)  # MPEG-1
MP3_LOST_BYTES = 1024  # so far libmpg123 looks for the next frame
TORCHCODEC_VALUES = 1 << 28  # it decodes a file at once: 1 GiB of float32
W64_START = bytes.fromhex("726966662E91CF11A5D628DB04C10000")
# What starts otherwise is not offered to libsndfile: it takes two bytes for a format, and prints what it meets there.
STARTS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"dns.", b"NIST_1A", W64_START)
OTHER_STARTS = {
    bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C"): "ASF (WMA)",
    b"\x1a\x45\xdf\xa3": "Matroska or WebM",
    b"ADIF": "AAC",
    b"#!AMR": "AMR",
    b"wvpk": "WavPack",
}
# A file may name other files, which must not be read; damage ends the run.
FFMPEG_INPUT = ("-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,pipe", "-i")
FFMPEG_OUTPUT = ("-map", "0:a:0", "-t", str(LONGEST_SECONDS + 1), "-c:a", "pcm_f32le", "-f", "wav", "pipe:1")

Block = NDArray[np.float32]  # frames, channels


class BadAudio(ValueError):
    """A file that cannot be used: `reason` is a short code, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[str, str]]:
        return BadAudio, (self.reason, self.detail)


def decode_clip(data: bytes, name: str, timeout_seconds: float | None = None) -> WaveInt16:
    """The whole recording at 16 kHz, channels averaged, values beyond full scale clipped.

    `name` only serves messages. The time limit is checked between blocks of BLOCK_VALUES. Raises BadAudio with one of
    the reasons empty-file, not-audio, bad-sample-rate, zero-length, unknown-length, too-long, too-short, truncated,
    damaged, non-finite, timeout, needs-ffmpeg.
    """
    limit = _TimeLimit(timeout_seconds, name)
    if not data:
        raise BadAudio("empty-file", f"{name} has 0 bytes")
    data = _without_id3_tags(data, name)
    if kind := _kind_for_other_programs(data):
        _check_container(data, name)
        wave = _decode_with_other_program(data, name, kind, limit)
    elif data.startswith(STARTS) or _is_mpeg(data):
        wave = _decode_with_libsndfile(data, name, limit)
    else:
        raise BadAudio("not-audio", f"{name} starts as no audio format does: {data[:8]!r}")
    if wave.size < MIN_SAMPLES:
        raise BadAudio("too-short", f"{name}: {wave.size / SAMPLE_RATE_HZ * 1000:.1f} ms, less than one 25 ms frame")
    return wave


# --- Blocks of any rate to the wave -----------------------------------------------------------------------------------


class _TimeLimit:
    def __init__(self, seconds: float | None, name: str) -> None:
        self.seconds = seconds
        self._name = name
        self._start = time.monotonic()

    def check(self) -> None:
        if self.seconds is not None and time.monotonic() - self._start >= self.seconds:
            raise BadAudio("timeout", f"{self._name}: not decoded within {self.seconds:g} s")


class _Resampler(Protocol):
    def resample_chunk(self, x: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]: ...


class _NoResampler:
    def resample_chunk(self, x: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:  # noqa: ARG002
        return x


def _to_target_rate(blocks: Iterable[Block], rate_hz: int, name: str, limit: _TimeLimit) -> WaveInt16:
    resampler: _Resampler = _NoResampler()
    if rate_hz != SAMPLE_RATE_HZ:
        resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    samples = bytearray()  # grows in place: parts that are joined at the end would need the memory twice
    for block in blocks:
        limit.check()
        with np.errstate(over="ignore", invalid="ignore"):
            mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        if not (np.abs(mono) <= LOUDEST).all():
            raise BadAudio("non-finite", f"{name} has samples that are NaN, infinite or absurdly large")
        samples += _to_int16(resampler.resample_chunk(mono)).tobytes()
    samples += _to_int16(resampler.resample_chunk(np.empty(0, np.float32), last=True)).tobytes()
    return np.frombuffer(samples, np.int16)


def _to_int16(wave: NDArray[np.float32]) -> WaveInt16:
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def _check_rate(rate_hz: int, name: str) -> None:
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise BadAudio("bad-sample-rate", f"{name}: {rate_hz} Hz")


def _check_length(seconds: float, name: str) -> None:
    if seconds > LONGEST_SECONDS:
        raise BadAudio("too-long", f"{name}: {seconds / 3600:.1f} h of audio, over {LONGEST_SECONDS // 3600} h; cut it")


# --- libsndfile -------------------------------------------------------------------------------------------------------


class _Source(io.BytesIO):
    def seek(self, offset: int, whence: int = 0) -> int:
        """Like lseek: an impossible place, which broken headers make libsndfile ask for, changes nothing."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


_Quiet = Callable[[], AbstractContextManager[None]]
_stderr_lock = threading.Lock()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """libmpg123 writes remarks on damaged files to the process's stderr, and libsndfile has no switch for that."""
    with _stderr_lock, open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        kept = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _decode_with_libsndfile(data: bytes, name: str, limit: _TimeLimit) -> WaveInt16:
    quiet: _Quiet = nullcontext
    if _is_mpeg(data):
        data, quiet = _with_mp3_length(data), _without_stderr
    try:
        with quiet():
            sound = soundfile.SoundFile(_Source(data))
    except soundfile.LibsndfileError as error:
        _check_container(data, name)
        if data[:4] == b"RIFF" and data[12:16] == b"fmt " and data[24:28] == bytes(4):
            _check_rate(0, name)
        detail = "no whole frame of MPEG audio" if _is_mpeg(data) else error.error_string
        raise BadAudio("not-audio", f"{name}: {detail}") from None
    with sound:
        _check_rate(sound.samplerate, name)
        _check_container(data, name)
        if sound.frames <= 0:
            raise BadAudio("zero-length", f"{name} holds no samples")
        if sound.frames > MOST_FRAMES:  # libsndfile's way of saying so; reading such a file fails at its end
            raise BadAudio("unknown-length", f"{name}: its header does not say how long it is; encode it again")
        _check_length(sound.frames / sound.samplerate, name)
        return _to_target_rate(_sound_blocks(sound, data, name, quiet), sound.samplerate, name, limit)


def _sound_blocks(sound: soundfile.SoundFile, data: bytes, name: str, quiet: _Quiet) -> Iterator[Block]:
    promised, done = sound.frames, 0
    while done < promised:
        try:
            with quiet():
                frames = min(max(1, BLOCK_VALUES // sound.channels), promised - done)
                block: Block = sound.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            is_cut = sound.format == "FLAC" and not _ends_with_whole_flac_frame(data)
            detail = f"{name}: {error.error_string.strip().rstrip('.')}, {promised} frames were promised"
            raise BadAudio("truncated" if is_cut else "damaged", detail) from None
        if not len(block):
            raise BadAudio("truncated", f"{name} ends after {done} of {promised} frames")
        done += len(block)
        yield block


# --- torchcodec and ffmpeg --------------------------------------------------------------------------------------------


def _decode_with_other_program(data: bytes, name: str, kind: str, limit: _TimeLimit) -> WaveInt16:
    audio_decoder, ffmpeg = _torchcodec(), shutil.which("ffmpeg")
    if audio_decoder is None and ffmpeg is None:
        raise BadAudio(
            "needs-ffmpeg", f"{name} is {kind}, which libsndfile does not read; install ffmpeg, or torchcodec"
        )
    if audio_decoder is None:
        return _decode_with_ffmpeg(str(ffmpeg), data, name, limit)
    try:
        decoder = audio_decoder(data)
        about = decoder.metadata
        _check_length(about.duration_seconds_from_header or 0.0, name)
        values = (about.duration_seconds_from_header or 0.0) * (about.sample_rate or 0) * (about.num_channels or 0)
        if values > TORCHCODEC_VALUES and ffmpeg is not None:
            return _decode_with_ffmpeg(ffmpeg, data, name, limit)
        samples = decoder.get_all_samples()
    except BadAudio:
        raise
    except (RuntimeError, ValueError) as error:
        raise BadAudio("damaged", f"{name}: torchcodec says: {_last_line(str(error))}") from None
    _check_rate(samples.sample_rate, name)
    frames = max(1, BLOCK_VALUES // len(samples.data))
    blocks = (block.numpy().T for block in samples.data.split(frames, dim=1))
    return _to_target_rate(blocks, samples.sample_rate, name, limit)


@cache
def _torchcodec() -> Any | None:
    try:
        return importlib.import_module("torchcodec.decoders").AudioDecoder
    except (ImportError, OSError, RuntimeError):  # the last two: it is installed, FFmpeg's libraries are not
        return None


def _decode_with_ffmpeg(program: str, data: bytes, name: str, limit: _TimeLimit) -> WaveInt16:
    with tempfile.NamedTemporaryFile() as source, tempfile.TemporaryFile() as remarks:
        source.write(data)  # no pipe: an MP4 often has its index at the end
        source.flush()
        command = [program, *FFMPEG_INPUT, source.name, *FFMPEG_OUTPUT]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=remarks)
        assert process.stdout is not None
        alarm = threading.Timer(limit.seconds or 0.0, process.kill)
        if limit.seconds is not None:
            alarm.start()
        try:
            rate_hz, blocks = _read_wav(process.stdout, name)
            wave = _to_target_rate(blocks, rate_hz, name, limit) if rate_hz else np.empty(0, np.int16)
            status = process.wait()
        finally:
            alarm.cancel()
            process.kill()
            process.stdout.close()
            process.wait()
        limit.check()
        if status != 0 or not rate_hz:
            remarks.seek(0)
            raise BadAudio("damaged", f"{name}: ffmpeg says: {_last_line(remarks.read().decode(errors='replace'))}")
    _check_length(wave.size / SAMPLE_RATE_HZ, name)
    return wave


def _read_wav(stream: IO[bytes], name: str) -> tuple[int, Iterator[Block]]:
    """Rate and blocks of the float32 WAV that ffmpeg writes as it goes; rate 0 where it wrote none."""
    channels, rate_hz, bits = 0, 0, 0
    stream.read(12)
    while len(head := stream.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        if kind == b"data" and channels and bits == 32:
            _check_rate(rate_hz, name)
            return rate_hz, _pipe_blocks(stream, channels)
        body = stream.read(size + size % 2)
        if kind == b"fmt " and len(body) >= 16:
            channels, rate_hz, bits = struct.unpack("<2xHI6xH", body[:16])
    return 0, iter(())


def _pipe_blocks(stream: IO[bytes], channels: int) -> Iterator[Block]:
    frame_bytes = 4 * channels
    while data := stream.read(max(1, BLOCK_VALUES // channels) * frame_bytes):
        whole = len(data) - len(data) % frame_bytes
        yield np.frombuffer(data[:whole], "<f4").reshape(-1, channels)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1][:200]


# --- What the bytes tell ----------------------------------------------------------------------------------------------


def _without_id3_tags(data: bytes, name: str) -> bytes:
    """libsndfile counts the tag in front of a WAV as audio, and no other format's start is seen behind one."""
    while data[:3] == b"ID3" and len(data) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        if 10 + size > len(data):
            raise BadAudio("truncated", f"{name} ends within its ID3 tag")
        data = data[10 + size :].lstrip(b"\0")
        if not data:
            raise BadAudio("zero-length", f"{name} is an ID3 tag without audio")
    return data


def _kind_for_other_programs(data: bytes) -> str:
    """The name of a format that libsndfile does not read; empty where it may."""
    if data[4:8] == b"ftyp":
        return "MP4 or M4A"
    if data[:1] == b"\xff" and data[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9"):  # ADTS: as MPEG, but layer 0
        size = int.from_bytes(data[3:6], "big") >> 5 & 0x1FFF
        if size >= 7 and data[size : size + 2] in (data[:2], b""):
            return "AAC"
    return next((kind for start, kind in OTHER_STARTS.items() if data.startswith(start)), "")


def _is_mpeg(data: bytes) -> bool:
    return data[:1] == b"\xff" and len(data) > 3 and data[1] >= 0xE0 and data[1] & 0x18 != 0x08 and data[1] & 0x06 != 0


def _check_container(data: bytes, name: str) -> None:
    """Finds files that end early where libsndfile would return the part that is there without a word."""
    if (promised := _promised_bytes(data)) > len(data):
        raise BadAudio("truncated", f"{name}: {len(data)} of {promised} bytes are there")
    if data[:4] == b"OggS" and not _ends_with_last_ogg_page(data):
        raise BadAudio("truncated", f"{name} ends before the last page of its Ogg stream")


def _promised_bytes(data: bytes) -> int:
    """How long the file should be by its own header; 0 where it does not tell."""
    start, promised = data[:4], 0
    order: Literal["big", "little"] = "little" if start in (b"RIFF", b"RF64", b"dns.") else "big"
    if start in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        promised = _promised_by_chunks(data, 12, 4, order)
    elif start == b"caff":
        promised = _promised_by_chunks(data, 8, 8, order)
    elif start == b"FORM":
        promised = 8 + int.from_bytes(data[4:8], order)
    elif start in (b".snd", b"dns."):
        offset, size = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
        promised = 0 if size == UNKNOWN_SIZE else offset + size
    elif data.startswith(W64_START):
        promised = int.from_bytes(data[16:24], "little")
    elif start == b"NIST":
        factors = dict(re.findall(rb"(sample_count|sample_n_bytes|channel_count) -i (\d{1,12})\s", data[:1024]))
        promised = 1024 + math.prod(map(int, factors.values())) if len(factors) == 3 else 0
    elif data[4:8] == b"ftyp":
        promised = _promised_by_boxes(data)
    return promised


def _promised_by_chunks(data: bytes, position: int, size_bytes: int, order: Literal["big", "little"]) -> int:
    """Where the chunk of samples ends, in WAV (sizes of 4 bytes, padded to even ones) and CAF (8 bytes)."""
    long_size = 0
    while position + 4 + size_bytes <= len(data):
        kind, body = data[position : position + 4], position + 4 + size_bytes
        size = int.from_bytes(data[position + 4 : body], order)
        if kind == b"ds64":
            long_size = int.from_bytes(data[body + 8 : body + 16], "little")
        if kind == b"data":
            if size == UNKNOWN_SIZE and data[:4] == b"RF64":
                size = long_size
            return 0 if size in (UNKNOWN_SIZE, 2**64 - 1) else body + size
        position = body + size + (size % 2 if size_bytes == 4 else 0)
    return 0


def _promised_by_boxes(data: bytes) -> int:
    """Where the last box of an MP4 file ends that holds samples or their index."""
    position, promised = 0, 0
    while position + 16 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:
            break
        position += size
        if kind in (b"moov", b"moof", b"mdat"):
            promised = position
    return promised


def _ends_with_last_ogg_page(data: bytes) -> bool:
    """Whether the last page is whole and carries the mark of a stream's end."""
    start = data.rfind(b"OggS")
    if start + 27 > len(data):
        return False
    sizes = data[start + 27 : start + 27 + data[start + 26]]
    is_whole = len(sizes) == data[start + 26] and start + 27 + len(sizes) + sum(sizes) <= len(data)
    return is_whole and bool(data[start + 5] & OGG_LAST_PAGE)


def _ends_with_whole_flac_frame(data: bytes) -> bool:
    """Whether the checksum of the last frame is right: tells a damaged file from one that was cut.

    The checksum is the remainder of a polynomial division, so that of a longer tail follows from that of a shorter one.
    """
    tail = data[-FLAC_TAIL_BYTES:]
    crc, power = 0, 0x8005  # power: x to the place of the bit, modulo FLAC's polynomial
    for position in range(len(tail) - 1, -1, -1):
        byte = tail[position]
        for bit in range(8):
            if byte >> bit & 1:
                crc ^= power
            power = (power << 1) ^ (0x18005 if power & 0x8000 else 0)
        if crc == 0 and tail[position : position + 2] in (b"\xff\xf8", b"\xff\xf9"):
            return True
    return False


def _with_mp3_length(data: bytes) -> bytes:
    """An MP3 file with a Xing header in front, which tells the number of frames, where it has none.

    libsndfile would guess the length from the first frame's bit rate and then leave out all that comes after it.
    """
    if not _mp3_frame_bytes(data[:4]) or b"Xing" in data[:48] or b"Info" in data[:48]:
        return data
    count, position, is_lost_at = 0, 0, 0
    while 0 <= position < min(len(data), is_lost_at + MP3_LOST_BYTES):
        header = data[position : position + 4]
        size = _mp3_frame_bytes(header)
        if size and (header[1] | 1, header[2] & 0x0C) == (data[1] | 1, data[2] & 0x0C):
            count += 1
            position += size
            is_lost_at = position
        else:
            position = data.find(b"\xff", position + 1)
    if count < 2:
        return data
    header = bytes([0xFF, data[1] | 1, data[2] & 0x0C | 0x90, data[3]])  # no checksum, and a bit rate with room enough
    side_bytes = (32, 17, 9)[(data[1] & 0x18 != 0x18) + (data[3] >> 6 == 3)]
    tag = header + bytes(side_bytes) + b"Xing" + struct.pack(">II", 1, count)
    return tag.ljust(_mp3_frame_bytes(header), b"\0") + data


def _mp3_frame_bytes(header: bytes) -> int:
    """The length of the frame that starts so; 0 where this is no header of MPEG layer III."""
    if not _is_mpeg(header) or header[1] & 0x06 != 0x02:
        return 0
    version, kbps, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if kbps in (0, 15) or rate == 3:
        return 0
    rate_hz = MP3_RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    bytes_per_bit = 144_000 * MP3_KBPS[kbps] if version == 3 else 72_000 * MP3_KBPS_LOW[kbps]
    return bytes_per_bit // rate_hz + (header[2] >> 1 & 1)
