"""MPEG audio by its frame headers: whether a file is that, and how long an MP3 file without a Xing header is."""

import struct

MP3_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG-1
MP3_KBPS_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
MP3_RATES_HZ = (44_100, 48_000, 32_000)  # MPEG-1
MP3_LOST_BYTES = 1024  # so far libmpg123 looks for the next frame


def is_mpeg(data: bytes) -> bool:
    """Whether the bytes start with a frame header of MPEG audio, of any layer."""
    return data[:1] == b"\xff" and len(data) > 3 and data[1] >= 0xE0 and data[1] & 0x18 != 0x08 and data[1] & 0x06 != 0


def with_mp3_length(data: bytes) -> bytes:
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
    if not is_mpeg(header) or header[1] & 0x06 != 0x02:
        return 0
    version, kbps, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if kbps in (0, 15) or rate == 3:
        return 0
    rate_hz = MP3_RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    bytes_per_bit = 144_000 * MP3_KBPS[kbps] if version == 3 else 72_000 * MP3_KBPS_LOW[kbps]
    return bytes_per_bit // rate_hz + (header[2] >> 1 & 1)
