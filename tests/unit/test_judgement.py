"""What `evaluate` does around a model: classes by name, windows, known training clips, figures and files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beats_ray import evaluate
from beats_ray.clip_table import ClipTable
from beats_ray.config import ConfigError, EvaluateConfig, FinetuneConfig, StreamSettings, UserError, load_config
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.storage import open_place, read_table
from beats_ray.evaluate import Logits, probabilities_of
from beats_ray.judgement import Predictions, judge, write_judgement
from beats_ray.label_order import match_classes, translate_ids
from beats_ray.models import AudioClassifier, BeatsEncoder, ClassifierConfig, encoder_config
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.provenance import count_overlap, describe_data
from beats_ray.windows import ByWindows, window_spans

pytestmark = pytest.mark.unit

HZ = 16_000


def predictions(probability: list[list[float]], labels: list[list[int]], multi_label: bool = False) -> Predictions:
    names = tuple(["cat", "dog", "owl", "fox"][: len(probability[0])])
    folds = np.array([1 + index % 2 for index in range(len(labels))])
    ids = [f"clip-{index}" for index in range(len(labels))]
    return Predictions(ids, folds, labels, np.array(probability), names, multi_label)


# --- figures and files ------------------------------------------------------------------------------------------------


def test_single_label_figures_count_labelled_clips_only() -> None:
    found = judge(predictions([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.0, 1.0]], [[0], [1], [1], []]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_recall"] == pytest.approx(0.75)  # cat 1 of 1, dog 1 of 2
    assert found["macro_recall_standard_error"] == pytest.approx((0.25 / 2) ** 0.5 / 2)
    assert found["fold_accuracies"] == {"1": 0.5, "2": 1.0}
    assert found["clips"] == 3
    assert found["correct"] == "110"


def test_multi_label_figures_count_unlabelled_clips_as_negatives() -> None:
    found = judge(predictions([[0.9, 0.0, 0.1], [0.1, 0.9, 0.1], [0.95, 0.1, 0.1]], [[0], [1], []], multi_label=True))
    assert found["mean_average_precision"] == pytest.approx((0.5 + 1.0) / 2)  # the unlabelled clip ranks above `cat`
    assert found["classes_present"] == 2
    assert "accuracy" not in found


def test_what_the_clips_cannot_tell_is_null_in_json() -> None:
    found = judge(predictions([[0.9, 0.1], [0.8, 0.2]], [[0], [0]]))
    assert found["mean_roc_auc"] is None
    json.dumps(found, allow_nan=False)


def test_chosen_clips_without_labels_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="none of the chosen clips has a label"):
        judge(predictions([[0.9, 0.1]], [[]]))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_files_name_classes_and_put_the_surest_mistakes_first(tmp_path: Path) -> None:
    probability = [[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.0], [0.2, 0.2, 0.6]]
    found = predictions(probability, [[1], [1], [2], [2]])
    write_judgement(open_place(str(tmp_path)), found, judge(found))
    clips = read_csv(tmp_path / "predictions.csv")
    assert [row["clip_id"] for row in clips] == ["clip-2", "clip-0", "clip-1", "clip-3"]
    assert (clips[0]["labels"], clips[0]["predicted_1"], clips[0]["first_is_right"]) == ("owl", "cat", "0")
    assert [row["cat"] for row in read_csv(tmp_path / "confusion.csv")] == ["0", "1", "1"]  # taken for `cat`
    per_class = read_csv(tmp_path / "per_class.csv")
    assert [(row["label"], row["clips"], row["recall"]) for row in per_class] == [
        ("cat", "0", ""), ("dog", "2", "0.500000"), ("owl", "2", "0.500000"),
    ]  # fmt: skip
    stored = read_table(open_place(str(tmp_path / "predictions.parquet"))).to_pylist()
    assert [row["probabilities"] for row in stored] == probability
    assert [row["labels"] for row in stored] == [["dog"], ["dog"], ["owl"], ["owl"]]


# --- classes by name --------------------------------------------------------------------------------------------------


def test_classes_in_another_order_are_found_by_name() -> None:
    order = match_classes(["owl", "cat", "fox", "dog"], 4, ["cat", "dog", "owl"], "m")
    assert order.class_C.tolist() == [1, 3, 0]
    assert "1 classes that the data set lacks" in order.note
    same = match_classes(["cat", "dog"], 2, ["cat", "dog"], "m")
    assert (same.class_C.tolist(), same.note) == ([0, 1], "")


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["cat", "dog"], 2, r"model=m: has no class for 1 of the data set's 3 labels, 'owl' among them"),
        (["/m/1", "/m/2", "/m/3"], 3, "set class_table to AudioSet's class_labels_indices.csv"),
        (["dog", "cat", "owl", "cat"], 4, "classes of the same name"),
        (None, 2, "has 2 classes without names, the data set 3 labels"),
    ],
)
def test_labels_without_a_class_of_their_name_are_refused(names: list[str] | None, classes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_classes(names, classes, ["cat", "dog", "owl"], "m")


def test_classes_without_names_are_taken_in_their_order_and_said_to_be() -> None:
    order = match_classes(None, 2, ["cat", "dog"], "m")
    assert order.class_C.tolist() == [0, 1]
    assert "names no classes" in order.note


def test_audioset_ids_become_display_names(tmp_path: Path) -> None:
    table = tmp_path / "class_labels_indices.csv"
    table.write_text('index,mid,display_name\n1,/m/b,"Bark, howl"\n0,/m/a,Speech\n')
    assert translate_ids(["/m/b", "/m/a", "other"], open_place(str(table))) == ["Bark, howl", "Speech", "other"]


# --- windows and averages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.2, 3.0, 3.9, 4.1, 11.3])
@pytest.mark.parametrize(("window", "hop"), [(3.0, 3.0), (3.0, 1.0), (0.5, 0.5)])
def test_windows_cover_every_sample(seconds: float, window: float, hop: float) -> None:
    spans = window_spans(round(seconds * HZ), round(window * HZ), round(hop * HZ))
    heard = np.zeros(round(seconds * HZ), bool)
    for start, end in spans:
        assert 0 < end - start < (window + 1) * HZ
        heard[start:end] = True
    assert heard.all()
    assert len(spans) == 1 or seconds > window


def test_overlapping_windows_start_every_hop() -> None:
    assert window_spans(10, 4, 2) == [(0, 4), (2, 6), (4, 10)]  # the rest of 2 is less than a window: it stays
    assert window_spans(12, 4, 4) == [(0, 4), (4, 8), (8, 12)]


class Means:
    """A `ClipWorker`: each clip's mean, over its real samples."""

    def __init__(self, model: None) -> None:
        self.batches: list[int] = []

    def __call__(self, wave_BS: torch.Tensor, num_samples_B: torch.Tensor) -> dict[str, Any]:
        self.batches.append(len(wave_BS))
        return {"scores": (wave_BS.sum(1) / num_samples_B).float().numpy()[:, None]}


def test_a_mean_over_windows_is_weighted_by_their_lengths() -> None:
    """Of a quantity that is itself a mean over samples, the mean over windows is that of the whole clip."""
    lengths = [7 * HZ + 11, 2 * HZ, 4 * HZ + 5000]
    wave = torch.zeros(3, max(lengths), dtype=torch.int16)
    for row, length in enumerate(lengths):
        wave[row, :length] = (torch.arange(length) // 50).to(torch.int16)
    worker = ByWindows(None, Means, 3 * HZ, 3 * HZ)
    found = worker(wave, torch.tensor(lengths))["scores"]
    whole = Means(None)(wave, torch.tensor(lengths))["scores"]
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert found.dtype == np.float32
    assert max(worker._worker.batches) <= 3


def test_a_clip_shorter_than_a_window_is_unchanged() -> None:
    torch.manual_seed(0)
    model = AudioClassifier(BeatsEncoder(encoder_config("tiny")), ClassifierConfig(num_classes=3)).eval()
    wave, lengths = (torch.randn(2, 2 * HZ) * 3000).to(torch.int16), torch.tensor([2 * HZ, HZ])
    wave[1, HZ:] = 0
    with torch.inference_mode():
        alone = Logits(model)(wave, lengths)["scores"]
        by_windows = ByWindows(model, Logits, 4 * HZ, 2 * HZ)(wave, lengths)["scores"]
        cut = ByWindows(model, Logits, HZ // 2, HZ // 2)(wave, lengths)["scores"]
    assert np.array_equal(alone, by_windows)
    assert np.abs(alone - cut).max() > 1e-3


def test_probabilities_are_those_of_the_head() -> None:
    logits = np.array([[1.0, -2.0, 40.0]])
    for multi_label in (True, False):
        head = AudioClassifier(
            BeatsEncoder(encoder_config("tiny")), ClassifierConfig(num_classes=3, multi_label=multi_label)
        )
        expected = head.probabilities(torch.tensor(logits)).numpy()
        np.testing.assert_allclose(probabilities_of(logits, multi_label), expected, atol=1e-6)


# --- what a classifier was trained on ---------------------------------------------------------------------------------


def manifest(sha256: str = "0") -> DatasetManifest:
    groups = tuple(RowGroup(clips=10 + fold, fold=fold, split="") for fold in range(1, 6))
    return DatasetManifest(
        name="x", label_names=("cat", "dog"), clips=65, clips_by_fold={str(fold): 10 + fold for fold in range(1, 6)},
        clips_by_split={"": 65}, seconds=65, fbank_mean=0, fbank_std=1, source="x", source_files=65, quarantined=0,
        shards=(Shard(file="0.parquet", sha256=sha256, bytes=1, row_groups=groups),),
    )  # fmt: skip


def test_a_published_classifier_tells_what_it_was_trained_on(tmp_path: Path) -> None:
    config = load_config(
        FinetuneConfig, None, ["data.path=d", "folds.test_fold=4", "folds.validation_fold=5"], output="o"
    )
    record = describe_data(config, manifest())
    task = FinetuneTask(config, BeatsEncoder(encoder_config("tiny", num_layers=1)), manifest(), record)
    task.publish(task.module.state_dict(), tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["extra"]["data"]
    assert stored == record
    assert stored["training"]["folds"] == [1, 2, 3]
    assert (stored["validation"]["folds"], stored["test"]["folds"]) == ([5], [4])


def test_judged_clips_that_were_trained_on_are_counted() -> None:
    config = FinetuneConfig(output="o", data=StreamSettings(path="d", folds=(1, 2, 3, 4)))
    record = describe_data(config, manifest())  # trains on 3 and 4, validates on 2, tests on 1
    assert count_overlap(record, manifest(), (), ()) == {"training": 27, "validation": 12, "test": 11}
    assert count_overlap(record, manifest(), (1, 5), ()) == {"training": 0, "validation": 0, "test": 11}
    assert count_overlap(record, manifest("other"), (), ()) == {"training": 0, "validation": 0, "test": 0}
    assert count_overlap({}, manifest(), (), ()) == {"training": 0, "validation": 0, "test": 0}


def test_of_a_drawn_validation_part_as_many_clips_count_as_are_to_be_expected() -> None:
    overrides = ["data.path=d", "folds.test_fold=1", "folds.validation_fraction=0.25"]
    record = describe_data(load_config(FinetuneConfig, None, overrides, output="o"), manifest())
    assert count_overlap(record, manifest(), (3, 5), ()) == {"training": 21, "validation": 7, "test": 0}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_data_sets_are_paths_or_paths_with_a_choice() -> None:
    config = load_config(EvaluateConfig, None, ["also=[a, {path: b, folds: [1]}]", "models=[x, y]"], output="o")
    assert [(data.path, data.folds) for data in config.also] == [("a", ()), ("b", (1,))]
    assert config.judged_models == ("x", "y")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=a", "models=[b]"], "set one of them"),
        (["hop_seconds=2"], "needs window_seconds"),
        (["window_seconds=2", "hop_seconds=3"], "use at most 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(EvaluateConfig, None, overrides, output="o")


def test_a_probe_writes_what_it_said_of_every_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes differ in their first feature, but for one clip, which is the mistake; one clip has no fold."""
    labels = [0, 1] * 6
    features = np.array([[float(label), 1.0] for label in labels])
    features[3] = [0.0, 1.0]
    folds = np.array([1, 1, 2, 2, 3, 3] * 2)
    folds[11] = -1
    ids = [f"clip-{index}" for index in range(12)]
    table = ClipTable(ids, {"features": features}, [[label] for label in labels], folds)
    monkeypatch.setattr(evaluate, "_collect", lambda *_arguments: table)
    manifest = DatasetManifest.model_construct(label_names=("cat", "dog"))
    data = evaluate.JudgedData(open_place("d"), manifest, (), (), (), open_place(str(tmp_path)))
    model = evaluate.JudgedModel(open_place("m"), {"kind": "encoder"})
    config = EvaluateConfig(output=str(tmp_path), model="m", data=StreamSettings(path="d"))
    result, written = evaluate._probe(config, model, data, Console())
    assert result["accuracy"] == pytest.approx(10 / 11)
    assert result["correct"] == "11101111111"
    assert {name for name, _ in written} >= {"evaluation", "confusion", "predictions"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "predictions.csv").read_text())))
    assert [(row["clip_id"], row["labels"], row["predicted_1"]) for row in rows if row["first_is_right"] == "0"] == [
        ("clip-3", "dog", "cat")
    ]
    assert len(rows) == 11
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1:] == ["cat,6,0", "dog,1,4"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["kind"] == "encoder"
