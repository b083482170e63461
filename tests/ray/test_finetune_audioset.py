"""AudioSet as published, small: prepare, fine-tune, evaluate; streamed clips train as cached ones do.

The figures are compared with scikit-learn's on logits that the published model gives in this process.
"""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import average_precision_score

import beats_ray
from beats_ray.config import EvaluateConfig, FinetuneConfig, PrepareConfig, load_config
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.prepare import prepare
from beats_ray.data.storage import open_place
from beats_ray.evaluate import run_evaluate
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.objectstore import EmbeddedObjectStore
from beats_ray.train.context import single_process_context
from beats_ray.train.jobs import Run, load_cache, run_finetune
from beats_ray.train.metrics import read_metrics
from beats_ray.train.streaming import StreamedRun, TrainStream
from beats_ray.train.worker import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("process_group")]

NUM_CLASSES, USED_CLASSES = 527, 12
SEGMENTS = {"balanced_train": 26, "unbalanced_train": 20, "eval": 17}
MISSING = {"balanced_train": 2, "eval": 1}  # recordings that are gone from the web
HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=1, num_segs=1, num_unique_labels=1, num_positive_labels=1\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)


@dataclass(frozen=True)
class AudioSet:
    """A prepared set, and what the published tables say of it."""

    path: Path
    manifest: DatasetManifest
    encoder: Path
    eval_waves: dict[str, np.ndarray]
    eval_labels: dict[str, list[int]]


def write_tables(folder: Path) -> dict[str, dict[str, list[int]]]:
    """The tables in the published format, the rows of the classes shuffled; returns each subset's labels by video."""
    rng = random.Random(0)
    rows = [
        (index, f"/m/{7 * index % NUM_CLASSES:04d}", f"Class {index}, or {index + 1}") for index in range(NUM_CLASSES)
    ]
    mids = [mid for _, mid, _ in rows]
    rng.shuffle(rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("index", "mid", "display_name"), *rows])
    (folder / "class_labels_indices.csv").write_text(text.getvalue())
    subsets: dict[str, dict[str, list[int]]] = {}
    for subset, clips in SEGMENTS.items():
        labels = {
            f"{subset[:3]}-{number:07d}": sorted({number % USED_CLASSES * 40, *rng.sample([0, 80, 160], number % 3)})
            for number in range(clips)
        }
        lines = [f'{video}, 30.000, 40.000, "{",".join(mids[i] for i in ids)}"\n' for video, ids in labels.items()]
        (folder / f"{subset}_segments.csv").write_text(HEADER + "".join(lines))
        subsets[subset] = labels
    return subsets


@pytest.fixture(scope="module")
def audioset(cluster: EmbeddedObjectStore, tmp_path_factory: pytest.TempPathFactory) -> AudioSet:
    folder = tmp_path_factory.mktemp("audioset")
    source = folder / "raw"
    source.mkdir()
    subsets = write_tables(source)
    rng = np.random.default_rng(0)
    waves: dict[str, np.ndarray] = {}
    for subset, labels in subsets.items():
        (source / subset).mkdir()
        for video in list(labels)[MISSING.get(subset, 0) :]:
            tone = np.sin(np.arange(6000 + 500 * rng.integers(8)) * (0.02 + 0.02 * labels[video][-1] / 40))
            waves[video] = np.round(8000 * tone + 900 * rng.normal(size=len(tone))).astype(np.int16)
            soundfile.write(source / subset / f"Y{video}.wav", waves[video], 16_000)
    config = PrepareConfig(
        kind="audioset", source=str(source), output=str(folder / "data"),
        data={"row_group_clips": 8, "shard_mib": 0.2},
    )  # fmt: skip
    manifest = prepare(config, lambda *_: None)
    torch.manual_seed(0)
    tiny = encoder_config("tiny", num_layers=1, width=32, num_heads=2, ffn_width=64)
    save_model(BeatsEncoder(tiny), folder / "encoder")
    wanted = {video: wave for video, wave in waves.items() if video in subsets["eval"]}
    return AudioSet(folder / "data", manifest, folder / "encoder", wanted, subsets["eval"])


def config_of(audioset: AudioSet, output: Path, *overrides: str) -> FinetuneConfig:
    given = [
        f"data.path={audioset.path}", f"encoder={audioset.encoder}", f"output={output}", "data.clip_seconds=0.5",
        "data.sampling=balanced", "data.read_tasks=1", "data.shuffle_window_clips=16", "validate_every_steps=2",
        "train.steps=6", "train.warmup_steps=1", "train.learning_rate=0.003", "train.global_batch_size=8",
        "train.micro_batch_size=4", "train.log_every_steps=1", "train.checkpoint_every_steps=2", "train.loggers=[]",
        "train.cpus_per_worker=0.25", "layer_drop=0",  # which workers draw each for itself
    ]  # fmt: skip
    return load_config(FinetuneConfig, None, [*given, *overrides])


def reference_precision(audioset: AudioSet, model: Path) -> float:
    """scikit-learn's macro average precision of the published model over the classes that the eval clips have."""
    classifier = beats_ray.load(model)
    classifier.eval()
    truth = np.zeros((len(audioset.eval_waves), NUM_CLASSES), dtype=bool)
    logits = []
    for row, (video, wave) in enumerate(audioset.eval_waves.items()):
        truth[row, audioset.eval_labels[video]] = True
        middle = (max(0, len(wave) - 8000) // 2560) // 2 * 2560  # what evaluation of longer clips looks at
        cut = torch.from_numpy(wave[middle : middle + 8000]).float() / 32768.0
        with torch.no_grad():
            fbank, frames = classifier.encoder.normalised_fbank(cut[None], torch.tensor([len(cut)]))
            logits.append(classifier(fbank, frames)[0].numpy())
    present = truth.any(0)
    return float(average_precision_score(truth[:, present], np.stack(logits)[:, present], average="macro"))


SHORT = ("train.steps=4", "train.micro_batch_size=2")


def test_a_set_of_the_published_form_is_prepared_fine_tuned_and_evaluated(audioset: AudioSet, tmp_path: Path) -> None:
    manifest = audioset.manifest
    assert manifest.label_names == tuple(f"Class {index}, or {index + 1}" for index in range(NUM_CLASSES))
    assert manifest.multi_label
    assert manifest.missing == sum(MISSING.values())
    assert manifest.clips_by_split == {name: clips - MISSING.get(name, 0) for name, clips in SEGMENTS.items()}

    run_finetune(
        config_of(audioset, tmp_path / "run", *SHORT, "data.cache=never", "train.num_workers=2"),
        Console(),
    )
    records = read_metrics(open_place(str(tmp_path / "run")))
    expected = reference_precision(audioset, tmp_path / "run" / "model")
    assert [record["step"] for record in records if "validation/mean_average_precision" in record] == [2, 4]
    assert records[-1]["test/mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    assert (
        0.0 < records[0]["train/loss"] < 1.0
    )  # a mean over clips and classes of binary cross-entropy: log 2 at chance
    assert tuple(json.loads((tmp_path / "run" / "model" / "labels.json").read_text())) == manifest.label_names

    run_evaluate(
        EvaluateConfig(
            output=str(tmp_path / "evaluation"), model=str(tmp_path / "run" / "model"), num_workers=1,
            data={"path": str(audioset.path), "splits": ["eval"], "clip_seconds": 0.5},
        ),
        Console(),
    )  # fmt: skip
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert result["mean_average_precision"] == pytest.approx(expected, abs=1e-6)

    # One worker with the same global batches, from the cache: the streams of two workers dealt the same clips.
    alone = train_alone(audioset, config_of(audioset, tmp_path / "alone", *SHORT), cached=True)
    for one, other in zip(records, alone, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
    for name in ("validation/mean_average_precision", "validation/loss", "test/loss"):
        assert records[-1][name] == pytest.approx(alone[-1][name], rel=1e-4)


def train_alone(
    audioset: AudioSet,
    config: FinetuneConfig,
    cached: bool,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, Any]]:
    """The reports of a run in this process, from the cache or from the streams of Ray Data."""
    output = open_place(config.output)
    run = Run("finetune", config, read_manifest(open_place(config.data.path)), output, {})
    if cached:
        run = replace(run, cache=load_cache(config.data, run.manifest))
    streams = TrainStream(
        StreamedRun(run.data, run.train, run.manifest, "", output / "checkpoints", run.streamed_parts())
    )
    context = single_process_context(report or (lambda *_: None))
    train(run, context, share=lambda name: streams.shares(name, 1)[0])
    return read_metrics(output)


@pytest.mark.slow  # the batches are held against each other in test_stream.py, losses and figures above
def test_streamed_clips_train_as_cached_ones_do_and_a_run_goes_on_bit_for_bit(
    audioset: AudioSet, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, _metrics: dict[str, float]) -> None:
        if step == 5:
            raise Stopped

    cached = train_alone(audioset, config_of(audioset, tmp_path / "cached"), cached=True)
    streamed_config = config_of(audioset, tmp_path / "streamed", "data.cache=never")
    with pytest.raises(Stopped):
        train_alone(audioset, streamed_config, cached=False, report=stop)
    assert (tmp_path / "streamed" / "checkpoints" / "step-00000004").exists()
    streamed = train_alone(audioset, streamed_config, cached=False)

    timeless = [
        [{name: value for name, value in record.items() if name.split("/")[0] in ("step", "train", "validation", "test")
          and name != "train/recoveries"} for record in records]
        for records in (cached, streamed)
    ]  # fmt: skip
    assert [record["step"] for record in timeless[0]] == [1, 2, 3, 4, 5, 6]
    assert timeless[0] == timeless[1]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cached", "streamed")]
    assert weights[0] == weights[1]
