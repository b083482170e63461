"""Folders of runs as the product leaves them, made in a moment: what the report and the browser look at.

build_run(folder)            two iterations of `iterate`, or one that is in the middle of pre-training
build_full_run(folder)       the same with everything that a report can show: sounds, many trials, faults
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.data.flac import encode_flac
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.storage import Place, open_place, write_table
from beats_ray.judgement import Predictions, judge, write_judgement

LABELS = [
    "dog",
    "rooster",
    "rain",
    "sea waves",
    "fire",
    "crying baby",
    "sneezing",
    "clock tick",
    "helicopter",
    "chainsaw",
]
CONFIG = {
    "iterations": 2,
    "data": {"path": "s3://bucket/esc10"},
    "finetune": {"folds": {"test_fold": 1, "validation_fold": 2}},
}


def correct_string(right: int, shift: int = 0) -> str:
    """400 clips of which `right` are right; `shift` changes which ones."""
    return "".join("01"[(clip * 37 + shift) % 400 < right] for clip in range(400))


def evaluation(right: int) -> dict[str, Any]:
    accuracy = right / 400
    return {
        "kind": "encoder", "accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / 400),
        "fold_accuracies": {str(fold): accuracy for fold in range(1, 6)}, "clips": 400,
        "correct": correct_string(right),
    }  # fmt: skip


def training_metrics(reports: int, start: float, floor: float, tokenizer: bool = False) -> list[dict[str, Any]]:
    records = []
    for report in range(1, reports + 1):
        progress = 1 - math.exp(-3 * report / reports)
        record: dict[str, Any] = {"step": report * 10, "clips": report * 160, "seconds": report * 2.1}
        record["train/loss"] = start + (floor - start) * progress + 0.03 * math.sin(report * 2.3)
        record |= {
            "perf/clips_per_s": 74 + 6 * math.sin(report),
            "data/wait_fraction": 0.02,
            "train/learning_rate": 5e-4,
        }
        if tokenizer:
            record |= {"tokenizer/used_code_fraction": 0.4 * progress, "tokenizer/perplexity": 20 + 90 * progress}
        else:
            record |= {"train/masked_accuracy": 0.55 * progress, "train/clip_band_accuracy": 0.388}
            record["train/clip_band_loss"] = 3.21 + 0.02 * math.sin(report * 1.7)
        records.append(record)
    return records


def trial(number: int, steps: int) -> dict[str, Any]:
    history = [
        {"step": step, "validation/accuracy": 0.8 - 0.05 * number - 0.4 * math.exp(-step / 60)}
        for step in range(20, steps + 1, 20)
    ]
    return {
        "trial_id": f"a1b2c_0000{number}", "status": "complete", "steps": steps, "stopped_early": steps < 160,
        "config": {"train.learning_rate": 10 ** -(3 + number / 4), "train.layer_decay": 0.6, "augment.mixup": 0.4},
        "validation_accuracy": history[-1]["validation/accuracy"], "test_accuracy": 0.7375 if steps == 160 else None,
        "history": history,
    }  # fmt: skip


def put_stage(place: Place, status: str, metrics: list[dict[str, Any]] | None = None, **files: Any) -> None:
    place_config = {"train": {"steps": 800, "learning_rate": 0.0005}}
    (place / "stage.json").write_json({"status": status, "seconds": 171.3, "config": place_config})
    if metrics is not None:
        (place / "metrics.jsonl").write_bytes("".join(json.dumps(record) + "\n" for record in metrics).encode())
    for name, value in files.items():
        (place / f"{name}.json").write_json(value)


def build_run(folder: Path, finished_iterations: int = 2) -> Place:
    """A run as `iterate` leaves it; with fewer finished iterations, one that is in the middle of pre-training."""
    run = open_place(str(folder))
    (run / "run.json").write_json({"name": "esc10-demo", "started": "2026-11-22T18:00:00+00:00", "config": CONFIG})
    folds = {str(fold): 80 for fold in range(1, 6)}
    (run / "data" / "dataset.json").write_json(
        {"name": "esc10", "clips": 400, "seconds": 1993.4, "label_names": LABELS, "clips_by_fold": folds,
         "source_files": 403, "quarantined": 3, "source": "clips/esc10", "shards": [{"file": "0.parquet"}]}
    )  # fmt: skip
    bad = {"file": ["5-1.wav", "5-2.wav", "<b>x.wav"], "reason": ["empty file", "empty file", "NaN samples"]}
    write_table(run / "data" / "quarantine.parquet", pa.table(bad))
    baselines = {"random_forest_mfcc": evaluation(336), "mean_log_mel": evaluation(262)}
    (run / "baselines.json").write_json(baselines)
    put_stage(run / "iteration-0" / "pretrain", "complete")
    put_stage(run / "iteration-0" / "probe", "complete", evaluation=evaluation(270))
    for index in range(1, finished_iterations + 1):
        place = run / f"iteration-{index}"
        put_stage(place / "tokenizer", "complete", training_metrics(60, 1.1, 0.3, True) if index > 1 else None)
        if index > 1:
            counts = [int(9000 / (rank + 1)) if rank < 420 else 0 for rank in range(1024)]
            put_stage(
                place / "labels",
                "complete",
                labels={"used_code_fraction": 0.41, "perplexity": 96.4, "code_counts": counts},
            )
        put_stage(place / "pretrain", "complete", training_metrics(80, 6.9, 2.6))
        put_stage(place / "probe", "complete", evaluation=evaluation(310 + 8 * index))
        trials = [trial(0, 160), trial(1, 80), trial(2, 40), trial(3, 20)]
        put_stage(
            place / "sweep",
            "complete",
            leaderboard={"metric": "validation/accuracy", "trials": trials, "best": trials[0], "test_clips": 80},
        )
    if finished_iterations < 2:
        place = run / f"iteration-{finished_iterations + 1}"
        put_stage(
            place / "pretrain", "running", training_metrics(20, 6.9, 4.0), progress=training_metrics(23, 6.9, 4.0)[-1]
        )
    return run


# --- everything that a report can show --------------------------------------------------------------------------------

SPACE = {
    "train.learning_rate": {"distribution": "loguniform", "low": 1e-4, "high": 1e-2, "values": []},
    "train.layer_decay": {"distribution": "choice", "low": None, "high": None, "values": [0.4, 0.6, 0.8, 1.0]},
    "augment.mixup": {"distribution": "choice", "low": None, "high": None, "values": [0.0, 0.4, 0.8]},
    "freeze_encoder": {"distribution": "choice", "low": None, "high": None, "values": [False, True]},
}


def write_audible_dataset(folder: Path, label_names: list[str], clip_seconds: float = 5.0) -> DatasetManifest:
    """A prepared data set that can be heard: one tone a clip, of its class's pitch, one clip a class and fold."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("clip_id", pa.string()), ("audio", pa.binary()), ("num_samples", pa.int32()),
                        ("labels", pa.list_(pa.int16())), ("fold", pa.int8()), ("split", pa.string())])  # fmt: skip
    path, samples = folder / "shards" / "00000.parquet", round(16_000 * clip_seconds)
    groups = []
    with pq.ParquetWriter(path, schema) as writer:
        for fold in range(1, 6):
            rows = []
            for label in range(len(label_names)):
                envelope = np.exp(-(((np.arange(samples) / samples - 0.7) / 0.2) ** 2))
                wave = 9000 * envelope * np.sin(2 * np.pi * (200 + 40 * label) / 16_000 * np.arange(samples))
                rows.append({"clip_id": f"{fold}-{label:03}", "audio": encode_flac(wave.astype(np.int16)),
                             "num_samples": samples, "labels": [label], "fold": fold, "split": ""})  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema))
            groups.append(RowGroup(clips=len(rows), fold=fold, split=""))
    shard = Shard(file=path.name, sha256="0", bytes=path.stat().st_size, row_groups=tuple(groups))
    clips = 5 * len(label_names)
    manifest = DatasetManifest(
        name="tones", label_names=tuple(label_names), clips=clips,
        clips_by_fold={str(fold): len(label_names) for fold in range(1, 6)}, clips_by_split={"": clips},
        seconds=clips * clip_seconds, fbank_mean=15.0, fbank_std=6.0, source="tones", source_files=clips + 3,
        quarantined=3, skipped=2, missing=1, shards=(shard,),
    )  # fmt: skip
    (folder / "dataset.json").write_text(manifest.model_dump_json())
    return manifest


def confused_predictions(manifest: DatasetManifest, seed: int = 0) -> Predictions:
    """Predictions of every clip, of which about a third are wrong, most often the next class."""
    generator = np.random.default_rng(seed)
    classes = len(manifest.label_names)
    labels = [label for _ in range(5) for label in range(classes)]
    probability_NC = generator.dirichlet(np.full(classes, 0.3), len(labels)) * 0.3
    for index, label in enumerate(labels):
        taken = label if generator.random() < 0.65 else (label + 1) % classes
        probability_NC[index, taken] += 0.7
    ids = [f"{fold}-{label:03}" for fold in range(1, 6) for label in range(classes)]
    folds = np.repeat(np.arange(1, 6), classes)
    return Predictions(ids, folds, [[label] for label in labels], probability_NC, manifest.label_names, False)


def swept_trials(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Trials whose result is a matter of the learning rate, best near 1e-3, and a little of noise; the last failed."""
    generator = np.random.default_rng(seed)
    trials = []
    for index in range(count):
        rate = float(10 ** generator.uniform(-4, -2))
        value = 0.8 - 0.25 * (math.log10(rate) + 3) ** 2 + 0.01 * float(generator.normal())
        steps = 160 if index % 3 == 0 else 40
        history = [
            {"step": step, "validation/accuracy": value - 0.4 * math.exp(-step / 60)}
            for step in range(20, steps + 1, 20)
        ]
        trials.append({
            "trial_id": f"{index:08x}", "status": "complete", "steps": steps, "stopped_early": steps < 160,
            "config": {"train.learning_rate": rate, "train.layer_decay": float(generator.choice([0.4, 0.6, 0.8, 1.0])),
                       "augment.mixup": float(generator.choice([0.0, 0.4, 0.8])),
                       "freeze_encoder": bool(generator.random() < 0.3)},
            "validation_accuracy": value, "test_accuracy": value - 0.02 if steps == 160 else None, "history": history,
        })  # fmt: skip
    trials.sort(key=lambda trial: -trial["validation_accuracy"])
    failed = {"trial_id": "deadbeef", "status": "failed", "steps": 20, "stopped_early": False, "history": [],
              "config": {"train.learning_rate": 10.0, "train.layer_decay": 0.4, "augment.mixup": 0.0,
                         "freeze_encoder": False},
              "validation_accuracy": None, "test_accuracy": None,
              "failure": {"kind": "diverged", "reason": "no number"}}  # fmt: skip
    return [*trials, failed]


def build_full_run(folder: Path, num_labels: int = 10, num_trials: int = 24) -> Place:
    """A finished run whose report has every section filled; with many labels its confusion matrix is drawn."""
    run = build_run(folder)
    names = LABELS if num_labels == len(LABELS) else [f"class {index}" for index in range(num_labels)]
    manifest = write_audible_dataset(folder / "data", names, clip_seconds=5.0 if num_labels == len(LABELS) else 0.5)
    reasons = {"skipped": ["not audio", "not audio"], "missing": ["not in the source"]}
    for name, given in reasons.items():
        write_table(
            run / "data" / f"{name}.parquet",
            pa.table({"path": [f"{name}/file-{i}" for i in range(len(given))], "reason": given}),
        )
    for index in (1, 2):
        stages = run / f"iteration-{index}"
        found = confused_predictions(manifest, seed=index)
        figures = {**evaluation(310 + 8 * index), "data": (run / "data").uri, "kind": "encoder"}
        write_judgement(stages / "probe", found, figures)
        trials = swept_trials(num_trials if index == 2 else 6, seed=index)
        best = next(trial for trial in trials if not trial["stopped_early"])
        (stages / "sweep" / "leaderboard.json").write_json(
            {"metric": "validation/accuracy", "trials": trials, "best": best, "test_clips": 80}
        )
        state = (stages / "sweep" / "stage.json").read_json()
        (stages / "sweep" / "stage.json").write_json(state | {"config": {"sweep": {"space": SPACE}}})
    place = run / "iteration-2" / "pretrain"
    records = [
        record | {"train/recoveries": 2, "train/skipped_steps": 1, "labels/perplexity": 60 + record["step"] / 20,
                  "labels/used_code_fraction": 0.5, "labels/collapsed_steps": 0, "perf/checkpoint_seconds": 4.5}
        for record in training_metrics(80, 6.9, 2.6)
    ]  # fmt: skip
    put_stage(place, "complete", records)
    (place / "skipped-steps.json").write_json([{"step": 311, "clips": ["1-003", "4-007"]}])
    found = confused_predictions(manifest, seed=7)
    result = {"kind": "classifier", "model": "m", "data": (run / "data").uri, "folds": [], "splits": [], **judge(found)}
    write_judgement(run / "evaluations" / "tones", found, result)
    return run
