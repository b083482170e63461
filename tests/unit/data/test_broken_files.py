"""Every file of the corpus is decoded, or refused with its reason; none raises anything else or prints."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from beats_ray.data import decode_ffmpeg
from beats_ray.data.decode import BadAudio, decode_clip
from beats_ray.data.flac import WaveInt16
from beats_ray.data.source import AUDIO_SUFFIXES, list_audio
from beats_ray.data.storage import open_place
from tests.unit.data.broken_files import (
    AMPLITUDE,
    FOLDER,
    GOOD,
    NOT_UTF8,
    RATE_HZ,
    TONE_HZ,
    UNREADABLE,
    Expected,
    write_broken_files,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    folder = tmp_path_factory.mktemp("broken")
    return folder, write_broken_files(folder)


@pytest.fixture(autouse=True)
def _nothing_but_libsndfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_ffmpeg, "_torchcodec", lambda: None)
    monkeypatch.setenv("PATH", "")


def _outcome(path: Path) -> BadAudio | WaveInt16:
    try:
        return decode_clip(path.read_bytes(), path.name)
    except BadAudio as error:
        return error


def _fault(name: str, expected: Expected, outcome: BadAudio | WaveInt16) -> str:
    """What is wrong with the outcome; empty where it is as expected."""
    if isinstance(outcome, BadAudio):
        reasons = expected if isinstance(expected, frozenset) else frozenset({GOOD})
        is_right = outcome.reason in reasons and name in outcome.detail
        return "" if is_right else f"{outcome}, not one of {sorted(reasons)}"
    if isinstance(expected, frozenset):
        return "" if GOOD in expected else f"decoded, not one of {sorted(expected)}"
    if outcome.dtype != np.int16 or abs(outcome.size - expected.samples) > expected.tolerance:
        return f"{outcome.size} samples of {outcome.dtype}, not {expected.samples} of int16"
    if expected.is_tone and not 0.9 < _tone_amplitude(outcome) / AMPLITUDE < 1.1:
        return f"a tone of {_tone_amplitude(outcome):.3f}, not of {AMPLITUDE}"
    return ""


def _tone_amplitude(wave: WaveInt16) -> float:
    """Of the tone in the middle half: an integral number of its periods, where no codec's delay matters."""
    period = 400  # samples, in which 440 Hz swings 11 times
    middle = wave[wave.size // 4 : wave.size // 4 + wave.size // 2 // period * period] / 32768
    return float(2 * abs(np.mean(middle * np.exp(-2j * np.pi * TONE_HZ * np.arange(middle.size) / RATE_HZ))))


def test_every_broken_file_gets_its_reason_and_every_odd_one_is_decoded(
    corpus: tuple[Path, dict[str, Expected]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expectations = corpus
    assert len(expectations) >= 70
    faults = {}
    monkeypatch.setattr(sys, "unraisablehook", lambda found: print(found.exc_value, file=sys.stderr))
    for name, expected in expectations.items():
        path = folder / name
        if not os.access(path, os.R_OK):
            assert name == UNREADABLE
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if fault := _fault(name, expected, _outcome(path)):
                faults[name] = fault
        if any(printed := capfd.readouterr()):
            faults[name] = f"printed {printed}"
    assert not faults, "\n".join(f"{name!r}: {fault}" for name, fault in faults.items())


def test_the_corpus_is_the_same_every_time(corpus: tuple[Path, dict[str, Expected]], tmp_path: Path) -> None:
    folder, expectations = corpus
    assert write_broken_files(tmp_path) == expectations
    for name in expectations.keys() - {UNREADABLE}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_folder_that_is_named_like_a_clip_is_no_clip_and_odd_names_are_listed(
    corpus: tuple[Path, dict[str, Expected]],
) -> None:
    folder, expectations = corpus
    (folder / NOT_UTF8).unlink(missing_ok=True)
    listed = list_audio(open_place(str(folder)))
    suffixes = tuple(f".{suffix}" for suffix in AUDIO_SUFFIXES)
    assert listed.keys() == {name for name in expectations if name.lower().endswith(suffixes)} - {NOT_UTF8}
    assert FOLDER not in listed
    for name in listed.keys() - {UNREADABLE}:
        assert (open_place(str(folder)) / name).read_bytes() == (folder / name).read_bytes()
