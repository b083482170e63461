"""What the bytes of an audio file tell before it is decoded: its format, and whether all of it is there.

libsndfile returns the part of a cut file that is there without a word; these checks find it by the file's own header.
"""

import math
import re
import struct
from typing import Literal

from beats_ray.data.decode_blocks import BadAudio

UNKNOWN_SIZE = 0xFFFFFFFF  # what programs that write a WAV to a pipe put in its header
FLAC_TAIL_BYTES = 1 << 16  # more than any frame of 16 bit stereo
OGG_LAST_PAGE = 0x04  # header flag of a stream's last page
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


def without_id3_tags(data: bytes, name: str) -> bytes:
    """libsndfile counts the tag in front of a WAV as audio, and no other format's start is seen behind one."""
    while data[:3] == b"ID3" and len(data) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        if 10 + size > len(data):
            raise BadAudio("truncated", f"{name} ends within its ID3 tag")
        data = data[10 + size :].lstrip(b"\0")
        if not data:
            raise BadAudio("zero-length", f"{name} is an ID3 tag without audio")
    return data


def kind_for_other_programs(data: bytes) -> str:
    """The name of a format that libsndfile does not read; empty where it may."""
    if data[4:8] == b"ftyp":
        return "MP4 or M4A"
    if data[:1] == b"\xff" and data[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9"):  # ADTS: as MPEG, but layer 0
        size = int.from_bytes(data[3:6], "big") >> 5 & 0x1FFF
        if size >= 7 and data[size : size + 2] in (data[:2], b""):
            return "AAC"
    return next((kind for start, kind in OTHER_STARTS.items() if data.startswith(start)), "")


def check_container(data: bytes, name: str) -> None:
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


def ends_with_whole_flac_frame(data: bytes) -> bool:
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
