"""Reading with libsndfile: WAV, FLAC, Ogg, MP3, AIFF, AU, CAF and their like."""

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import soundfile

from beats_ray.data.containers import check_container, ends_with_whole_flac_frame
from beats_ray.data.decode_blocks import (
    BadAudio,
    Block,
    TimeLimit,
    check_length,
    check_rate,
    frames_of_block,
    to_target_rate,
)
from beats_ray.data.flac import WaveInt16
from beats_ray.data.mp3 import is_mpeg, with_mp3_length

MOST_FRAMES = 1 << 40


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


def decode_with_libsndfile(data: bytes, name: str, limit: TimeLimit) -> WaveInt16:
    """The recording at 16 kHz; BadAudio tells why libsndfile cannot read it whole."""
    quiet: _Quiet = nullcontext
    if is_mpeg(data):
        data, quiet = with_mp3_length(data), _without_stderr
    try:
        with quiet():
            sound = soundfile.SoundFile(_Source(data))
    except soundfile.LibsndfileError as error:
        check_container(data, name)
        if data[:4] == b"RIFF" and data[12:16] == b"fmt " and data[24:28] == bytes(4):
            check_rate(0, name)
        detail = "no whole frame of MPEG audio" if is_mpeg(data) else error.error_string
        raise BadAudio("not-audio", f"{name}: {detail}") from None
    with sound:
        check_rate(sound.samplerate, name)
        check_container(data, name)
        if sound.frames <= 0:
            raise BadAudio("zero-length", f"{name} holds no samples")
        if sound.frames > MOST_FRAMES:  # libsndfile's way of saying so; reading such a file fails at its end
            raise BadAudio("unknown-length", f"{name}: its header does not say how long it is; encode it again")
        check_length(sound.frames / sound.samplerate, name)
        return to_target_rate(_sound_blocks(sound, data, name, quiet), sound.samplerate, name, limit)


def _sound_blocks(sound: soundfile.SoundFile, data: bytes, name: str, quiet: _Quiet) -> Iterator[Block]:
    promised, done = sound.frames, 0
    while done < promised:
        try:
            with quiet():
                frames = min(frames_of_block(sound.channels), promised - done)
                block: Block = sound.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            is_cut = sound.format == "FLAC" and not ends_with_whole_flac_frame(data)
            detail = f"{name}: {error.error_string.strip().rstrip('.')}, {promised} frames were promised"
            raise BadAudio("truncated" if is_cut else "damaged", detail) from None
        if not len(block):
            raise BadAudio("truncated", f"{name} ends after {done} of {promised} frames")
        done += len(block)
        yield block
