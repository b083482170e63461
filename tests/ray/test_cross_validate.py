"""Cross-validation and evaluation of classifiers on a real cluster: real fine-tuning runs, resumed, ensembled."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tones import write_tones

from beats_ray.config import CrossValidateConfig, EvaluateConfig, UserError, load_config
from beats_ray.console import Console
from beats_ray.cross_validate import run_cross_validate
from beats_ray.data.storage import Place, open_place, read_table
from beats_ray.evaluate import probabilities_of, run_evaluate
from beats_ray.inference import load_published, pad_clips
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.ray

SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
OVERRIDES = [
    "data.clip_seconds=1",
    "finetune.augment.mixup=0",
    "finetune.layer_drop=0",
    "finetune.train.steps=8",
    "finetune.train.warmup_steps=1",
    "finetune.train.learning_rate=2e-3",
    "finetune.train.layer_decay=1",
    "finetune.train.global_batch_size=4",
    "finetune.train.micro_batch_size=4",
    "finetune.train.loggers=[]",
    "cross_validation.max_concurrent_runs=2",  # a third process would import what it needs for as long again
]


class Notes(Console):
    """A console whose notes can be read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def work(cluster: EmbeddedObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, two data sets with the same labels in another order, and a cross-validation of one of them."""
    folder = tmp_path_factory.mktemp("folds")
    write_tones(folder / "data")
    write_tones(folder / "other", folds=2, clips=3, names=("high", "low", "middle"), seconds=2.5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), folder / f"encoder-{seed}")
    run_cross_validate(settings(folder), Console())
    return folder


def settings(folder: Path, *overrides: str, **changes: Any) -> CrossValidateConfig:
    encoders = {f"e{seed}": str(folder / f"encoder-{seed}") for seed in (0, 1)}
    fields: dict[str, Any] = {"encoders": encoders, "output": str(folder / "cv"), **changes}
    return load_config(CrossValidateConfig, None, [f"data.path={folder / 'data'}", *OVERRIDES, *overrides], **fields)


def read_json(place: Path) -> Any:
    return json.loads(place.read_text())


def test_every_clip_is_judged_once_by_a_model_that_did_not_train_on_its_fold(work: Path) -> None:
    summary = read_json(work / "cv" / "cross_validation.json")
    assert len(summary["runs"]) == 6
    for name in ("e0", "e1"):
        rows = read_table(open_place(str(work / "cv" / name / "seed-0" / "predictions.parquet"))).to_pylist()
        assert sorted(row["clip_id"] for row in rows) == sorted(f"{f}-{n}" for f in (1, 2, 3) for n in range(6))
        for fold in (1, 2, 3):
            place = work / "cv" / name / "seed-0" / f"fold-{fold}"
            trained_on = read_json(place / "model" / "config.json")["extra"]["data"]
            assert trained_on["training"]["folds"] == [other for other in (1, 2, 3) if other != fold]
            assert trained_on["validation"] is None
            last = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()][-1]
            judged = read_json(place / "evaluation.json")
            assert judged["accuracy"] == pytest.approx(last["test/accuracy"])  # of the loop, on the same weights
        right = [np.argmax(row["probabilities"]) == ["low", "middle", "high"].index(row["labels"][0]) for row in rows]
        assert summary["encoders"][name]["accuracy"] == pytest.approx(np.mean(right))
    difference = summary["encoders"]["e1"]["accuracy"] - summary["encoders"]["e0"]["accuracy"]
    assert summary["comparisons"][0]["difference"] == pytest.approx(difference)


def test_only_what_is_missing_runs_again_and_gives_the_same(work: Path) -> None:
    places = [work / "cv" / name / "seed-0" / f"fold-{fold}" for name in ("e0", "e1") for fold in (1, 2, 3)]
    before = {place: (place / "model" / "model.safetensors").stat().st_mtime_ns for place in places}
    whole = (work / "cv" / "cross_validation.json").read_bytes()
    open_place(str(places[1])).delete()  # one run as if it had never begun, one killed before it was judged
    (places[2] / "evaluation.json").unlink()
    run_cross_validate(settings(work), Console())
    assert (work / "cv" / "cross_validation.json").read_bytes() == whole
    changed = [place for place in places if (place / "model" / "model.safetensors").stat().st_mtime_ns != before[place]]
    assert changed == [places[1]]


def test_other_settings_in_the_same_folder_are_the_users_mistake(work: Path) -> None:
    changed = settings(work, "finetune.label_smoothing=0.3")
    with pytest.raises(UserError, match=r"belongs to a run of another config.*label_smoothing"):
        run_cross_validate(changed, Console())


def logits_of(model: Place, dataset: Place) -> dict[str, np.ndarray]:
    """Each clip's logits, alone and whole, by name of the class."""
    from beats_ray.data.flac import decode_flac

    module = load_published(model)
    names, found = module.class_names, {}
    for row in read_table(dataset / "shards" / "00000.parquet").to_pylist():
        wave, lengths = pad_clips([decode_flac(row["audio"], row["num_samples"]).tobytes()])
        with torch.no_grad():
            logits = module(*module.encoder.normalised_fbank(wave, lengths))[0].double().numpy()
        found[row["clip_id"]] = dict(zip(names, logits, strict=True))
    return found


def fold_model(work: Path, fold: int) -> Path:
    return work / "cv" / "e0" / "seed-0" / f"fold-{fold}" / "model"


def test_an_ensemble_is_judged_by_its_mean_logits_and_classes_are_matched_by_name(work: Path) -> None:
    models = [str(fold_model(work, fold)) for fold in (1, 2)]
    overrides = [f"data.path={work / 'other'}", "num_workers=1"]
    config = load_config(EvaluateConfig, None, overrides, output=str(work / "ensemble"), models=models)
    run_evaluate(config, Console())
    dataset = open_place(str(work / "other"))
    order = (dataset / "dataset.json").read_json()["label_names"]
    assert order != load_published(open_place(models[0])).class_names
    members = [logits_of(open_place(model), dataset) for model in models]
    rows = read_table(open_place(str(work / "ensemble" / "predictions.parquet"))).to_pylist()
    assert len(rows) == 6
    for row in rows:
        mean = np.mean([[member[row["clip_id"]][label] for label in order] for member in members], axis=0)
        expected = probabilities_of(mean[None], multi_label=False)[0]
        np.testing.assert_allclose(row["probabilities"], expected, atol=1e-4)


@pytest.mark.slow
def test_several_data_sets_have_a_result_each_and_known_clips_are_warned_of(work: Path) -> None:
    overrides = [f"data.path={work / 'data'}", "data.folds=[1]", f"also=[{work / 'other'}]", "num_workers=1"]
    config = load_config(
        EvaluateConfig, None, overrides, output=str(work / "judged"), model=str(fold_model(work, 2)),
        window_seconds=1.0, hop_seconds=0.5,
    )  # fmt: skip
    console = Notes()
    run_evaluate(config, console)
    warnings = [note for note in console.notes if note.startswith("warning")]
    assert len(warnings) == 1  # the model of test fold 2 was trained on fold 1
    assert "6 of its training clips" in warnings[0]
    assert "choose data.folds=[2]" in warnings[0]
    results = read_json(work / "judged" / "evaluation.json")["results"]
    for name in ("data", "other"):
        assert read_json(work / "judged" / name / "evaluation.json") == results[name]
        assert results[name]["clips"] == 6
    rows = list(csv.DictReader((work / "judged" / "evaluation.csv").open()))
    assert [(row["name"], row["clips"], float(row["accuracy"])) for row in rows] == [
        (name, "6", pytest.approx(results[name]["accuracy"], abs=1e-6)) for name in ("data", "other")
    ]
    assert results["data"]["known_clips"]["training"] == 6
    assert results["other"]["known_clips"]["training"] == 0


@pytest.mark.slow
def test_runs_of_two_workers_are_ordinary_runs_and_a_learning_rate_is_chosen_by_the_inner_fold(work: Path) -> None:
    config = settings(
        work,
        "finetune.train.num_workers=2",
        "finetune.train.micro_batch_size=2",
        "cross_validation.folds=[3]",
        "cross_validation.selection=inner",
        "cross_validation.learning_rates=[1e-9, 2e-3]",
        encoders=None,
        encoder=str(work / "encoder-0"),
        output=str(work / "two"),
    )
    run_cross_validate(config, Console())
    summary = read_json(work / "two" / "cross_validation.json")
    slow, fast = summary["runs"]
    assert (slow["learning_rate"], fast["learning_rate"]) == (1e-9, 2e-3)
    assert fast["chosen"] == (fast["validation_accuracy"] > slow["validation_accuracy"])
    assert fast["chosen"] != slow["chosen"]
    for run in (slow, fast):
        trained_on = read_json(Path(run["model"]) / "config.json")["extra"]["data"]
        parts = [trained_on[part]["folds"] for part in ("training", "validation", "test")]
        assert parts == [[2], [1], [3]]
        last = [json.loads(line) for line in (Path(run["model"]).parent / "metrics.jsonl").read_text().splitlines()][-1]
        assert run["accuracy"] == pytest.approx(last["test/accuracy"])
