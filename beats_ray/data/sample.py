"""A made-up labelled sample set in ESC-50's layout: ten classes of soundscapes for the demo and for tests.

    make_sample_set(Path("runs/demo/raw"))      # 400 clips of 5 s in 5 folds, the same bytes for the same seed

The classes differ in how sound moves through time, hardly in their mean spectrum: every clip gets a random colour,
loudness, noise floor and a distracting sound, so that a classifier on mean log-mel energies alone cannot solve it.
Files come as WAV, FLAC and Ogg, mono and stereo, at 8 to 48 kHz.
"""

import csv
import io
import multiprocessing
import os
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.soundscapes import SYNTHESISERS, Wave, coloured_noise, recolour

NUM_FOLDS = 5
RATES_HZ = (8_000, 22_050, 44_100, 48_000)
FORMATS = ("wav", "flac", "ogg")
LOUDNESS_RANGE_DB = 20.0
PEAK = 0.95
CLIPS_PER_TASK = 8


def make_sample_set(folder: Path, num_clips: int = 400, seed: int = 0, clip_seconds: float = 5.0) -> None:
    """Writes `folder/audio` and, last, `folder/meta/esc50.csv`; classes are balanced in every fold."""
    audio = folder / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    rows = [_row(index) for index in range(num_clips)]
    tasks = [(audio, row["filename"], index, seed, clip_seconds) for index, row in enumerate(rows)]
    context = multiprocessing.get_context("spawn")  # a fork of a process that already runs threads may hang
    processes = min(os.cpu_count() or 1, -(-num_clips // CLIPS_PER_TASK))
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for _ in pool.map(_write_clip, tasks, chunksize=CLIPS_PER_TASK):
            pass
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(_row(0)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    meta = folder / "meta"
    meta.mkdir(exist_ok=True)
    partial = meta / ".esc50.csv.partial"
    partial.write_text(table.getvalue())
    partial.replace(meta / "esc50.csv")


def make_clip(index: int, seed: int, clip_seconds: float) -> Wave:
    """The soundscape of clip `index` at 16 kHz: the class's sound, a distracting one, noise, at some loudness."""
    random = np.random.default_rng([seed, index])
    samples = round(clip_seconds * SAMPLE_RATE_HZ)
    names = list(SYNTHESISERS)
    target = index % len(names)
    distractor = names[(target + 1 + int(random.integers(len(names) - 1))) % len(names)]
    wave = _normalised(recolour(random, SYNTHESISERS[names[target]](random, samples)))
    other = _normalised(recolour(random, SYNTHESISERS[distractor](random, samples)))
    wave = wave + other * _gain(random.uniform(-20.0, -10.0)) * _fade_in_and_out(random, samples)
    wave = wave + _normalised(coloured_noise(random, samples)) * _gain(random.uniform(-24.0, -12.0))
    loudest = float(np.abs(wave).max())
    return wave / loudest * PEAK * _gain(-random.uniform(0.0, LOUDNESS_RANGE_DB))


def _row(index: int) -> dict[str, str]:
    names = list(SYNTHESISERS)
    target = index % len(names)
    fold = index // len(names) % NUM_FOLDS + 1
    suffix = FORMATS[_variety(index) % len(FORMATS)]
    source = 100_000 + index
    return {
        "filename": f"{fold}-{source}-A-{target}.{suffix}",
        "fold": str(fold),
        "target": str(target),
        "category": names[target],
        "src_file": str(source),
        "take": "A",
    }


def _variety(index: int) -> int:
    """A number that has nothing to do with the class, so that format and rate give no class away."""
    return zlib.crc32(f"clip {index}".encode()) >> 8


def _write_clip(task: tuple[Path, str, int, int, float]) -> None:
    folder, filename, index, seed, clip_seconds = task
    random = np.random.default_rng([seed, index, 1])
    rate_hz = RATES_HZ[_variety(index) // len(FORMATS) % len(RATES_HZ)]
    wave = make_clip(index, seed, clip_seconds)
    wave = soxr.resample(wave, SAMPLE_RATE_HZ, rate_hz, quality="HQ")
    if random.random() < 0.5:
        balance = random.uniform(0.3, 0.7)
        wave = np.stack([wave * 2 * balance, wave * 2 * (1 - balance)], axis=1)
        wave *= min(1.0, PEAK / float(np.abs(wave).max()))
    (folder / filename).write_bytes(_encode(wave, rate_hz, filename.rsplit(".", 1)[1], index))


def _encode(wave: Wave, rate_hz: int, suffix: str, serial: int) -> bytes:
    buffer = io.BytesIO()
    subtype = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}[suffix]
    soundfile.write(buffer, wave, rate_hz, format=suffix.upper(), subtype=subtype)
    data = buffer.getvalue()
    return _with_ogg_serial(data, serial) if suffix == "ogg" else data


def _with_ogg_serial(data: bytes, serial: int) -> bytes:
    """The Ogg stream with a given serial number: the encoder draws one from the clock."""
    pages, position = bytearray(data), 0
    while position < len(pages):
        segments = pages[position + 26]
        end = position + 27 + segments + sum(pages[position + 27 : position + 27 + segments])
        pages[position + 14 : position + 18] = serial.to_bytes(4, "little")
        pages[position + 22 : position + 26] = bytes(4)
        pages[position + 22 : position + 26] = _ogg_crc(bytes(pages[position:end])).to_bytes(4, "little")
        position = end
    return bytes(pages)


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """Ogg's checksum: zlib's polynomial with the bits the other way round, start 0 and no final inversion."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _normalised(wave: Wave) -> Wave:
    return wave / max(float(np.sqrt(np.mean(wave**2))), 1e-9)


def _gain(decibels: float) -> float:
    return float(10.0 ** (decibels / 20.0))


def _fade_in_and_out(random: np.random.Generator, samples: int) -> Wave:
    """The distracting sound is there for a part of the clip only."""
    length = int(random.uniform(0.3, 0.7) * samples)
    start = int(random.integers(samples - length + 1))
    envelope = np.zeros(samples)
    envelope[start : start + length] = np.hanning(length)
    return envelope
