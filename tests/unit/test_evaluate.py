"""Evaluation: probes, baselines, scores and predictions give what can be worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from beats_ray.baselines import clip_band_baseline, mfcc_statistics
from beats_ray.clip_table import ClipTable, PooledFeatures, mean_over_patches
from beats_ray.config import EmbedConfig, EvaluateConfig, TokenizeConfig, UserError, replace, validate
from beats_ray.console import Console
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.embed import run_embed
from beats_ray.evaluate import Logits, fold_rows, open_data, run_evaluate
from beats_ray.inference import check_pool, pad_clips, row_group_spans
from beats_ray.judgement import figure_rows
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    RandomProjectionConfig,
    RandomProjectionTokenizer,
    encoder_config,
    save_model,
)
from beats_ray.predict import predict_wave, run_predict, split_windows
from beats_ray.probe import LabelledClips, cross_validate, probe_accuracy, probe_probabilities, summarise_probe
from beats_ray.tokenize import code_usage, run_tokenize
from tests.support.prepared import write_dataset

pytestmark = pytest.mark.unit

CODES = 16


def clips(labels: list[int], features: np.ndarray, folds: list[int]) -> LabelledClips:
    names = [f"clip-{index}" for index in range(len(labels))]
    return LabelledClips(names, features, np.array(labels), np.array(folds))


class Constant:
    """Names label 1 whatever it was trained on."""

    def fit(self, *_: np.ndarray) -> "Constant":
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        return np.ones(len(features))


class MemorisingClassifier:
    """Right on clips it was trained on, by their single feature; otherwise it names label 0."""

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "MemorisingClassifier":
        self.known = dict(zip(features[:, 0].tolist(), labels.tolist(), strict=True))
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        return np.array([self.known.get(value, 0) for value in features[:, 0].tolist()])


# --- k-fold -----------------------------------------------------------------------------------------------------------


def test_no_clip_is_judged_by_a_classifier_that_saw_it() -> None:
    """A memorising classifier must do no better than naming label 0 everywhere."""
    labels = [0, 1, 1, 1] * 5
    folds = [fold for fold in range(1, 6) for _ in range(4)]
    result = cross_validate(clips(labels, np.arange(20.0)[:, None], folds), MemorisingClassifier)
    assert result.accuracy == 0.25
    assert result.correct == "1000" * 5
    assert result.fold_accuracies == {str(fold): 0.25 for fold in range(1, 6)}
    assert result.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 20))
    assert result.fold_standard_error == 0.0
    assert result.chance == 0.75


def test_the_probe_finds_a_direction_at_any_scale() -> None:
    generator = np.random.default_rng(0)
    labels = [index % 3 for index in range(150)]
    features = generator.normal(size=(150, 8)) * np.array([1e-3, 1e4, 1, 1, 1, 1, 1, 1])
    features[:, 0] += 0.02 * np.array(labels)  # in units of its deviation: 20
    result = probe_accuracy(clips(labels, features, [index % 5 for index in range(150)]))
    assert result.accuracy == 1.0
    assert result.clips == 150


def test_the_probabilities_of_the_probe_are_those_of_clips_that_it_has_not_heard() -> None:
    """Random features: a classifier that had heard its clips would be right about nearly all of them."""
    generator = np.random.default_rng(0)
    labels = [index % 3 for index in range(60)] + [3]
    folds = [1 + index % 5 for index in range(60)] + [-1]
    given = clips(labels, generator.normal(size=(61, 40)), folds).in_folds()
    assert given.clip_ids == [f"clip-{index}" for index in range(60)]
    found_NC = probe_probabilities(given, num_labels=5)
    assert found_NC.shape == (60, 5)
    assert found_NC.sum(1) == pytest.approx(np.ones(60))
    assert (found_NC[:, 3:] == 0).all()
    assert summarise_probe(given, found_NC.argmax(1)) == probe_accuracy(given)
    assert probe_accuracy(given).accuracy < 0.6


def test_clips_outside_all_folds_are_neither_trained_on_nor_judged() -> None:
    labels = [0, 1] * 6
    folds = [1, 1, 2, 2, -1, -1] * 2
    result = cross_validate(clips(labels, np.arange(12.0)[:, None], folds), MemorisingClassifier)
    assert result.clips == 8
    assert set(result.fold_accuracies) == {"1", "2"}


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        ([0, 1, 0, 1], [1, 1, 1, 1], "needs at least 2"),
        ([2, 2, 2, 2], [1, 1, 2, 2], "the same label"),
        ([0, 1, 1, 1], [1, 1, 2, 2], "outside fold 1"),
    ],
)
def test_data_that_cannot_be_probed_is_the_users_mistake(labels: list[int], folds: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe_accuracy(clips(labels, np.zeros((4, 2)), folds))


def test_the_table_of_folds_has_each_with_its_own_error() -> None:
    labels, folds = [0, 1, 1, 1, 0, 1, 1, 1, 1], [1] * 4 + [2] * 5
    rows = fold_rows(cross_validate(clips(labels, np.arange(9.0)[:, None], folds), Constant))
    assert rows[0] == ["fold", "clips", "accuracy", "standard_error"]
    assert rows[1] == ["1", 4, 0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4))]
    assert rows[2] == ["2", 5, 0.8, pytest.approx(math.sqrt(0.8 * 0.2 / 5))]


def test_the_table_of_several_data_sets_has_every_figure_and_leaves_open_what_one_has_not() -> None:
    one = {"kind": "classifier", "model": "m", "models": ["m", "n"], "data": "d", "folds": [1], "window_seconds": 2.0}
    other = {"kind": "classifier", "model": "m", "models": ["m", "n"], "data": "e", "splits": []}
    results = {
        "first": one | {"clips": 4, "accuracy": 0.5, "d_prime": None},
        "second": other | {"clips": 6, "mean_average_precision": 0.25},
    }
    assert figure_rows(results) == [
        ["name", "kind", "model", "data", "clips", "accuracy", "d_prime", "mean_average_precision"],
        ["first", "classifier", "m;n", "d", 4, 0.5, None, None],
        ["second", "classifier", "m;n", "e", 6, None, None, 0.25],
    ]
    probe = {"kind": "encoder", "model": "m", "data": "d", "accuracy": 1.0, "correct": "11", "fold_accuracies": {}}
    assert figure_rows({"d": probe}) == [["name", "kind", "model", "data", "accuracy"], ["d", "encoder", "m", "d", 1.0]]


def test_an_encoder_on_two_data_sets_leaves_the_tables_of_each_and_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, ("a", "b"))
    labels, folds = [[0], [1]] * 6, np.repeat([1, 2, 3], 4)

    def collect(dataset: Place, *_: object, **__: object) -> ClipTable:
        features = np.array(labels, float) if dataset.name == "one" else np.zeros((12, 1))
        return ClipTable([str(clip) for clip in range(12)], {"features": features}, labels, folds)

    monkeypatch.setattr("beats_ray.evaluate.collect_clips", collect)
    model = save_model(BeatsEncoder(encoder_config("tiny", num_layers=1)), tmp_path / "m")
    fields = {"output": f"{tmp_path}/out", "model": str(model), "data": {"path": f"{tmp_path}/one"}}
    written = run_evaluate(validate(EvaluateConfig, fields | {"also": [f"{tmp_path}/two"]}), Console())
    of_each = (
        "evaluation.json",
        "folds.csv",
        "confusion.csv",
        "per_class.csv",
        "predictions.csv",
        "predictions.parquet",
    )
    assert {Path(place).relative_to(tmp_path / "out").as_posix() for _, place in written} == {
        *(f"{name}/{file}" for name in ("one", "two") for file in of_each), "evaluation.json", "evaluation.csv",
    }  # fmt: skip
    assert (tmp_path / "out" / "one" / "folds.csv").read_text().splitlines()[1:] == [
        f"{fold},4,1.000000,0.000000" for fold in (1, 2, 3)
    ]
    header, first, second = ((tmp_path / "out" / "evaluation.csv").read_text()).splitlines()
    assert header.startswith("name,kind,model,data,accuracy,standard_error")
    assert first.startswith(f"one,encoder,{model},{tmp_path}/one,1.000000,0.000000")
    assert second.startswith(f"two,encoder,{model},{tmp_path}/two,0.500000,")


def test_no_two_data_sets_share_a_folder_of_results(tmp_path: Path) -> None:
    places = [tmp_path / "x" / "a", tmp_path / "a-2", tmp_path / "a-3", tmp_path / "y" / "a"]
    for place in places:
        write_dataset(place, ("a", "b"))
    fields = {"output": f"{tmp_path}/out", "model": "m", "data": {"path": str(places[0])}}
    config = validate(EvaluateConfig, fields | {"also": [str(place) for place in places[1:]]})
    assert [one.output.name for one in open_data(config, [])] == ["a", "a-2", "a-3", "a-4"]


# --- the cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "tokenize", "embed"])
def test_actors_without_room_are_told_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", ("a",))
    fields = {"output": f"{tmp_path}/out", "data": {"path": f"{tmp_path}/data"}, "batch_clips": 4, "num_workers": 9}
    if command == "tokenize":
        tokenizer = RandomProjectionTokenizer(RandomProjectionConfig(num_codes=8))
        config, run = (
            validate(TokenizeConfig, fields | {"tokenizer": str(save_model(tokenizer, tmp_path / "m"))}),
            run_tokenize,
        )
    else:
        encoder = str(save_model(BeatsEncoder(encoder_config("tiny", num_layers=1)), tmp_path / "m"))
        kind, run = (EvaluateConfig, run_evaluate) if command == "evaluate" else (EmbedConfig, run_embed)
        config = validate(kind, fields | {"model": encoder})
    if isinstance(config, EvaluateConfig):  # the first of two data sets would have room: a batch of four clips
        config = replace(config, {"data.folds": (1,), "also": [fields["data"]]})
        monkeypatch.setattr("beats_ray.evaluate.collect_clips", lambda *_, **__: pytest.fail("it has begun"))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("beats_ray.launch.most_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("beats_ray.launch.has_silent_autoscaler", lambda: False)
    with pytest.raises(UserError, match=r"num_workers=9 needs 9.5 CPUs, the cluster has 4"):
        run(config, Console())
    assert not (tmp_path / "out").exists()
    asked = row_group_spans(read_manifest(open_place(f"{tmp_path}/data")), folds=(1,))
    check_pool(asked, config)  # four clips are one batch


# --- features and scores ----------------------------------------------------------------------------------------------


def test_padding_has_no_part_in_pooled_features() -> None:
    features = torch.tensor([[[1.0], [3.0], [torch.nan]], [[5.0], [7.0], [9.0]], [[1.0], [1.0], [1.0]]])
    is_pad = torch.tensor([[False, False, True], [False, False, False], [True, True, True]])
    assert mean_over_patches(features, is_pad).tolist() == [[2.0], [7.0], [0.0]]


def test_a_clips_features_and_logits_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    encoder = BeatsEncoder(encoder_config("tiny")).eval()
    classifier = AudioClassifier(encoder, ClassifierConfig(num_classes=3)).eval()
    waves = [(np.random.default_rng(n).normal(size=n) * 3000).astype(np.int16).tobytes() for n in (8000, 24000)]
    with torch.inference_mode():
        for worker, name in ((PooledFeatures(encoder), "features"), (Logits(classifier), "scores")):
            together = worker(*pad_clips(waves))[name]
            alone = np.concatenate([worker(*pad_clips([wave]))[name] for wave in waves])
            np.testing.assert_allclose(together, alone, atol=1e-4)
            assert np.abs(together[0] - together[1]).max() > 1e-3


def test_the_probe_refuses_clips_with_several_labels() -> None:
    with pytest.raises(UserError, match="has 2 labels"):
        ClipTable(["a"], {"logits": np.zeros((1, 2))}, [[0, 1]], np.array([1])).labelled("logits")


# --- baselines --------------------------------------------------------------------------------------------------------


def test_the_clip_band_guess_is_the_most_frequent_visible_code_of_clip_and_band() -> None:
    labels = torch.full((2, 32), 3)
    labels[0, 0::8] = 7  # band 0 of clip 0
    labels[0, 24] = 5  # its last time step: a target
    labels[1, 30:] = -1  # padding
    visible = torch.tensor([[0, 1, 8, 9], [0, 1, 8, -1]])
    target = torch.tensor([[16, 17, 24, -1], [16, 17, 30, -1]])
    score = clip_band_baseline(labels, visible, target, CODES)
    assert int(score.num_targets) == 5  # padding and unused places are no targets
    assert int(score.num_correct) == 4  # all but the 5 at place 24


def test_a_band_without_visible_patches_falls_back_on_its_clip() -> None:
    labels = torch.full((2, 16), 9)
    labels[1] = 4
    score = clip_band_baseline(labels, torch.tensor([[0, 8], [1, 9]]), torch.tensor([[7, 15], [7, 15]]), CODES)
    assert int(score.num_correct) == int(score.num_targets) == 4


def random_labels(skew: float, clips: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels whose distribution depends on clip and band; `skew` 0 makes them uniform noise."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(clips, 8, CODES, generator=generator) * skew
    probability = logits.softmax(-1).repeat(1, 30, 1).flatten(0, 1)
    labels = torch.multinomial(probability, 1, generator=generator).view(clips, 240)
    order = torch.rand(clips, 240, generator=generator).argsort(1)
    return labels, order[:, :60], order[:, 60:]


def test_the_clip_band_loss_is_that_of_noise_on_noise_and_far_below_on_structure() -> None:
    for skew, low, high in ((0.0, 0.99, 1.06), (3.0, 0.2, 0.7)):
        labels, visible, target = random_labels(skew)
        score = clip_band_baseline(labels, visible, target, CODES)
        ratio = float(score.loss_sum / score.num_targets) / math.log(CODES)
        assert low < ratio < high, (skew, ratio)


def test_the_clip_band_loss_sees_no_masked_label() -> None:
    """Changing one target's label changes that target's likelihood alone: two sums over the rest agree."""
    labels, visible, target = random_labels(2.0)
    changed = labels.clone()
    changed[0, target[0, 0]] = (changed[0, target[0, 0]] + 1) % CODES
    before, after = (clip_band_baseline(values, visible, target[:, 1:], CODES) for values in (labels, changed))
    assert torch.equal(before.loss_sum, after.loss_sum)
    whole = clip_band_baseline(changed, visible, target, CODES)
    assert not torch.equal(whole.loss_sum, clip_band_baseline(labels, visible, target, CODES).loss_sum)


def test_the_clip_band_loss_is_finite_for_a_code_that_was_never_visible() -> None:
    labels = torch.zeros(1, 32, dtype=torch.int64)
    labels[0, 31] = 9
    score = clip_band_baseline(labels, torch.arange(16)[None], torch.tensor([[31]]), 1024)
    assert 3.0 < float(score.loss_sum) < 30.0


def test_mfcc_statistics_of_a_ramp_are_known() -> None:
    values = mfcc_statistics(torch.arange(11.0)[:, None])
    deviation = math.sqrt(10.0)
    np.testing.assert_allclose(values.numpy(), [5, deviation, 0, 1, 5, 9, 10, 0], atol=1e-5)


def test_code_usage_of_even_and_collapsed_codebooks() -> None:
    even, collapsed = code_usage(np.array([5, 5, 5, 5])), code_usage(np.array([0, 9, 0, 0]))
    assert even == {"used_code_fraction": 1.0, "perplexity": pytest.approx(4.0)}
    assert collapsed == {"used_code_fraction": 0.25, "perplexity": pytest.approx(1.0)}


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "lengths"), [(0.5, [0.5]), (10, [10]), (10.5, [10.5]), (25, [10, 10, 5])])
def test_windows_hold_every_sample_once(seconds: float, lengths: list[float]) -> None:
    wave = np.arange(int(seconds * 16_000)).astype(np.int16)
    pieces = split_windows(wave)
    assert [len(piece) / 16_000 for piece in pieces] == lengths
    assert np.array_equal(np.concatenate(pieces), wave)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AudioClassifier(BeatsEncoder(encoder_config("tiny")), ClassifierConfig(num_classes=3), ["a", "b", "c"])
    return save_model(model, tmp_path_factory.mktemp("model") / "classifier")


def test_a_long_recording_has_the_mean_of_its_windows_probabilities(classifier_folder: Path) -> None:
    from beats_ray.models import load_model

    model = load_model(classifier_folder)
    assert isinstance(model, AudioClassifier)
    wave = (np.random.default_rng(0).normal(size=20 * 16_000) * np.linspace(0, 9000, 20 * 16_000)).astype(np.int16)
    whole, halves = predict_wave(model, wave), [predict_wave(model, half) for half in np.split(wave, 2)]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    assert float((halves[0] - halves[1]).abs().max()) > 1e-4


def test_predict_takes_any_rate_and_channels(
    classifier_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).normal(size=(44_100, 2)) * 0.1
    soundfile.write(tmp_path / "stereo.flac", noise, 44_100)
    soundfile.write(tmp_path / "mono.wav", noise[:8000, 0], 8000)
    run_predict(str(classifier_folder), [str(tmp_path / "stereo.flac"), str(tmp_path / "mono.wav")], 2, as_json=True)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["seconds"] for record in records] == [1.0, 1.0]
    for record in records:
        probabilities = [entry["probability"] for entry in record["labels"]]
        assert len(probabilities) == 2
        assert probabilities == sorted(probabilities, reverse=True)
        assert {entry["label"] for entry in record["labels"]} <= {"a", "b", "c"}


def test_predict_names_an_unusable_file_and_a_model_of_another_kind(classifier_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty.wav: empty-file"):
        run_predict(str(classifier_folder), [str(tmp_path / "empty.wav")])
    with pytest.raises(UserError, match=r"absent.wav: does not exist"):
        run_predict(str(classifier_folder), [str(tmp_path / "absent.wav")])
    encoder = save_model(BeatsEncoder(encoder_config("tiny")), tmp_path / "encoder")
    with pytest.raises(UserError, match="holds kind='encoder'; give a model of kind classifier"):
        run_predict(str(encoder), [str(tmp_path / "empty.wav")])
