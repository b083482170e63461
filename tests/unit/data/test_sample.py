"""The sample set: deterministic, balanced, mixed in format, learnable but not from mean energies alone."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from beats_ray.config import LayoutSettings
from beats_ray.data.datasets.esc50 import read_esc50
from beats_ray.data.decode import decode_clip
from beats_ray.data.sample import make_clip, make_sample_set
from beats_ray.data.storage import open_place
from beats_ray.models.fbank import compute_fbank

pytestmark = pytest.mark.unit

FOLDS = range(1, 6)


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_seed_fixes_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_sample_set(tmp_path / name, num_clips=24, seed=seed, clip_seconds=0.5)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert _digest(tmp_path / "a") != _digest(tmp_path / "c")


def test_a_clip_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    for count in (10, 20):
        make_sample_set(tmp_path / str(count), num_clips=count, clip_seconds=0.5)
    for path in (tmp_path / "10/audio").iterdir():
        assert (tmp_path / "20/audio" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sample")
    make_sample_set(folder)
    return folder


def test_it_is_esc50_with_balanced_folds_and_nothing_to_quarantine(sample_set: Path) -> None:
    listing = read_esc50(open_place(str(sample_set)), LayoutSettings())
    assert listing.quarantined == []
    assert len(listing.clips) == 400
    assert len(listing.label_names) == 10
    assert set(Counter((clip.fold, clip.labels) for clip in listing.clips).values()) == {8}


def test_rates_channels_formats_and_loudness_are_mixed_and_give_no_class_away(sample_set: Path) -> None:
    kinds, by_class, peaks = Counter[tuple[str, int, int]](), Counter[tuple[str, str]](), []
    for path in (sample_set / "audio").iterdir():
        wave, rate_hz = soundfile.read(path, always_2d=True)
        kinds[path.suffix, rate_hz, wave.shape[1]] += 1
        by_class[path.stem.rsplit("-", 1)[1], path.suffix] += 1
        assert abs(len(wave) - 5 * rate_hz) <= 1
        peaks.append(20 * np.log10(np.abs(wave).max()))
    assert {rate for _, rate, _ in kinds} == {8_000, 22_050, 44_100, 48_000}
    assert {suffix for suffix, _, _ in kinds} == {".wav", ".flac", ".ogg"}
    assert len(kinds) == 24  # every combination with mono and stereo
    assert 15 < max(peaks) - min(peaks) < 25
    assert max(by_class.values()) < 25  # of 40 clips of a class, none of the three formats takes most


def test_clips_of_one_class_differ() -> None:
    one, two = (make_clip(index, 0, 1.0) for index in (3, 13))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.5


def _features(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Mean log-mel energies, mean and deviation of 20 MFCCs, targets, folds."""
    with (folder / "meta/esc50.csv").open() as table:
        rows = list(csv.DictReader(table))
    mean_log_mel, mfcc = [], []
    for row in rows:
        wave = decode_clip((folder / "audio" / row["filename"]).read_bytes(), row["filename"])
        fbank = compute_fbank(torch.from_numpy(wave)[None])[0][0].double().numpy()
        cepstra = dct(fbank, norm="ortho", axis=1)[:, :20]
        mean_log_mel.append(fbank.mean(0))
        mfcc.append(np.concatenate([cepstra.mean(0), cepstra.std(0)]))
    targets = np.array([int(row["target"]) for row in rows])
    return np.array(mean_log_mel), np.array(mfcc), targets, np.array([int(row["fold"]) for row in rows])


def _accuracy(
    model: Pipeline, features: NDArray[np.float64], target: NDArray[np.int64], fold: NDArray[np.int64]
) -> float:
    """5-fold accuracy."""
    right = 0
    for held_out in FOLDS:
        train, test = fold != held_out, fold == held_out
        right += int((model.fit(features[train], target[train]).predict(features[test]) == target[test]).sum())
    return right / len(target)


def test_it_is_learnable_but_not_from_mean_energies_alone(sample_set: Path) -> None:
    with threadpool_limits(1):  # on matrices this small, threads only wait for each other
        mean_log_mel, mfcc, target, fold = _features(sample_set)
        linear = _accuracy(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)), mean_log_mel, target, fold
        )
        forest = _accuracy(make_pipeline(RandomForestClassifier(100, random_state=0)), mfcc, target, fold)
    assert 0.45 < linear < 0.75  # chance is 0.1
    assert linear + 0.05 < forest < 0.9
