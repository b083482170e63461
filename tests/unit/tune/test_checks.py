"""What is refused before a trial starts, and what a sweep may go on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.prepared import write_dataset

from beats_ray import cli
from beats_ray.config import ConfigError, SweepConfig, UserError, load_config
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import open_place
from beats_ray.identity import content_keys, run_identity
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.telemetry import run_name
from beats_ray.tune.placement import TrialNeeds
from beats_ray.tune.sweep import _tune, check_inputs, check_search
from beats_ray.tune.trial import Trials

pytestmark = pytest.mark.unit

SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, two encoders of one size and one of another."""
    folder = tmp_path_factory.mktemp("checks")
    write_dataset(folder / "data", ("x", "y"))
    for seed, (name, changes) in enumerate((("one", {}), ("two", {}), ("deep", {"num_layers": 2}))):
        torch.manual_seed(seed)
        save_model(BeatsEncoder(encoder_config("tiny", **(SMALL | changes))), folder / name)
    return folder


def config_of(work: Path, *overrides: str, **fields: Any) -> SweepConfig:
    fields = {"encoder": str(work / "one"), **fields}
    return load_config(
        SweepConfig, None, [f"output={work / 'out'}", f"data.path={work / 'data'}", *overrides], **fields
    )


def manifest_of(work: Path) -> DatasetManifest:
    return read_manifest(open_place(str(work / "data")))


def several(work: Path, *names: str) -> dict[str, Any]:
    return {"encoder": None, "encoders": {name: str(work / name) for name in names}}


def test_a_sound_sweep_is_not_refused(work: Path) -> None:
    check_inputs(config_of(work, "sweep.max_minutes=10"), manifest_of(work))
    check_inputs(config_of(work, **several(work, "one", "two")), manifest_of(work))


@pytest.mark.parametrize(
    ("overrides", "encoders", "message"),
    [
        (["sweep.objectives={validation/f1: max}"], (), "sweep.objectives.validation/f1: no trial reports it"),
        (["sweep.objectives={validation/mean_average_precision: max}"], (), "no trial reports it"),
        ([], ("one", "deep"), "has num_layers=2, one has 1; compare encoders of one architecture"),
        ([], ("one", "data"), "no published model there"),
        (["sweep.scheduler=pbt", "sweep.search=random"], ("one", "two"), "encoders would not be compared"),
        (["sweep.max_minutes=1e-6"], (), "sweep.max_minutes=1e-06: a trial takes at least"),
        (["sweep.repeats=9", "sweep.repeat_over=folds"], (), "needs a test fold and at least 9 folds"),
        (["finetune.folds.test_fold=7"], (), "folds.test_fold=7 is not a fold"),
        (["sweep.warm_start=/nowhere"], (), "no leaderboard.json there"),
    ],
)
def test_a_sweep_that_could_not_end_is_refused(
    overrides: list[str], encoders: tuple[str, ...], message: str, work: Path
) -> None:
    fields = several(work, *encoders) if encoders else {}
    with pytest.raises(UserError) as caught:
        check_inputs(config_of(work, *overrides, **fields), manifest_of(work))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.folds.validation_fraction=0"], "keeps no validation part"),
        (["sweep.scheduler=pbt", "sweep.search=random", "finetune.train.steps=1000", "sweep.grace_validations=10"],
         "members would never exchange weights in their 10 validations"),
    ],
)  # fmt: skip
def test_settings_that_no_cluster_could_search_are_refused(overrides: list[str], message: str, work: Path) -> None:
    config = config_of(work, *overrides)
    with pytest.raises(ConfigError, match=message):
        check_search(config.finetune, config.sweep)


def test_a_sweep_goes_on_with_other_limits_and_with_nothing_else_changed(work: Path) -> None:
    first = config_of(work)
    other = config_of(work, "sweep.max_concurrent_trials=7", "sweep.max_minutes=3", "sweep.price_per_cpu_hour=1")
    assert run_identity(first) == run_identity(other)
    assert run_identity(first) != run_identity(config_of(work, "sweep.num_trials=9"))
    keys = content_keys(config_of(work, **several(work, "one", "two")))
    assert set(keys) == {"data", "encoders.one", "encoders.two"}
    assert keys["encoders.one"] == content_keys(first)["encoder"]
    assert keys["encoders.one"] != keys["encoders.two"]


def test_resume_asks_for_a_sweep_that_has_begun(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["sweep", "--resume", f"output={work / 'nothing'}", f"data.path={work / 'data'}", f"encoder={work / 'one'}"]
    assert cli.main(given) == 2
    assert "--resume: output=" in capsys.readouterr().err


def test_a_sweep_s_gauges_have_the_name_of_its_trials_runs(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TUNE_DISABLE_SIGINT_HANDLER", "TUNE_GLOBAL_CHECKPOINT_S"):
        monkeypatch.setenv(name, "0")
    named: list[str] = []
    monkeypatch.setattr("ray.tune.run", lambda *_, **__: None)
    monkeypatch.setattr("beats_ray.tune.gauges.sweep_callbacks", lambda run, *_: named.append(run) or [])
    config = config_of(work, "output=sweep")
    needs = TrialNeeds(uses_ray_train=False, worker={"CPU": 1.0}, num_workers=1, reading_cpus=0.0)
    _tune(Trials(config, manifest_of(work), None, needs), open_place(config.output), None, None, 1)
    assert named == [run_name(open_place("sweep").uri)]
    assert named != ["sweep"]
