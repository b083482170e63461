"""Which runs a cross-validation is made of, and what they say together."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beats_ray.config import ConfigError, CrossValidateConfig, UserError, load_config
from beats_ray.cross_validate import check_runs, choose_runs, plan_runs
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.fold_statistics import compare, summarise
from beats_ray.train.held_out import find_parts

pytestmark = pytest.mark.unit


def manifest(folds: int = 5, multi_label: bool = False) -> DatasetManifest:
    return DatasetManifest(
        name="x", label_names=("a", "b"), multi_label=multi_label, clips=4 * folds,
        clips_by_fold={str(fold): 4 for fold in range(1, folds + 1)}, clips_by_split={"": 4 * folds}, seconds=1,
        fbank_mean=0, fbank_std=1, source="x", source_files=4 * folds, quarantined=0,
        shards=(Shard(file="0.parquet", sha256="0", bytes=1, row_groups=tuple(
            RowGroup(clips=4, fold=fold, split="") for fold in range(1, folds + 1))),),
    )  # fmt: skip


def config(*overrides: str, **fields: Any) -> CrossValidateConfig:
    return load_config(CrossValidateConfig, None, ["data.path=d", *overrides], output="o", **fields)


# --- which runs -------------------------------------------------------------------------------------------------------


def test_each_fold_is_held_out_once_for_each_seed_and_encoder() -> None:
    settings = config("cross_validation.seeds=[3, 4]", encoders={"old": "p", "new": "q"})
    runs = plan_runs(settings, manifest())
    assert len({run.config.output for run in runs}) == len(runs) == 2 * 5 * 2
    assert {(run.encoder, run.seed, run.fold) for run in runs} == {
        (name, seed, fold) for name in ("old", "new") for seed in (3, 4) for fold in range(1, 6)
    }
    for run in runs:
        assert run.config.train.seed == run.seed
        assert run.config.encoder == {"old": "p", "new": "q"}[run.encoder]
        assert run.config.output == f"o/{run.encoder}/seed-{run.seed}/fold-{run.fold}"
        assert find_parts(run.config, manifest()).training.folds == tuple(
            fold for fold in range(1, 6) if fold != run.fold
        )
        assert run.config.folds.validation_fold == -1


def test_an_inner_validation_fold_is_the_next_in_the_cycle_and_never_the_test_fold() -> None:
    runs = plan_runs(config("cross_validation.selection=inner", encoder="p"), manifest())
    assert [(run.fold, run.config.folds.validation_fold) for run in runs] == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 1)]
    for run in runs:
        assert len(find_parts(run.config, manifest()).training.folds) == 3


def test_other_settings_stay_as_they_were_set() -> None:
    (run, *_) = plan_runs(config("finetune.train.steps=77", "finetune.train.warmup_steps=7", encoder="p"), manifest())
    assert (run.config.train.steps, run.config.train.warmup_steps, run.config.train.layer_decay) == (77, 7, 0.6)


@pytest.mark.parametrize(
    ("overrides", "folds", "message"),
    [
        (["cross_validation.folds=[1, 7]"], 5, "7 is not among the folds"),
        (["cross_validation.selection=inner"], 2, "needs at least 3 folds"),
        ([], 1, "needs at least 2 folds"),
        (["data.folds=[4]"], 5, "needs at least 2 folds"),
    ],
)
def test_folds_that_are_not_there_are_refused(overrides: list[str], folds: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(config(*overrides, encoder="p"), manifest(folds))


@pytest.mark.parametrize(
    ("overrides", "fields", "message"),
    [
        (["cross_validation.learning_rates=[1e-4]"], {}, "need a validation fold to choose by"),
        (["cross_validation.seeds=[1, 1]"], {}, "names one twice"),
        (["cross_validation.seeds=[]"], {}, "is empty"),
        ([], {"encoders": {"a/b": "p"}}, "is to be a folder's name"),
        ([], {"encoders": {"a": "p"}, "encoder": "q"}, "set one of them"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: list[str], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides, **fields)


def test_data_with_several_labels_a_clip_are_refused() -> None:
    with pytest.raises(UserError, match="a clip has several labels"):
        check_runs(plan_runs(config(encoder="p"), manifest()), manifest(multi_label=True))


def test_a_learning_rate_is_chosen_by_the_validation_fold_and_by_nothing_else(tmp_path: Path) -> None:
    settings = load_config(
        CrossValidateConfig, None, ["data.path=d", "cross_validation.selection=inner",
        "cross_validation.learning_rates=[1e-4, 1e-3]"], output=str(tmp_path), encoder="p",
    )  # fmt: skip
    runs = plan_runs(settings, manifest(3))
    assert len(runs) == 6
    for run in runs:
        better = (run.learning_rate == 1e-3) == (run.fold == 2)
        records = [
            {"step": 1, "validation/accuracy": 0.99},
            {"step": 2, "validation/accuracy": 0.6 if better else 0.5, "test/accuracy": 0.1 if better else 0.9},
        ]
        folder = Path(run.config.output)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [(run.fold, run.learning_rate) for run in choose_runs(runs)] == [(1, 1e-4), (2, 1e-3), (3, 1e-4)]


# --- what they say ----------------------------------------------------------------------------------------------------


def test_spreads_by_hand() -> None:
    right_SN = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    found = summarise(right_SN, np.array([1, 1, 1, 2]))
    assert found["accuracy"] == 0.625
    assert found["standard_error"] == pytest.approx(math.sqrt(0.625 * 0.375 / 4))  # of 4 clips, however many seeds
    assert found["seed_accuracies"] == [0.75, 0.5]
    assert found["seed_standard_error"] == pytest.approx(0.125)
    assert found["fold_accuracies"] == {"1": 0.5, "2": 1.0}
    assert found["fold_mean"] == 0.75  # folds alike, where `accuracy` counts clips alike
    assert found["fold_standard_deviation"] == pytest.approx(math.sqrt(0.125))


def test_one_seed_and_one_fold_have_no_spread() -> None:
    found = summarise(np.ones((1, 4), bool), np.ones(4))
    assert found["seed_standard_error"] is None
    assert found["fold_standard_deviation"] is None


def test_a_paired_comparison_of_one_seed_by_hand() -> None:
    reference_SN = np.array([[1, 0, 0, 1, 0, 1, 0, 0]], dtype=bool)
    right_SN = np.array([[1, 1, 1, 1, 0, 0, 1, 0]], dtype=bool)
    found = compare(right_SN, reference_SN, np.array([1] * 4 + [2] * 4))
    assert found["difference"] == 0.25
    deviation = np.std([0, 1, 1, 0, 0, -1, 1, 0], ddof=1)
    assert found["standard_error"] == pytest.approx(deviation / math.sqrt(8))
    low, high = found["interval"]
    assert (low + high) / 2 == pytest.approx(0.25)
    assert (high - low) / 2 == pytest.approx(2.3646 * found["standard_error"], rel=1e-4)  # Student's t, 7 degrees
    assert found["over"] == "clips"
    assert found["fold_differences"] == {"1": 0.5, "2": 0.0}


def test_alike_encoders_differ_by_nothing() -> None:
    right_SN = np.random.default_rng(0).random((3, 50)) < 0.7
    assert compare(right_SN, right_SN, np.ones(50))["interval"] == [0.0, 0.0]


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    """Clips, seeds and single answers all vary; it is for other clips and seeds, so it may only be too wide."""
    rng = np.random.default_rng(1)
    clips, held, repeats, gain = 200, 0, 400, 0.08
    for _ in range(repeats):
        easy_N = rng.normal(size=clips) * 0.1
        sides = [0.6 + side * gain + easy_N + rng.normal(size=(3, 1)) * 0.03 for side in (0, 1)]
        reference_SN, right_SN = (rng.random((3, clips)) < chance_SN for chance_SN in sides)
        low, high = compare(right_SN, reference_SN, np.ones(clips))["interval"]
        held += low <= gain <= high
    assert 0.93 < held / repeats < 1.0


def test_pairing_makes_the_interval_narrower_than_two_separate_ones() -> None:
    rng = np.random.default_rng(2)
    hard_N = rng.random(400)
    reference_SN, right_SN = np.array([[hard_N < 0.7]]).reshape(1, -1), np.array([[hard_N < 0.75]]).reshape(1, -1)
    error = compare(right_SN, reference_SN, np.ones(400))["standard_error"]
    separate = math.hypot(*(summarise(one, np.ones(400))["standard_error"] for one in (right_SN, reference_SN)))
    assert error < 0.5 * separate
