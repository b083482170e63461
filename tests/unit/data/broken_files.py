"""A corpus of broken and odd audio files, each with what `decode_clip` must make of it; the same bytes every time.

expected = write_broken_files(folder)      # {"wav-cut-in-fmt.wav": {"not-audio"}, "wav-8-bit.wav": Good(8000), ...}

Good files hold half a second of a tone, so that wrong byte orders, depths and rates are heard.
"""

import io
import math
import os
import random
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE_HZ = 16_000
SECONDS = 0.5
TONE_HZ = 440.0
AMPLITUDE = 0.5
UNKNOWN = 0xFFFFFFFF


class Good(NamedTuple):
    """The file is decoded: to so many samples at 16 kHz, to the tone or not."""

    samples: int = int(SECONDS * RATE_HZ)
    tolerance: int = 0
    is_tone: bool = True


Expected = Good | frozenset[str]
"""A decoded file, or the reasons of which one must be given; GOOD among them where decoding something is right too."""
GOOD = "good"
Files = dict[str, tuple[bytes, Expected]]


def refused(*reasons: str) -> frozenset[str]:
    return frozenset(reasons)


FOREIGN = refused("not-audio")
CUT = refused("truncated")
FOLDER = "x.wav"
UNREADABLE = "unreadable.wav"  # no permission to read it, which does not stop root
NOT_UTF8 = os.fsdecode(b"caf\xe9.wav")


def write_broken_files(folder: Path) -> dict[str, Expected]:
    """Writes some 250 files and the folder FOLDER, which is not in the result."""
    files: Files = {}
    for part in (
        good_wavs(),
        cut_wavs(),
        odd_wavs(),
        odd_samples(),
        flacs(),
        oggs(),
        mp3s(),
        other_containers(),
        foreign_files(),
        names(),
    ):
        assert not files.keys() & part.keys()
        files |= part
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / UNREADABLE).chmod(0)
    (folder / FOLDER).mkdir()
    return {name: expected for name, (_, expected) in files.items()}


def tone(rate_hz: int = RATE_HZ, channels: int = 1) -> NDArray[np.float64]:
    time = np.arange(int(SECONDS * rate_hz)) / rate_hz
    return np.repeat(AMPLITUDE * np.sin(2 * np.pi * TONE_HZ * time)[:, None], channels, axis=1)


PCM = (tone() * 32767).astype("<i2").tobytes()


def wav(
    samples: bytes = PCM,
    *,
    tag: int = 1,
    channels: int = 1,
    rate_hz: int = RATE_HZ,
    bits: int = 16,
    before: bytes = b"",
    data_size: int | None = None,
    riff_size: int | None = None,
) -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * frame & UNKNOWN, frame & 0xFFFF, bits)
    body = b"WAVE" + chunk(b"fmt ", form) + before + b"data"
    body += struct.pack("<I", len(samples) if data_size is None else data_size) + samples
    return b"RIFF" + struct.pack("<I", len(body) if riff_size is None else riff_size) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def encoded(
    kind: str, subtype: str | None = None, rate_hz: int = RATE_HZ, channels: int = 1, endian: str = ""
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(rate_hz, channels), rate_hz, format=kind, subtype=subtype, endian=endian or None)
    data = buffer.getvalue()
    return with_fixed_serial(data) if kind == "OGG" else data


def good_wavs() -> Files:
    """Every sample format that recorders write."""
    wave = tone()
    wide = (wave * 8388607).astype("<i4").tobytes()
    packed = b"".join(wide[at : at + 3] for at in range(0, len(wide), 4))
    extensible = struct.pack("<HHIIHHHHIH", 0xFFFE, 1, RATE_HZ, 2 * RATE_HZ, 2, 16, 22, 16, 4, 1)
    extensible += bytes.fromhex("000000001000800000AA00389B71")
    head = b"WAVE" + chunk(b"fmt ", extensible) + chunk(b"data", PCM)
    files = {
        "wav-8-bit.wav": wav((wave * 127 + 128).astype("u1").tobytes(), bits=8),
        "wav-16-bit.wav": wav(),
        "wav-24-bit.wav": wav(packed, bits=24),
        "wav-32-bit.wav": wav((wave * 2147483647).astype("<i4").tobytes(), bits=32),
        "wav-float32.wav": wav(wave.astype("<f4").tobytes(), tag=3, bits=32),
        "wav-float64.wav": wav(wave.astype("<f8").tobytes(), tag=3, bits=64),
        "wav-extensible.wav": b"RIFF" + struct.pack("<I", len(head)) + head,
        "wav-alaw.wav": encoded("WAV", "ALAW"),
        "wav-mulaw.wav": encoded("WAV", "ULAW"),
        "wav-big-endian.wav": encoded("WAV", "PCM_16", endian="BIG"),
        "wav-stereo-44100.wav": encoded("WAV", "PCM_16", 44_100, 2),
        "wav-192000.wav": encoded("WAV", "PCM_24", 192_000),
        "wav-96-channels.wav": wav(np.tile(tone(), (1, 96)).astype("<f4").tobytes(), tag=3, channels=96, bits=32),
        "wav-1024-channels.wav": wav(PCM[:800].ljust(800 * 1024), channels=1024),
    }
    expected: dict[str, Expected] = dict.fromkeys(files, Good())
    expected["wav-1024-channels.wav"] = Good(400, is_tone=False)
    files["wav-ima-adpcm.wav"] = encoded("WAV", "IMA_ADPCM")
    files["wav-ms-adpcm.wav"] = encoded("WAV", "MS_ADPCM")
    files["wav-gsm.wav"] = encoded("WAV", "GSM610")
    return {name: (data, expected.get(name, Good(tolerance=500))) for name, data in files.items()}


def cut_wavs() -> Files:
    """Cut at and within every part of the header, and in the samples."""
    places = {
        "in-riff-mark": 2,
        "after-riff-mark": 4,
        "after-riff-size": 8,
        "after-wave-mark": 12,
        "after-fmt-mark": 16,
        "after-fmt-size": 20,
        "in-fmt": 29,
        "after-fmt": 36,
        "after-data-mark": 40,
        "after-data-size": 44,
        "in-first-sample": 45,
        "in-samples": 8_000,
        "before-last-byte": 44 + len(PCM) - 1,
    }
    return {f"wav-cut-{place}.wav": (wav()[:size], FOREIGN if size < 44 else CUT) for place, size in places.items()}


def odd_wavs() -> Files:
    """Headers that lie, that lack something or hold more than usual."""
    note = chunk(b"LIST", b"INFOICMT\x04\x00\x00\x00abc\x00")
    bad_rate = refused("bad-sample-rate")
    no_fmt = b"WAVE" + chunk(b"data", PCM)
    data_first = b"WAVE" + chunk(b"data", PCM) + wav()[12:36]
    return {
        "wav-list-before.wav": (wav(before=note), Good()),
        "wav-list-after.wav": (wav() + note, Good()),
        "wav-broadcast.wav": (wav(before=chunk(b"bext", bytes(602))), Good()),
        "wav-odd-chunk.wav": (wav(before=chunk(b"note", b"abc")), Good()),
        "wav-odd-chunk-unpadded.wav": (wav(before=b"note\x03\x00\x00\x00abc"), FOREIGN),
        "wav-many-empty-chunks.wav": (wav(before=chunk(b"JUNK", b"") * 100_000), FOREIGN),
        "wav-huge-chunk.wav": (wav(before=b"JUNK\xf0\xff\xff\x7f"), FOREIGN),
        "wav-trailing-zeros.wav": (wav() + bytes(1001), Good()),
        "wav-id3-in-front.wav": (id3(300) + wav(), Good()),
        "wav-from-a-pipe.wav": (wav(data_size=UNKNOWN, riff_size=UNKNOWN), Good()),
        "wav-riff-size-0.wav": (wav(riff_size=0), Good()),
        "wav-riff-size-too-large.wav": (wav(riff_size=10**9), Good()),
        "wav-data-size-0.wav": (wav(data_size=0), refused("zero-length")),
        "wav-data-size-too-small.wav": (wav(data_size=len(PCM) // 2), Good(4_000)),
        "wav-data-size-too-large.wav": (wav(data_size=len(PCM) + 2), CUT),
        "wav-data-size-2-gib.wav": (wav(data_size=0x7FFFFFFF), CUT),
        "wav-header-only.wav": (wav(b""), refused("zero-length")),
        "wav-no-fmt.wav": (b"RIFF" + struct.pack("<I", len(no_fmt)) + no_fmt, FOREIGN),
        "wav-data-before-fmt.wav": (b"RIFF" + struct.pack("<I", len(data_first)) + data_first, FOREIGN),
        "wav-0-hz.wav": (wav(rate_hz=0), bad_rate),
        "wav-1-hz.wav": (wav(rate_hz=1), bad_rate),
        "wav-999-hz.wav": (wav(rate_hz=999), bad_rate),
        "wav-800-khz.wav": (wav(rate_hz=800_000), bad_rate),
        "wav-2-ghz.wav": (wav(rate_hz=0x7FFFFFFF), bad_rate),
        "wav-4-ghz.wav": (wav(rate_hz=UNKNOWN), refused("bad-sample-rate", "not-audio")),
        "wav-0-channels.wav": (wav(channels=0), FOREIGN),
        "wav-65535-channels.wav": (wav(channels=65_535), FOREIGN),
        "wav-0-bits.wav": (wav(bits=0), FOREIGN),
        "wav-64-bit-integers.wav": (wav(bits=64), FOREIGN),
        "wav-codec-0.wav": (wav(tag=0), FOREIGN),
        "wav-codec-mp3.wav": (wav(tag=0x55), FOREIGN),
        "wav-codec-unknown.wav": (wav(tag=0x7777), FOREIGN),
        "avi.wav": (b"RIFF\x00\x10\x00\x00AVI LIST" + bytes(4_000), FOREIGN),
    }


def odd_samples() -> Files:
    """Too few samples, and values that are no sound."""
    files: Files = {}
    for count in (1, 2, 399, 400):
        expected = Good(400, is_tone=False) if count == 400 else refused("too-short")
        files[f"wav-{count}-samples.wav"] = (wav(PCM[: 2 * count]), expected)
        flac = io.BytesIO()
        soundfile.write(flac, tone()[:count], RATE_HZ, format="FLAC")
        files[f"flac-{count}-samples.flac"] = (flac.getvalue(), expected)
    files["wav-20-ms-at-44100.wav"] = (wav(PCM[:1764], rate_hz=44_100), refused("too-short"))
    files["wav-silence.wav"] = (wav(bytes(len(PCM))), Good(is_tone=False))
    files["wav-full-scale-square.wav"] = (wav(b"\xff\x7f\x00\x80" * 4_000), Good(is_tone=False))
    for name, value in {"nan": math.nan, "inf": math.inf, "minus-inf": -math.inf, "1e38": 1e38}.items():
        for rate_hz in (RATE_HZ, 44_100):
            wave = tone(rate_hz, 2).astype("<f4")
            wave[4_321, 1] = value
            data = wav(wave.tobytes(), tag=3, channels=2, rate_hz=rate_hz, bits=32)
            files[f"wav-one-{name}-at-{rate_hz}.wav"] = (data, refused("non-finite"))
    opposite = np.tile(np.array([math.inf, -math.inf], "<f4"), 8_000).tobytes()
    files["wav-inf-and-minus-inf.wav"] = (wav(opposite, tag=3, channels=2, bits=32), refused("non-finite"))
    files["wav-float64-1e300.wav"] = (wav(np.full(8_000, 1e300).tobytes(), tag=3, bits=64), refused("non-finite"))
    denormal = np.full(8_000, 1e-42, "<f4").tobytes()
    files["wav-denormal.wav"] = (wav(denormal, tag=3, bits=32), Good(is_tone=False))
    return files


def flacs() -> Files:
    good = encoded("FLAC")
    frame = good.index(b"\xff\xf8")
    second = good.index(b"\xff\xf8", frame + 1000)
    places = {
        "in-mark": 2,
        "after-mark": 4,
        "in-streaminfo": 20,
        "after-streaminfo": 42,
        "in-comment": 60,
        "before-first-frame": frame,
        "in-frame-header": frame + 3,
        "in-frame": (frame + second) // 2,
        "before-last-byte": len(good) - 1,
    }
    files: Files = {}
    for place, size in places.items():
        files[f"flac-cut-{place}.flac"] = (good[:size], CUT if size > frame else refused("not-audio", "truncated"))
    files["flac-cut-between-frames.flac"] = (good[:second], refused("truncated", "damaged"))
    damaged = bytearray(good)
    damaged[(frame + second) // 2] ^= 0xFF
    files |= {
        "flac-good.flac": (good, Good()),
        "flac-24-bit.flac": (encoded("FLAC", "PCM_24"), Good()),
        "flac-8-channels.flac": (encoded("FLAC", channels=8), Good()),
        "flac-id3-in-front.flac": (id3(300) + good, Good()),
        "flac-id3v1-at-the-end.flac": (good + b"TAG" + bytes(125), Good()),
        "flac-called-wav.wav": (good, Good()),
        "flac-damaged.flac": (bytes(damaged), refused("damaged")),
        "flac-wrong-md5.flac": (good[:26] + bytes(range(1, 17)) + good[42:], Good()),
        "flac-unknown-length.flac": (with_flac_length(good, 0), refused("unknown-length")),
        "flac-fewer-promised.flac": (with_flac_length(good, 5_000), Good(5_000, is_tone=False)),
        "flac-more-promised.flac": (with_flac_length(good, 8_001), refused("truncated", "damaged")),
        "flac-25-hours-promised.flac": (with_flac_length(good, 25 * 3600 * RATE_HZ), refused("too-long")),
        "flac-0-hz.flac": (good[:18] + b"\x00\x00" + bytes([good[20] & 0x0F]) + good[21:], FOREIGN),
        "flac-all-sync-bytes.flac": (good[:second] + b"\xff\xf8" * 40_000, refused("truncated", "damaged")),
    }
    return files


def with_flac_length(data: bytes, samples: int) -> bytes:
    """The same file with another number of samples in its header, a field of 36 bits."""
    return data[:21] + bytes([data[21] & 0xF0 | samples >> 32]) + struct.pack(">I", samples & UNKNOWN) + data[26:]


def oggs() -> Files:
    files: Files = {}
    for codec in ("VORBIS", "OPUS"):
        good = encoded("OGG", codec, 48_000 if codec == "OPUS" else 44_100)
        pages = [at for at in range(len(good)) if good.startswith(b"OggS", at)]
        places = {
            "in-mark": 3,
            "in-first-page-header": 20,
            "in-first-page": 40,
            "after-first-page": pages[1],
            "in-second-page": pages[1] + 40,
            "before-last-page": pages[-1],
            "in-last-page-header": pages[-1] + 20,
            "in-last-page": (pages[-1] + len(good)) // 2,
            "before-last-byte": len(good) - 1,
        }
        name = codec.lower()
        for place, size in places.items():
            files[f"{name}-cut-{place}.ogg"] = (good[:size], FOREIGN if size < 4 else CUT)
        damaged = bytearray(good)
        damaged[pages[1] + 60] ^= 0xFF
        files[f"{name}-good.ogg"] = (good, Good())
        files[f"{name}-called-flac-{name}.flac"] = (good, Good())
        files[f"{name}-trailing-zeros.ogg"] = (good + bytes(1000), Good())
        files[f"{name}-damaged-header.ogg"] = (bytes(damaged), refused("not-audio", "damaged", "zero-length"))
        files[f"{name}-garbage-after-mark.ogg"] = (b"OggS" + noise(5_000), refused("not-audio", "truncated"))
    return files


def with_fixed_serial(data: bytes) -> bytes:
    """The Ogg file with serial number 1 in place of a random one, and the pages' checksums for that."""
    pages, start = [], 0
    while start < len(data):
        count = data[start + 26]
        end = start + 27 + count + sum(data[start + 27 : start + 27 + count])
        page = bytearray(data[start:end])
        page[14:18], page[22:26] = struct.pack("<I", 1), bytes(4)
        page[22:26] = struct.pack("<I", ogg_crc(page))
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def ogg_crc(page: bytes | bytearray) -> int:
    """Polynomial 0x04C11DB7, most significant bit first, start 0: zlib's with bits mirrored and other start and end."""
    mirrored = bytes(int(f"{byte:08b}"[::-1], 2) for byte in page)
    return int(f"{zlib.crc32(mirrored, UNKNOWN) ^ UNKNOWN:032b}"[::-1], 2)


def mp3s() -> Files:
    good = encoded("MP3", rate_hz=44_100)  # variable bit rate, and a first frame that tells the length
    bare = good[mp3_frame_end(good) :]  # without that frame
    second = mp3_frame_end(bare)
    near = Good(tolerance=900)  # decoders' delays, up to two frames
    cut = refused("truncated", "not-audio")
    files: Files = {
        "mp3-good.mp3": (good, Good()),
        "mp3-called-wav.wav": (good, Good()),
        "wav-called-mp3.mp3": (wav(), Good()),
        "mp3-stereo-8000.mp3": (encoded("MP3", rate_hz=8_000, channels=2), Good()),
        "mp3-id3-in-front.mp3": (id3(500) + good, Good()),
        "mp3-two-id3-and-padding.mp3": (id3(500) + id3(20) + bytes(64) + good, Good()),
        "mp3-id3v1-at-the-end.mp3": (good + b"TAG" + bytes(125), Good()),
        "mp3-no-length.mp3": (bare, near),
        "mp3-no-length-id3v1-at-the-end.mp3": (bare + b"TAG" + bytes(125), near),
        "mp3-no-length-id3-in-front.mp3": (id3(500) + bare, near),
        "mp3-id3-only.mp3": (id3(500), refused("zero-length")),
        "mp3-id3-cut.mp3": (id3(500)[:100], CUT),
        "mp3-id3-256-mib.mp3": (b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + good, CUT),
        "mp3-text-in-front.mp3": (b"Hello. " * 9 + good, FOREIGN),
        "mp3-garbage-after-sync.mp3": (b"\xff\xfb\x90\x00" + noise(5_000), cut),
        "mp3-sync-bytes-only.mp3": (b"\xff\xfb" * 4_000, cut),
        "mp3-headers-only.mp3": (b"\xff\xfb\x90\x00" * 4_000, cut),
        "mp3-garbage-inside.mp3": (good[:2000] + noise(700) + good[2700:], refused("truncated", "damaged", GOOD)),
    }
    places = {"in-header": 3, "in-first-frame": second // 2, "in-frame": 1_500, "before-last-byte": len(bare) - 1}
    for place, size in places.items():
        files[f"mp3-cut-{place}.mp3"] = (good[:size], cut)
        files[f"mp3-no-length-cut-{place}.mp3"] = (bare[:size], cut)
    return files


def mp3_frame_end(data: bytes) -> int:
    """Where the next frame starts: the next header that agrees with the first one in format and rate."""
    at = 1
    while (data[at], data[at + 1], data[at + 2] & 0x0C) != (0xFF, data[1], data[2] & 0x0C):
        at += 1
    return at


def id3(size: int) -> bytes:
    return b"ID3\x04\x00\x00" + bytes([0, 0, size >> 7, size & 0x7F]) + bytes(size)


def other_containers() -> Files:
    files: Files = {}
    for kind in ("AIFF", "AU", "CAF", "W64", "RF64", "NIST"):
        data, suffix = encoded(kind, "PCM_16"), {"NIST": "wav", "RF64": "wav"}.get(kind, kind.lower())
        files[f"{kind}-good.{suffix}"] = (data, Good())
        for place, size in {"in-mark": 3, "in-header": 30, "in-samples": 12_000, "1-byte": len(data) - 1}.items():
            expected = FOREIGN if size == 3 else refused("truncated", "not-audio") if size == 30 else CUT
            files[f"{kind}-cut-{place}.{suffix}"] = (data[:size], expected)
    au = encoded("AU", "PCM_16")
    files["AU-from-a-pipe.au"] = (au[:8] + b"\xff\xff\xff\xff" + au[12:], Good())
    files["AIFF-float.aiff"] = (aiff(b"fl32", tone().astype(">f4").tobytes()), Good())
    files["AIFF-no-samples.aiff"] = (encoded("AIFF", "PCM_16").replace(b"SSND", b"S[[["), FOREIGN)
    files["CAF-unknown-size.caf"] = (with_caf_size(encoded("CAF", "PCM_16"), 2**64 - 1), FOREIGN)
    return files


def aiff(codec: bytes, samples: bytes) -> bytes:
    rate = bytes.fromhex("400CFA00000000000000")  # 16000 as a float of 80 bits
    parts = {b"COMM": struct.pack(">HIH", 1, 8_000, 32) + rate + codec + bytes(2), b"SSND": bytes(8) + samples}
    body = b"AIFC" + b"".join(kind + struct.pack(">I", len(part)) + part for kind, part in parts.items())
    return b"FORM" + struct.pack(">I", len(body)) + body


def with_caf_size(data: bytes, size: int) -> bytes:
    at = data.index(b"data") + 4
    return data[:at] + struct.pack(">Q", size) + data[at + 8 :]


def foreign_files() -> Files:
    """No audio at all, or audio that libsndfile does not read."""
    needs_ffmpeg = refused("needs-ffmpeg")
    box = struct.pack(">I4s", 24, b"ftyp") + b"M4A \x00\x00\x02\x00M4A isom"
    mdat = struct.pack(">I4s", 4_008, b"mdat") + noise(4_000)
    adts = (b"\xff\xf1\x50\x80\x20\x1f\xfc" + noise(249)) * 20
    files = {
        "empty.wav": (b"", refused("empty-file")),
        "one-byte.wav": (b"R", FOREIGN),
        "zeros.wav": (bytes(100_000), FOREIGN),
        "ones.mp3": (b"\xff" * 100_000, FOREIGN),
        "random.wav": (noise(100_000), FOREIGN),
        "text.wav": (b"A text file that somebody renamed.\n" * 100, FOREIGN),
        "text-utf16.mp3": (("\ufeff" + "Text. " * 500).encode("utf-16-le"), FOREIGN),
        "error-page.mp3": (b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n", FOREIGN),
        "error.flac": (b'{"error": {"code": 403, "message": "Forbidden"}}', FOREIGN),
        "lfs-pointer.wav": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", FOREIGN),
        "picture.png.wav": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + noise(4_000), FOREIGN),
        "picture.jpg.mp3": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + noise(4_000), FOREIGN),
        "zip.wav": (b"PK\x03\x04" + noise(4_000), FOREIGN),
        "gzip.wav": (b"\x1f\x8b\x08\x00" + noise(4_000), FOREIGN),
        "midi.wav": (b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x00\x60MTrk" + bytes(100), FOREIGN),
        "sampler.wav": (b"\x01\x04" + noise(4_000), FOREIGN),  # libsndfile takes it for an Akai sampler's
        "sample-dump.wav": (encoded("SDS", "PCM_16"), FOREIGN),  # libsndfile prints where such a file is damaged
        "m4a.m4a": (box + mdat, needs_ffmpeg),
        "m4a-called-wav.wav": (box + mdat, needs_ffmpeg),
        "m4a-cut.m4a": ((box + mdat)[:-1], CUT),
        "m4a-ftyp-only.m4a": (box, needs_ffmpeg),
        "aac.aac": (adts, needs_ffmpeg),
        "aac-id3-in-front.aac": (id3(100) + adts, needs_ffmpeg),
        "wma.wma": (bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C") + noise(4_000), needs_ffmpeg),
        "webm.webm": (b"\x1a\x45\xdf\xa3" + noise(4_000), needs_ffmpeg),
        "amr.wav": (b"#!AMR\n" + noise(4_000), needs_ffmpeg),
    }
    for kind in (b"RIFF", b"RIFF\xf0\x0f\x00\x00WAVE", b"FORM", b"fLaC", b"caff", b".snd", b"NIST_1A\n", b"RF64"):
        name = f"garbage-after-{kind[:4].decode().strip('.')}-{len(kind)}.wav"
        files[name] = (kind + noise(4_096 - len(kind)), refused("not-audio", "truncated"))
    return files


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def names() -> Files:
    """Good files whose names are the difficulty."""
    odd = (
        NOT_UTF8,
        UNREADABLE,
        "new\nline.wav",
        "tab\t.wav",
        "quotes'\".wav",
        "emoji-\U0001f3ba-\u97f3.wav",
        " space in front.wav",
        "-dash.wav",
        "percent%41%s{}.wav",
        "question?#hash.wav",
        "back\\slash.wav",
        "$(true);`true`.wav",
        "UPPER.WAV",
        "no-suffix",
        "dots..wav",
        "l" * 240 + ".wav",
    )
    return dict.fromkeys(odd, (wav(), Good()))
