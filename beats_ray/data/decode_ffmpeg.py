"""Reading with other programs what libsndfile does not: torchcodec where it is installed, else an `ffmpeg` program."""

import importlib
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

import numpy as np

from beats_ray.data.decode_blocks import (
    LONGEST_SECONDS,
    BadAudio,
    Block,
    TimeLimit,
    check_length,
    check_rate,
    frames_of_block,
    to_target_rate,
)
from beats_ray.data.flac import WaveInt16
from beats_ray.data.plan import SAMPLE_RATE_HZ

TORCHCODEC_VALUES = 1 << 28  # it decodes a file at once: 1 GiB of float32
# A file may name other files, which must not be read; damage ends the run.
FFMPEG_INPUT = ("-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,pipe", "-i")
FFMPEG_OUTPUT = ("-map", "0:a:0", "-t", str(LONGEST_SECONDS + 1), "-c:a", "pcm_f32le", "-f", "wav", "pipe:1")


def decode_with_other_program(data: bytes, name: str, kind: str, limit: TimeLimit) -> WaveInt16:
    """The recording at 16 kHz; `kind` names its format where neither program is there (BadAudio, needs-ffmpeg)."""
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
        check_length(about.duration_seconds_from_header or 0.0, name)
        values = (about.duration_seconds_from_header or 0.0) * (about.sample_rate or 0) * (about.num_channels or 0)
        if values > TORCHCODEC_VALUES and ffmpeg is not None:
            return _decode_with_ffmpeg(ffmpeg, data, name, limit)
        samples = decoder.get_all_samples()
    except BadAudio:
        raise
    except (RuntimeError, ValueError) as error:
        raise BadAudio("damaged", f"{name}: torchcodec says: {_last_line(str(error))}") from None
    check_rate(samples.sample_rate, name)
    frames = frames_of_block(len(samples.data))
    blocks = (block.numpy().T for block in samples.data.split(frames, dim=1))
    return to_target_rate(blocks, samples.sample_rate, name, limit)


@cache
def _torchcodec() -> Any | None:
    try:
        return importlib.import_module("torchcodec.decoders").AudioDecoder
    except (ImportError, OSError, RuntimeError):  # the last two: it is installed, FFmpeg's libraries are not
        return None


def _decode_with_ffmpeg(program: str, data: bytes, name: str, limit: TimeLimit) -> WaveInt16:
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
            wave = to_target_rate(blocks, rate_hz, name, limit) if rate_hz else np.empty(0, np.int16)
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
    check_length(wave.size / SAMPLE_RATE_HZ, name)
    return wave


def _read_wav(stream: IO[bytes], name: str) -> tuple[int, Iterator[Block]]:
    """Rate and blocks of the float32 WAV that ffmpeg writes as it goes; rate 0 where it wrote none."""
    channels, rate_hz, bits = 0, 0, 0
    stream.read(12)
    while len(head := stream.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        if kind == b"data" and channels and bits == 32:
            check_rate(rate_hz, name)
            return rate_hz, _pipe_blocks(stream, channels)
        body = stream.read(size + size % 2)
        if kind == b"fmt " and len(body) >= 16:
            channels, rate_hz, bits = struct.unpack("<2xHI6xH", body[:16])
    return 0, iter(())


def _pipe_blocks(stream: IO[bytes], channels: int) -> Iterator[Block]:
    frame_bytes = 4 * channels
    while data := stream.read(frames_of_block(channels) * frame_bytes):
        whole = len(data) - len(data) % frame_bytes
        yield np.frombuffer(data[:whole], "<f4").reshape(-1, channels)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1][:200]
