"""Audio files of any common kind to 16 kHz, mono, int16.

wave = decode_clip(path.read_bytes(), path.name)  # BadAudio tells why a file cannot be used

libsndfile reads WAV, FLAC, Ogg, MP3, AIFF, AU, CAF and their like; AAC, WMA, WebM and others are left to torchcodec or
to an `ffmpeg` program, whichever is there.
"""

from beats_ray.data.containers import STARTS, check_container, kind_for_other_programs, without_id3_tags
from beats_ray.data.decode_blocks import BadAudio, TimeLimit
from beats_ray.data.decode_ffmpeg import decode_with_other_program
from beats_ray.data.decode_libsndfile import decode_with_libsndfile
from beats_ray.data.flac import WaveInt16
from beats_ray.data.mp3 import is_mpeg
from beats_ray.data.plan import SAMPLE_RATE_HZ

MIN_SAMPLES = 400  # 25 ms: a shorter clip has not a single filterbank frame


def decode_clip(data: bytes, name: str, timeout_seconds: float | None = None) -> WaveInt16:
    """The whole recording at 16 kHz, channels averaged, values beyond full scale clipped.

    `name` only serves messages. The time limit is checked between blocks of BLOCK_VALUES. Raises BadAudio with one of
    the reasons empty-file, not-audio, bad-sample-rate, zero-length, unknown-length, too-long, too-short, truncated,
    damaged, non-finite, timeout, needs-ffmpeg.
    """
    limit = TimeLimit(timeout_seconds, name)
    if not data:
        raise BadAudio("empty-file", f"{name} has 0 bytes")
    data = without_id3_tags(data, name)
    if kind := kind_for_other_programs(data):
        check_container(data, name)
        wave = decode_with_other_program(data, name, kind, limit)
    elif data.startswith(STARTS) or is_mpeg(data):
        wave = decode_with_libsndfile(data, name, limit)
    else:
        raise BadAudio("not-audio", f"{name} starts as no audio format does: {data[:8]!r}")
    if wave.size < MIN_SAMPLES:
        raise BadAudio("too-short", f"{name}: {wave.size / SAMPLE_RATE_HZ * 1000:.1f} ms, less than one 25 ms frame")
    return wave
