"""What every decoder's blocks go through on their way to the wave at 16 kHz, and BadAudio, which ends it."""

import time
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import soxr
from numpy.typing import NDArray

from beats_ray.data.flac import WaveInt16
from beats_ray.data.plan import SAMPLE_RATE_HZ

LOWEST_RATE_HZ = 1_000
HIGHEST_RATE_HZ = 768_000
LONGEST_SECONDS = 24 * 3600  # a FLAC file of a few MB can stand for weeks of silence
BLOCK_VALUES = 1 << 20  # of all channels: a recording of hours is never in memory at its full rate
LOUDEST = 2.0**31  # times full scale; the resampler makes silence of what is much louder

Block = NDArray[np.float32]  # frames, channels


class BadAudio(ValueError):
    """A file that cannot be used: `reason` is a short code, `detail` the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[str, str]]:
        return BadAudio, (self.reason, self.detail)


def frames_of_block(channels: int) -> int:
    """How many frames a block may have."""
    return max(1, BLOCK_VALUES // channels)


class TimeLimit:
    """The time that a file may take, from now on; None for as long as it wants."""

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


def to_target_rate(blocks: Iterable[Block], rate_hz: int, name: str, limit: TimeLimit) -> WaveInt16:
    """Blocks of a recording as one wave at 16 kHz, channels averaged. BadAudio: non-finite, timeout."""
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


def check_rate(rate_hz: int, name: str) -> None:
    """BadAudio, bad-sample-rate, for a rate that no recording has."""
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise BadAudio("bad-sample-rate", f"{name}: {rate_hz} Hz")


def check_length(seconds: float, name: str) -> None:
    """BadAudio, too-long, beyond LONGEST_SECONDS."""
    if seconds > LONGEST_SECONDS:
        raise BadAudio("too-long", f"{name}: {seconds / 3600:.1f} h of audio, over {LONGEST_SECONDS // 3600} h; cut it")
