"""The sounds that the sample set is made of: one function for each class, from random numbers to a 16 kHz waveform.

The energy of all classes lies between about 200 and 3400 Hz, so that clips at 8 kHz keep it. Noise-like classes share
their spectrum, tonal ones too: within each kind only the movement in time tells them apart.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from beats_ray.data.plan import SAMPLE_RATE_HZ

LOWEST_HZ = 200.0
HIGHEST_HZ = 3400.0

Wave = NDArray[np.float64]
Random = np.random.Generator


def recolour(random: Random, wave: Wave, depth_db: float = 6.0) -> Wave:
    """`wave` through a smooth random filter, as another room or microphone would give it."""
    spectrum = np.fft.rfft(wave)
    knots = random.uniform(-depth_db, depth_db, 9)
    octaves = np.log2(np.maximum(_frequencies(wave.size), 50.0) / 50.0)
    gain_db = np.interp(octaves, np.linspace(0.0, 7.4, knots.size), knots)
    return np.fft.irfft(spectrum * 10.0 ** (gain_db / 20.0), n=wave.size)


def coloured_noise(random: Random, samples: int) -> Wave:
    """Stationary noise whose spectrum falls by 0 to 6 dB an octave."""
    spectrum = np.fft.rfft(random.standard_normal(samples))
    return np.fft.irfft(spectrum * np.maximum(_frequencies(samples), 50.0) ** -random.uniform(0.0, 1.0), n=samples)


def _rising_sweeps(random: Random, samples: int) -> Wave:
    return _sweeps(random, samples, upwards=True)


def _falling_sweeps(random: Random, samples: int) -> Wave:
    return _sweeps(random, samples, upwards=False)


def _siren(random: Random, samples: int) -> Wave:
    """A tone that glides up and down slowly."""
    time = _time(samples)
    position = 0.5 + 0.5 * np.sin(2 * np.pi * (random.uniform(0.25, 0.6) * time + random.random()))
    return _tone(random, LOWEST_HZ * 1.5 * 2.0 ** (position * random.uniform(2.0, 3.0)))


def _warble(random: Random, samples: int) -> Wave:
    """A tone that jumps to a new pitch several times a second."""
    time = _time(samples)
    step = np.floor(time * random.uniform(5.0, 9.0)).astype(int)
    octaves = random.uniform(0.0, 3.0, int(step[-1]) + 1 if samples else 1)
    return _tone(random, LOWEST_HZ * 1.5 * 2.0 ** _smoothed(octaves[step], 0.004))


def _vibrato(random: Random, samples: int) -> Wave:
    """Long notes whose pitch trembles."""
    time = _time(samples)
    step = np.floor(time * random.uniform(0.5, 1.0)).astype(int)
    octaves = random.uniform(0.3, 2.7, int(step[-1]) + 1 if samples else 1)[step]
    tremble = random.uniform(0.05, 0.12) * np.sin(2 * np.pi * random.uniform(5.0, 8.0) * time)
    return _tone(random, LOWEST_HZ * 1.5 * 2.0 ** (_smoothed(octaves, 0.02) + tremble))


def _steady_hiss(random: Random, samples: int) -> Wave:
    """Noise that swells slowly."""
    swell = np.sin(2 * np.pi * (random.uniform(0.2, 0.5) * _time(samples) + random.random()))
    return _band_noise(random, samples) * 10.0 ** (0.35 * swell)


def _clock(random: Random, samples: int) -> Wave:
    """Short noise pulses at even distances."""
    interval = 1.0 / random.uniform(3.0, 6.0)
    times = np.arange(random.uniform(0.0, interval), samples / SAMPLE_RATE_HZ, interval)
    return _pulses(random, samples, times, random.uniform(0.01, 0.03), 1.0)


def _crackle(random: Random, samples: int) -> Wave:
    """Short noise pulses at random moments, as many as a clock's."""
    seconds = samples / SAMPLE_RATE_HZ
    times = np.sort(random.uniform(0.0, seconds, max(1, random.poisson(random.uniform(3.0, 6.0) * seconds))))
    return _pulses(random, samples, times, random.uniform(0.01, 0.03), 0.6)


def _engine(random: Random, samples: int) -> Wave:
    """Noise that beats fast and evenly."""
    rate = random.uniform(14.0, 22.0) * (1.0 + 0.1 * np.sin(2 * np.pi * 0.3 * _time(samples) + random.uniform(0, 6.28)))
    beat = 0.5 + 0.5 * np.sin(2 * np.pi * np.cumsum(rate) / SAMPLE_RATE_HZ)
    return _band_noise(random, samples) * (0.05 + beat**3)


def _breaths(random: Random, samples: int) -> Wave:
    """Noise that comes and goes once or twice a second, sharp at its start."""
    phase = (random.uniform(0.9, 1.8) * _time(samples) + random.random()) % 1.0
    return _band_noise(random, samples) * (0.03 + np.exp(-phase * random.uniform(3.0, 5.0)))


SYNTHESISERS: dict[str, Callable[[Random, int], Wave]] = {
    "rising_sweeps": _rising_sweeps,
    "falling_sweeps": _falling_sweeps,
    "siren": _siren,
    "warble": _warble,
    "vibrato": _vibrato,
    "steady_hiss": _steady_hiss,
    "clock": _clock,
    "crackle": _crackle,
    "engine": _engine,
    "breaths": _breaths,
}
"""Class name to sound; the order gives the targets."""


def _time(samples: int) -> Wave:
    return np.arange(samples) / SAMPLE_RATE_HZ


def _frequencies(samples: int) -> Wave:
    return np.fft.rfftfreq(samples, 1.0 / SAMPLE_RATE_HZ).astype(np.float64)


def _sweeps(random: Random, samples: int, upwards: bool) -> Wave:
    phase = (random.uniform(1.0, 2.5) * _time(samples) + random.random()) % 1.0
    position = phase if upwards else 1.0 - phase
    return _tone(random, LOWEST_HZ * 1.5 * 2.0 ** (_smoothed(position, 0.004) * random.uniform(2.0, 3.0)))


def _tone(random: Random, frequency_hz: Wave) -> Wave:
    """A tone with a weaker first overtone that follows a pitch, with an unsteady loudness."""
    phase = 2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE_HZ
    overtone = random.uniform(0.1, 0.5) * np.sin(2 * phase) * (2 * frequency_hz < HIGHEST_HZ)
    unsteady = 1.0 + 0.3 * np.sin(2 * np.pi * (random.uniform(0.3, 1.0) * _time(phase.size) + random.random()))
    return (np.sin(phase) + overtone) * unsteady


def _band_noise(random: Random, samples: int) -> Wave:
    spectrum = np.fft.rfft(random.standard_normal(samples))
    frequencies = _frequencies(samples)
    return np.fft.irfft(spectrum * ((frequencies > LOWEST_HZ) & (frequencies < HIGHEST_HZ)), n=samples)


def _pulses(random: Random, samples: int, times: Wave, decay_seconds: float, spread: float) -> Wave:
    envelope = np.full(samples, 0.01)
    length = int(6 * decay_seconds * SAMPLE_RATE_HZ)
    shape = np.exp(-np.arange(length) / (decay_seconds * SAMPLE_RATE_HZ))
    for start in (times * SAMPLE_RATE_HZ).astype(int):
        stop = min(start + length, samples)
        loudness = 1.0 if spread == 1.0 else random.uniform(1.0 - spread, 1.0)
        envelope[start:stop] = np.maximum(envelope[start:stop], loudness * shape[: stop - start])
    return _band_noise(random, samples) * envelope


def _smoothed(values: Wave, seconds: float) -> Wave:
    """A moving average: pitch never jumps within one sample, which would click."""
    width = max(1, int(seconds * SAMPLE_RATE_HZ))
    total: Wave = np.cumsum(np.pad(values, (width, 0), mode="edge"))
    return (total[width:] - total[:-width]) / width
