"""A trial in this process, a real engine on a few tones: interrupted, repeated, failed, and given another's weights."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.prepared import write_dataset

from beats_ray.config import SweepConfig, UserError, load_config
from beats_ray.data.batches import MicroBatch, to_micro_batch
from beats_ray.data.manifest import DatasetManifest
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.train.faults import TrainingDiverged
from beats_ray.tune.placement import TrialNeeds
from beats_ray.tune.population import read_pointer
from beats_ray.tune.trial import Trials, run_trial

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("process_group")]

METRIC = "validation/accuracy"
SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
NAMES, HERTZ = ("low", "middle", "high"), (200.0, 900.0, 4000.0)
SAMPLES = 8000
SETTINGS = [
    "data.clip_seconds=0.5", "finetune.augment.mixup=0", "finetune.augment.roll_seconds=0", "finetune.layer_drop=0",
    "finetune.validate_every_steps=8", "finetune.train.steps=24", "finetune.train.warmup_steps=1",
    "finetune.train.learning_rate=3e-3", "finetune.train.layer_decay=1", "finetune.train.global_batch_size=4",
    "finetune.train.micro_batch_size=4", "finetune.train.loggers=[]", "finetune.train.max_bad_steps=2",
]  # fmt: skip
GOOD, USELESS = {"train.learning_rate": 3e-3}, {"train.learning_rate": 1e-9}


@dataclass(frozen=True)
class Tones:
    """Stands for decoded clips in the object store: endless tones, of which nine are held out."""

    def batches(self, *, global_batch_size: int, start_step: int, stop_step: int, **_: Any) -> Iterator[MicroBatch]:
        for step in range(start_step, stop_step):
            yield tones(np.arange(step * global_batch_size, (step + 1) * global_batch_size))

    def eval_batches(self, **_: Any) -> Iterator[MicroBatch]:
        yield tones(np.arange(10_000, 10_009))


def tones(positions: np.ndarray) -> MicroBatch:
    audio = []
    for position in positions:
        rng = np.random.default_rng(position)
        hertz = HERTZ[position % 3] * (1 + 0.03 * rng.random())
        wave = np.sin(np.arange(SAMPLES) * 2 * np.pi * hertz / 16_000) * 6000 + rng.normal(size=SAMPLES) * 200
        audio.append(wave.astype(np.int16))
    return to_micro_batch(
        {
            "audio": np.stack(audio), "num_samples": np.full(len(positions), SAMPLES),
            "targets": np.eye(3, dtype=np.uint8)[positions % 3], "position": positions,
            "clip_id": np.array([f"clip-{position}" for position in positions]),
        }
    )  # fmt: skip


@dataclass
class Tune:
    """Ray Tune as a trial sees it. stop_after: reports after which it ends the trial, as a scheduler would."""

    trial_id: str = "t"
    stop_after: int = 10**6
    checkpoint: Any = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    pointers: list[dict[str, Any]] = field(default_factory=list)

    def report(self, metrics: dict[str, Any], checkpoint: Any = None) -> None:
        self.reports.append(metrics)
        if checkpoint is not None:
            self.pointers.append(read_pointer(checkpoint))
        if len(self.reports) >= self.stop_after:
            raise SystemExit

    @property
    def accuracies(self) -> list[float]:
        return [report[METRIC] for report in self.reports]


@pytest.fixture
def manifest(tmp_path: Path) -> DatasetManifest:
    torch.manual_seed(0)
    save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), tmp_path / "encoder")
    return write_dataset(tmp_path / "data", NAMES)


def run(
    folder: Path,
    manifest: DatasetManifest,
    parameters: dict[str, Any],
    tune: Tune,
    *overrides: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Tune:
    """One start of a trial, until it is done or `tune` ends it."""
    given = [f"output={folder / 'sweep'}", f"data.path={folder / 'data'}", f"encoder={folder / 'encoder'}", *SETTINGS]
    config = load_config(SweepConfig, None, [*given, *overrides])
    monkeypatch.setattr("ray.tune.report", tune.report)
    monkeypatch.setattr("ray.tune.get_context", lambda: SimpleNamespace(get_trial_id=lambda: tune.trial_id))
    monkeypatch.setattr("ray.tune.get_checkpoint", lambda: tune.checkpoint)
    needs = TrialNeeds(uses_ray_train=False, worker={"CPU": 1.0}, num_workers=1, reading_cpus=0.0)
    trials = Trials(config, manifest, Tones(), needs)
    if tune.stop_after < 10**6:
        with pytest.raises(SystemExit):
            run_trial(parameters, trials)
    else:
        run_trial(parameters, trials)
    return tune


def test_an_interrupted_trial_goes_on_and_a_finished_one_only_says_again_what_it_found(
    tmp_path: Path, manifest: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = "finetune.train.checkpoint_every_steps=8"
    first = run(tmp_path, manifest, GOOD, Tune(stop_after=1), saves, monkeypatch=monkeypatch)
    request = tmp_path / "sweep" / "trials" / "t" / "stop-requested.json"
    request.write_text("{}")  # as Ctrl-C left it: a second one must be heard, too
    second = run(tmp_path, manifest, GOOD, Tune(), saves, monkeypatch=monkeypatch)
    assert not request.exists()
    assert [report["step"] for report in first.reports + second.reports] == [8, 16, 24]
    assert [report["validations"] for report in first.reports + second.reports] == [1, 2, 3]
    model = tmp_path / "sweep" / "trials" / "t" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    third = run(tmp_path, manifest, GOOD, Tune(), saves, monkeypatch=monkeypatch)
    assert model.stat().st_mtime_ns == written
    assert len(third.reports) == 1
    assert third.reports[0][METRIC] == second.reports[-1][METRIC]
    assert third.reports[0]["test/accuracy"] == second.reports[-1]["test/accuracy"]
    undisturbed = run(tmp_path, manifest, GOOD, Tune("other"), saves, monkeypatch=monkeypatch)
    assert undisturbed.accuracies == first.accuracies + second.accuracies


def test_repeats_are_runs_of_their_own_and_the_last_report_is_their_mean(
    tmp_path: Path, manifest: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = ["sweep.repeats=2", "finetune.train.steps=16"]
    found = run(tmp_path, manifest, GOOD, Tune(), *fewer, monkeypatch=monkeypatch)
    assert [(report["step"], report["validations"]) for report in found.reports] == [(8, 1), (16, 2), (24, 3), (32, 4)]
    last = found.reports[-1]
    assert last[METRIC] == pytest.approx((last["repeat/0"] + last["repeat/1"]) / 2)
    seeds = [
        json.loads((tmp_path / "sweep" / "trials" / "t" / f"repeat-{repeat}" / "stage.json").read_text())["config"][
            "train"
        ]["seed"]
        for repeat in (0, 1)
    ]
    assert seeds == [0, 1]


def test_what_a_trial_fails_with_is_written_and_what_diverged_is_not_tried_again(
    tmp_path: Path, manifest: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="warmup_steps=30 is more than steps=24"):
        run(tmp_path, manifest, {"train.warmup_steps": 30}, Tune("refused"), monkeypatch=monkeypatch)
    refused = json.loads((tmp_path / "sweep" / "trials" / "refused" / "failure.json").read_text())
    assert refused["kind"] == "settings"
    for _ in range(2):
        with pytest.raises(TrainingDiverged):
            run(tmp_path, manifest, {"train.learning_rate": 1e30}, Tune("far"), monkeypatch=monkeypatch)
    failure = json.loads((tmp_path / "sweep" / "trials" / "far" / "failure.json").read_text())
    assert failure["kind"] == "diverged"
    attempts = json.loads((tmp_path / "sweep" / "trials" / "far" / "attempts.json").read_text())
    assert attempts["attempts"] == 1


def test_a_bad_member_takes_a_good_one_s_weights_and_is_better_at_once(
    tmp_path: Path, manifest: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = ["sweep.scheduler=pbt", "sweep.search=random", "finetune.train.steps=40"]
    good = run(tmp_path, manifest, GOOD, Tune("good", stop_after=4), *population, monkeypatch=monkeypatch)
    bad = run(tmp_path, manifest, USELESS, Tune("bad", stop_after=4), *population, monkeypatch=monkeypatch)
    assert good.accuracies[-1] > max(bad.accuracies) + 0.2
    pointer = good.pointers[-1]
    assert pointer["step"] == 32

    class Given:
        """What Ray hands a member: a folder with the pointer."""

        def as_directory(self) -> Any:
            return _folder_with(tmp_path / "given", pointer)

    after = run(tmp_path, manifest, USELESS, Tune("bad", checkpoint=Given()), *population, monkeypatch=monkeypatch)
    assert [report["step"] for report in after.reports] == [40]
    assert after.accuracies[0] >= good.accuracies[-1]  # at so low a rate the weights stay what they are
    followed = json.loads((tmp_path / "sweep" / "trials" / "bad" / "followed.json").read_text())
    assert followed == pointer


def _folder_with(folder: Path, pointer: dict[str, Any]) -> Any:
    from contextlib import nullcontext

    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.json").write_text(json.dumps(pointer))
    return nullcontext(folder)
