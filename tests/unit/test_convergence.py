"""The convergence experiment: settings follow seed and budget, the table is right, pictures are reproducible."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from beats_ray.cli import cli
from beats_ray.config import ConfigError, ConvergenceConfig, UserError, load_config
from beats_ray.console import Console
from beats_ray.convergence import arm_config, check_judging, finetuning_config, run_convergence
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import open_place
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.report import write_curves
from beats_ray.reporting.convergence import (
    JudgedEncoder,
    read_seed,
    spread,
    summary_markdown,
    summary_rows,
    tail_mean,
)
from beats_ray.reporting.pictures import curves_picture
from beats_ray.stages import build_stages
from tests.support.prepared import write_dataset

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def settings(*overrides: str) -> ConvergenceConfig:
    return load_config(ConvergenceConfig, str(ROOT / "jobs" / "convergence-mini.yaml"), list(overrides))


def arm(config: ConvergenceConfig, seed: int = 0, positions: str = "true", iterations: int = 3):
    return arm_config(config, seed, positions, iterations, open_place("somewhere"))


def test_the_same_budget_gives_the_same_steps_whatever_the_seed_and_the_positions() -> None:
    config = settings("minutes=10", "clips_per_s=32")
    first, other = arm(config), arm(config, seed=2, positions="compact", iterations=1)
    assert first.pretrain.train.steps == 10 * 60 * 32 // 16
    assert first.pretrain.train.warmup_steps == first.pretrain.train.steps // 10
    assert first.distill.train.steps == first.pretrain.train.steps // 4
    assert first.pretrain.encoder.positions == "true"
    assert other.pretrain.encoder.positions == "compact"
    same = {"output", "iterations", "random_projection", "pretrain", "distill"}
    assert first.model_dump(exclude=same) == other.model_dump(exclude=same)
    change = {"seed": 2}
    assert other.pretrain.train == first.pretrain.train.model_copy(update=change)
    assert other.random_projection == first.random_projection.model_copy(update=change)
    assert (
        arm(settings("minutes=null", "pretrain.train.steps=77", "pretrain.train.warmup_steps=7")).pretrain.train.steps
        == 77
    )


def test_a_teacher_for_each_iteration_leaves_the_run_of_one_iteration_as_it_is(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, ())
    one, each = settings(f"data.path={tmp_path}"), settings(f"data.path={tmp_path}", "teacher=[pretrained, pretrained]")
    for positions, iterations in (("true", 3), ("compact", 1)):
        first, other = (build_stages(arm(one_of, 0, positions, iterations), manifest) for one_of in (one, each))
        assert [stage.key for stage in first] == [stage.key for stage in other]
    chosen = settings("teacher=[pretrained, finetuned]")
    assert arm(chosen).teacher == ("pretrained", "finetuned")
    assert arm(chosen, iterations=1).iterations == 1


def test_tasks_of_their_own_are_those_of_every_run() -> None:
    config = load_config(ConvergenceConfig, None, ["output=o", "data.path=d", "judged=j", "tasks.esc50.data.path=p"])
    assert arm(config).tasks == config.tasks


# --- fine-tuning and what is judged -----------------------------------------------------------------------------------


def test_each_encoder_is_finetuned_on_the_judged_set_with_its_own_seed() -> None:
    config = settings("data.folds=[2, 3]", "data.retry_seconds=7", "finetune.train.steps=33", "judged=j", "output=o")
    found = finetuning_config(config, 2, "compact", 1)
    assert found.encoder.endswith("o/seed-2/compact/iteration-1/pretrain/model")
    assert found.output.endswith("o/seed-2/compact/finetuned-1")
    assert (found.data.path, found.data.folds, found.data.retry_seconds, found.data.clip_seconds) == ("j", (), 7, 5)
    assert found.cross_validation.seeds == (2,)
    assert found.finetune.train.steps == 33
    with pytest.raises(ConfigError, match=r"cross_validation.seeds=\[0, 1\].*set seeds"):
        settings("cross_validation.seeds=[0, 1]")


def test_a_set_that_cannot_judge_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, ("a", "b"))
    check_judging(settings("judged=j"), manifest)
    with pytest.raises(UserError, match="judged=j: has no labels"):
        check_judging(settings("judged=j"), manifest.model_copy(update={"label_names": ()}))
    with pytest.raises(UserError, match="judged=j: a clip has several labels"):
        check_judging(settings("judged=j"), manifest.model_copy(update={"multi_label": True}))
    with pytest.raises(UserError, match="7 is not among the folds"):
        check_judging(settings("judged=j", "finetuned=true", "cross_validation.folds=[7]"), manifest)
    with pytest.raises(UserError, match=r"train.deepspeed.*sparkle"):
        check_judging(settings("judged=j", "finetuned=true", "finetune.train.deepspeed={sparkle: 1}"), manifest)


def test_judgements_are_made_once_for_each_encoder_and_judged_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write_dataset(tmp_path / name, ("a", "b"))
    shards = (tmp_path / "second" / "dataset.json").read_text().replace('"sha256":"0"', '"sha256":"other"')
    (tmp_path / "second" / "dataset.json").write_text(shards)
    assert read_manifest(open_place(str(tmp_path / "second"))).shards[0].sha256 == "other"
    done: list[str] = []
    measured = itertools.count()

    def iterate(config: Any, _console: Console) -> None:
        for index in range(config.iterations + 1):
            folder = Path(config.output) / f"iteration-{index}" / "pretrain" / "model"
            if not folder.exists():
                torch.manual_seed(index)
                folder.parent.mkdir(parents=True)
                save_model(BeatsEncoder(encoder_config("tiny", num_layers=1, width=32, ffn_width=32)), folder)
        (Path(config.output) / "run.json").write_text("{}")

    def judge(config: Any, _console: Console) -> None:
        done.append(Path(config.output).name)
        Path(config.output).mkdir(parents=True, exist_ok=True)
        value = 0.7 + len(done) / 1000
        for name in ("evaluation.json", "cross_validation.json"):
            result = {"accuracy": value, "fold_accuracies": {"1": 0.5}, "encoders": {"encoder": {"accuracy": value}}}
            (Path(config.output) / name).write_text(json.dumps(result))

    def measure(*_: Any) -> dict[str, Any]:
        done.append("baselines")
        return {"random_forest_mfcc": {"accuracy": 0.8 + next(measured) / 1000}}

    monkeypatch.setattr("beats_ray.iterate.run_iterate", iterate)
    monkeypatch.setattr("beats_ray.evaluate.run_evaluate", judge)
    monkeypatch.setattr("beats_ray.cross_validate.run_cross_validate", judge)
    monkeypatch.setattr("beats_ray.baselines.run_baselines", measure)
    monkeypatch.setattr("beats_ray.launch.check_fits", lambda *_: None)

    def run(judged: str, *overrides: str) -> list[str]:
        done.clear()
        common = (f"output={tmp_path}/out", f"judged={tmp_path}/{judged}", "iterations=1", "compact=true", "seeds=[0]")
        run_convergence(settings(*common, *overrides), Console())
        return done

    def baseline() -> float:
        return float(json.loads((tmp_path / "out" / "convergence.json").read_text())["rows"][0]["probe"]["mean"])

    probes = ["judged-0", "judged-1"] * 2
    assert run("first") == ["baselines", *probes]
    first = baseline()
    assert run("first") == []
    tuned = ["finetuned-0", "finetuned-1", "finetuned-1"]  # an untrained encoder with compact positions is the same
    assert run("first", "finetuned=true") == tuned
    assert run("first", "finetuned=true", "cross_validation.max_concurrent_runs=1") == []
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "convergence.json").read_text())["rows"]}
    assert rows["iteration 1, compact positions"]["finetuned_gain"]["mean"] == pytest.approx(0.002)
    assert run("second", "finetuned=true") == ["baselines", *probes, *tuned]
    assert baseline() != first
    assert run("first", "finetuned=true") == [], "what was measured before is kept aside and found again"
    assert baseline() == first
    save_model(
        BeatsEncoder(encoder_config("tiny", num_layers=1, width=32, ffn_width=64)),
        tmp_path / "out" / "seed-0" / "true" / "iteration-1" / "pretrain" / "model",
    )
    assert run("first", "finetuned=true") == ["judged-1", "finetuned-1"]


# --- the tables -------------------------------------------------------------------------------------------------------


def encoder(probe: float, labels: str = "-", **figures: float) -> JudgedEncoder:
    return JudgedEncoder({"probe": probe, **figures}, labels)


def test_gains_are_taken_seed_by_seed_and_errors_are_those_of_the_mean() -> None:
    seeds: Any = {
        0: {
            "true": {0: encoder(0.60, finetuned=0.5), 1: encoder(0.70, "random projection", finetuned=0.8, loss=3.0)},
            "compact": {0: encoder(0.60), 1: encoder(0.65, finetuned=0.55)},
        },
        1: {"true": {0: encoder(0.70), 1: encoder(0.82, "random projection", finetuned=0.7, loss=3.4)}, "compact": {}},
        2: {"true": {0: encoder(0.65)}},  # not finished
    }
    rows = {row["name"]: row for row in summary_rows({"random_forest_mfcc": {"accuracy": 0.839}}, seeds)}
    assert list(rows) == ["random forest, MFCC", "untrained", "iteration 1", "iteration 1, compact positions"]
    assert rows["untrained"]["probe"]["seeds"] == 3
    assert rows["untrained"]["gain"]["seeds"] == 0
    first = rows["iteration 1"]
    assert first["probe"]["mean"] == pytest.approx(0.76)
    assert first["gain"]["mean"] == pytest.approx(0.11)
    assert first["gain"]["standard_error"] == pytest.approx(0.01), "not of probes that differ by seed"
    assert first["finetuned"]["mean"] == pytest.approx(0.75)
    assert first["finetuned"]["standard_error"] == pytest.approx(0.05)
    assert first["finetuned_gain"] == pytest.approx(spread([0.3], signed=True)), "of the seed that has both"
    assert first["training"]["loss"]["mean"] == pytest.approx(3.2)
    compact = rows["iteration 1, compact positions"]
    assert compact["gain"]["text"] == "+0.050"
    assert compact["finetuned_gain"]["text"] == "+0.050", "the untrained encoder is fine-tuned once"
    accuracies, training = summary_markdown(list(rows.values())).split("\n\n")
    for table in (accuracies, training):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| iteration 1 | 2 | 0.760 ± 0.060 | +0.110 ± 0.010 | 0.750 ± 0.050 | +0.300 |" in accuracies
    (line,) = training.splitlines()[2:]
    assert line.startswith("| iteration 1 | random projection | 3.200 ± 0.200 |")


def test_spread_and_tail_of_little() -> None:
    assert spread([])["text"] == "-"
    assert spread([0.5]) == {"mean": 0.5, "standard_error": None, "seeds": 1, "text": "0.500"}
    assert tail_mean([]) is None
    assert tail_mean([(float(step), float(step)) for step in range(1, 101)]) == pytest.approx(95.5)
    assert tail_mean([(10.0, 3.0)]) == 3.0


def write_arm(folder: Path, judged: tuple[int, ...] = (0, 1)) -> None:
    (folder / "iteration-0" / "pretrain").mkdir(parents=True)
    training, tokenizer = (folder / "iteration-1" / name for name in ("pretrain", "tokenizer"))
    for place in (training, tokenizer):
        place.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "config": {}}))
    teacher = {"status": "complete", "config": {"inputs": {"teacher": "iteration-0/pretrain 1a2b"}}}
    (tokenizer / "stage.json").write_text(json.dumps(teacher))
    metrics = {
        "train/clip_band_loss": 3.5, "train/sounding_loss": 3.25, "train/sounding_clip_band_loss": 3.0,
        "labels/perplexity": 40.0, "labels/used_code_fraction": 0.25,
    }  # fmt: skip
    records = [{"step": step, "train/loss": 5 - step / 100, **metrics} for step in range(10, 210, 10)]
    (training / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for index in judged:
        place = folder / f"judged-{index}"
        place.mkdir()
        accuracy = {"accuracy": 0.6 + index / 10, "fold_accuracies": {"1": 0.5, "2": 0.7}}
        (place / "evaluation.json").write_text(json.dumps(accuracy))
    (folder / "finetuned-1").mkdir()
    (folder / "finetuned-1" / "cross_validation.json").write_text('{"encoders": {"encoder": {"accuracy": 0.9}}}')


def test_a_seed_is_read_from_its_folder_as_far_as_it_was_judged(tmp_path: Path) -> None:
    assert read_seed(open_place(str(tmp_path / "none"))) == {}
    write_arm(tmp_path / "half", judged=(0,))
    assert list(read_seed(open_place(str(tmp_path / "half")))) == [0]
    write_arm(tmp_path / "whole")
    found = read_seed(open_place(str(tmp_path / "whole")))
    assert found[0] == JudgedEncoder({"probe": 0.6, "fold 1": 0.5, "fold 2": 0.7})
    assert found[1].labels == "iteration 0, pre-trained encoder"
    assert found[1].figures == pytest.approx({
        "probe": 0.7, "fold 1": 0.5, "fold 2": 0.7, "finetuned": 0.9, "loss": 3.05, "clip-band loss": 3.5,
        "below clip-band": 0.45, "loss, no silence": 3.25, "clip-band loss, no silence": 3.0,
        "below clip-band, no silence": -0.25, "label perplexity": 40.0, "used codes": 0.25,
    })  # fmt: skip


def test_report_writes_curves_of_a_run_that_hold_every_iteration_and_are_the_same_bytes(tmp_path: Path) -> None:
    write_arm(tmp_path / "run")
    assert (
        cli.main(["report", str(tmp_path / "run"), "--curves", str(tmp_path / "pictures")], standalone_mode=False)
        is None
    )
    picture = (tmp_path / "pictures" / "loss.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    for text in (b"iteration 1", b"iteration 1: without a model", b"nats per masked patch"):
        assert text in picture
    write_curves([str(tmp_path / "run")], str(tmp_path / "again"))
    assert (tmp_path / "again" / "loss.svg").read_bytes() == picture
    assert (tmp_path / "again" / "perplexity.svg").read_bytes() != picture


def test_a_picture_of_many_points_stays_small_and_one_without_any_is_still_a_picture() -> None:
    curve = [(float(step), 3.0) for step in range(100_000)]
    assert len(curves_picture("loss", {"a": [curve, curve]}, "nats", {})) < 60_000
    assert b"</svg>" in curves_picture("loss", {"a": [[]]}, "nats", {})
