"""Stages as a graph: a change runs again exactly what depends on it, a change back nothing, and the plan says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from beats_ray import cli
from beats_ray.aside import make_ready
from beats_ray.config import ConfigError, IterateConfig, PretrainConfig, load_config
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import open_place
from beats_ray.downstream import write_results
from beats_ray.identity import content_keys, stage_identity
from beats_ray.iterate import record_run
from beats_ray.iterate_plan import Row, inspect, plan_stages
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    QuantizerConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    encoder_config,
    save_model,
    save_released,
)
from beats_ray.stage import check_output, differences, run_stage
from beats_ray.stages import Stage, build_stages
from tests.support.prepared import write_dataset

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SMALL = [
    f"{part}.train.{name}={value}"
    for part in ("pretrain", "distill", "finetune")
    for name, value in (("steps", 20), ("warmup_steps", 2), ("global_batch_size", 8), ("num_workers", 1))
]
SMALL += ["iterations=2", "data.clip_seconds=2", "pretrain.encoder.preset=tiny", "distill.encoder.preset=tiny"]
TINY = encoder_config("tiny", num_layers=1)
FIRST = ["tokenizer", "pretrain", "probe", "sweep"]
LATER = ["tokenizer", "labels", "pretrain", "probe", "sweep"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a prepared data set in `data`."""
    write_dataset(tmp_path / "data", ("a", "b", "c"))
    return tmp_path


def config_of(folder: Path, *overrides: str) -> IterateConfig:
    return load_config(
        IterateConfig, None, [f"data.path={folder / 'data'}", f"output={folder / 'run'}", *SMALL, *overrides]
    )


def stages_of(config: IterateConfig) -> list[Stage]:
    return build_stages(config, read_manifest(open_place(config.data.path)))


def rows_of(config: IterateConfig) -> dict[str, Row]:
    rows = plan_stages(stages_of(config))
    return {f"{row.stage.iteration} {row.stage.name}": row for row in rows}


def work_off(config: IterateConfig, stop_in: str = "") -> list[str]:
    """Takes every stage through its states as a run does, the work being a line that says whose it is."""
    worked = []
    for stage in stages_of(config):
        name = f"{stage.iteration} {stage.name}"

        def work(stage: Stage = stage, name: str = name) -> None:
            worked.append(name)
            (stage.folder / "result").write_bytes(stage.key.encode())
            if name == stop_in:
                raise KeyboardInterrupt

        make_ready(stage.folder, stage.key)
        run_stage(stage.folder, stage.identity, work)
    for stage in stages_of(config):
        assert (stage.folder / "result").read_bytes() == stage.key.encode(), stage.label
    return worked


def of(iteration: int, names: list[str]) -> list[str]:
    return [f"{iteration} {name}" for name in names]


ALL = of(0, ["pretrain", "baselines", "probe"]) + of(1, FIRST) + of(2, LATER)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("finetune.train.learning_rate=0.002", ["1 sweep", "2 sweep"]),
        ("probe.c=2", ["0 probe", "1 probe", "2 probe"]),
        ("distill.train.steps=30", of(2, LATER)),
        ("pretrain.train.steps=30", [*of(1, FIRST[1:]), *of(2, LATER)]),
        ("random_projection.seed=1", [*of(1, FIRST), *of(2, LATER)]),
        ("teacher=finetuned", of(2, [name for name in LATER if name != "probe"])),
        ("data.clip_seconds=1", [*of(1, ["pretrain", "probe", "sweep"]), *of(2, LATER)]),
        ("iterations=3", of(3, LATER)),
        ("pretrain.train.max_failures=9", []),
        ("distill.train.micro_batch_size=4", []),
        ("inference.batch_clips=3", []),
        ("distill.supervised_learning_rate=0.1", []),  # no teacher is supervised
        ("data.prefetch_blocks=9", []),
    ],
)
def test_a_changed_setting_runs_again_what_depends_on_it_and_a_change_back_nothing(
    change: str, expected: list[str], folder: Path
) -> None:
    config, changed = config_of(folder), config_of(folder, change)
    assert work_off(config) == ALL
    assert [name for name, row in rows_of(changed).items() if row.state != "done"] == expected
    assert work_off(changed) == expected
    assert work_off(changed) == []
    assert [name for name, row in rows_of(config).items() if row.state != "done"] == []
    assert work_off(config) == []


def test_with_a_fine_tuned_teacher_the_sweep_is_what_the_next_iteration_depends_on(folder: Path) -> None:
    teacher = "teacher=finetuned"
    assert work_off(config_of(folder, teacher)) == [name for name in ALL if name != "2 probe"]
    changed = config_of(folder, teacher, "sweep.num_trials=3")
    later = [name for name in LATER if name != "probe"]
    assert work_off(changed) == ["1 sweep", *of(2, later)]
    faster = config_of(folder, teacher, "sweep.num_trials=3", "distill.supervised_learning_rate=0.1")
    assert work_off(faster) == of(2, later)
    # It has a learning rate of its own, and the encoder's is of no effect.
    assert work_off(config_of(folder, teacher, "distill.train.learning_rate=0.3")) == []


def test_each_iteration_may_have_a_teacher_of_its_own(folder: Path) -> None:
    stages = stages_of(config_of(folder, "iterations=3", "teacher=[pretrained, finetuned]"))
    tokenizers = {stage.iteration: stage for stage in stages if stage.name == "tokenizer"}
    assert tokenizers[2].inputs["teacher"].startswith("iteration-1/pretrain ")
    assert tokenizers[3].inputs["teacher"].startswith("iteration-2/sweep ")
    assert "iteration 2's fine-tuned model" in tokenizers[3].title
    rates = [tokenizers[iteration].job.train.learning_rate for iteration in (2, 3)]  # type: ignore[union-attr]
    assert rates == [5e-5, 5e-4]  # the paper's for a self-supervised and for a supervised teacher


def test_another_data_set_runs_everything_that_reads_it_and_a_moved_one_nothing(folder: Path) -> None:
    config = config_of(folder)
    work_off(config)
    (folder / "data").rename(folder / "elsewhere")
    (folder / "run").rename(folder / "moved")
    moved = config_of(folder, f"data.path={folder / 'elsewhere'}", f"output={folder / 'moved'}")
    assert work_off(moved) == []
    manifest = json.loads((folder / "elsewhere" / "dataset.json").read_text())
    manifest["shards"][1]["sha256"] = "another"
    (folder / "elsewhere" / "dataset.json").write_text(json.dumps(manifest))
    rows = rows_of(moved)
    assert rows["0 probe"].reason == "the data set is another"
    assert work_off(moved) == [name for name in ALL if name not in {"0 pretrain", "1 tokenizer"}]  # which read none


def test_an_interrupted_stage_goes_on_also_after_a_change_and_back(folder: Path) -> None:
    config, changed = config_of(folder), config_of(folder, "distill.train.steps=30")
    with pytest.raises(KeyboardInterrupt):
        work_off(config, stop_in="2 tokenizer")
    assert rows_of(config)["2 tokenizer"].state == "goes on"
    work_off(changed)
    row = rows_of(config)["2 tokenizer"]
    assert (row.state, row.reason) == ("goes on", f"kept in tokenizer-{row.stage.key[:8]}")
    assert work_off(config) == of(2, LATER)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_says_why(folder: Path) -> None:
    work_off(config_of(folder))
    rows = rows_of(config_of(folder, "pretrain.train.steps=30", "pretrain.masking.ratio=0.6"))
    assert rows["1 tokenizer"].state == "done"
    assert rows["1 pretrain"].state == "runs again"
    assert rows["1 pretrain"].reason == "masking.ratio: 0.75 -> 0.6; train.steps: 20 -> 30"
    assert rows["1 sweep"].reason == "because iteration 1 pretrain runs again"
    assert rows["2 labels"].reason == "because iteration 2 tokenizer runs again"
    assert rows["2 pretrain"].reason.endswith("; because iteration 2 labels runs again; ...")
    teacher = rows_of(config_of(folder, "teacher=finetuned"))["2 tokenizer"].reason
    assert teacher == "train.learning_rate: 5e-05 -> 0.0005; teacher: iteration-1/pretrain -> iteration-1/sweep"
    third = rows_of(config_of(folder, "iterations=3"))["3 labels"]
    assert (third.state, third.reason) == ("runs", "new")


def test_the_plan_counts_what_is_left(folder: Path) -> None:
    config = config_of(folder, "sweep.num_trials=3")
    rows = rows_of(config)
    assert rows["1 pretrain"].clips == 20 * 8
    assert rows["1 sweep"].clips == 3 * 20 * 8
    assert rows["2 labels"].clips == 40
    assert rows["2 labels"].flops > 0
    assert rows["2 tokenizer"].flops > rows["1 pretrain"].flops > 0
    whole = rows["1 pretrain"].flops
    stage = rows["1 pretrain"].stage
    with pytest.raises(KeyboardInterrupt):
        work_off(config, stop_in="1 pretrain")
    commit = {"files": {"a": {"bytes": 3}}}
    (stage.folder / "checkpoints" / "step-00000005" / "commit.json").write_json(commit)
    (stage.folder / "checkpoints" / "step-00000005" / "a").write_bytes(b"abc")
    left = rows_of(config)["1 pretrain"]
    assert (left.state, left.clips) == ("goes on", 15 * 8)
    assert left.flops == pytest.approx(whole * 15 / 20)


def plan(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> tuple[int, str, list[str]]:
    places = [f"data.path={folder / 'data'}", f"output={folder / 'run'}"]
    status = cli.main(["iterate", "--plan", *places, *SMALL, *overrides])
    out, err = capsys.readouterr()
    return status, out, [line.removeprefix("beats-ray: error: ") for line in err.splitlines()]


def test_the_command_prints_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work_off(config_of(folder))
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    status, out, err = plan(capsys, folder, "distill.train.steps=30", "--tflops", "0.001")
    assert (status, err) == (0, [])
    assert "train.steps: 20 -> 30" in out
    assert "5 of 12 stages" in out
    assert "at 0.001 TFLOP/s" in out
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    hours = {
        row.stage.label: row.flops / 1e9 / 3600 for row in rows_of(config_of(folder, "distill.train.steps=30")).values()
    }
    assert f"{hours['iteration 2 tokenizer']:,.3g}" in out


def test_every_mistake_is_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, mistakes = plan(
        capsys, folder, "finetune.folds.test_fold=9", "distill.tokenizer.teacher_layer=77",
        "pretrain.train.deepspeed={gradient_clipping: 3}", "start.encoder=/nowhere", "finetune.train.num_workers=[1,2]",
        "finetune.train.global_batch_size=16",
    )  # fmt: skip
    assert (status, out) == (2, "")
    assert sorted(line.split("=")[0].split(":")[0] for line in mistakes) == [
        "distill.tokenizer.teacher_layer",
        "finetune.folds.test_fold",
        "finetune.train.num_workers",
        "pretrain.train.deepspeed.gradient_clipping",
        "start.encoder",
    ]
    status, _, mistakes = plan(capsys, folder, "teacher=[pretrained, pretrained]", "sweep.num_trials=many")
    assert status == 2
    assert len(mistakes) == 1  # rules of a section wait for its fields
    status, _, mistakes = plan(capsys, folder, "teacher=[pretrained, pretrained]")
    assert "has 2 entries for the tokenizers of 1 iterations" in mistakes[0]


def test_a_fine_tuned_teacher_needs_labels(folder: Path) -> None:
    write_dataset(folder / "unlabelled", ())
    path = f"data.path={folder / 'unlabelled'}"
    stages = stages_of(config_of(folder, path))
    assert {stage.name for stage in stages} == {"pretrain", "tokenizer", "labels"}
    found = inspect(config_of(folder, path, "teacher=finetuned"))
    assert ["has no labels to fine-tune a teacher on" in str(mistake) for mistake in found.mistakes] == [True]


def test_ray_is_not_even_imported(folder: Path) -> None:
    given = ["iterate", "--plan", f"data.path={folder / 'data'}", f"output={folder / 'run'}", *SMALL]
    code = f"import sys; from beats_ray import cli; assert cli.main({given!r}) == 0; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# --- starting points --------------------------------------------------------------------------------------------------


@pytest.fixture
def models(folder: Path) -> dict[str, Path]:
    """Models as others publish them: files of the release."""
    torch.manual_seed(0)
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=TINY, quantizer=QuantizerConfig(num_codes=32)))
    tokenizer.quantizer.batches_seen.fill_(4)
    made = {
        "encoder": BeatsEncoder(TINY),
        "classifier": AudioClassifier(BeatsEncoder(TINY), ClassifierConfig(num_classes=5)),
        "tokenizer": tokenizer,
    }
    return {name: save_released(module, folder / f"{name}.pt") for name, module in made.items()}


def test_a_run_starts_from_a_released_encoder_or_fine_tuned_model(folder: Path, models: dict[str, Path]) -> None:
    for name, rate in (("encoder", 5e-5), ("classifier", 5e-4)):
        stages = {stage.label: stage for stage in stages_of(config_of(folder, f"start.encoder={models[name]}"))}
        tokenizer = stages["iteration 1 tokenizer"]
        assert tokenizer.inputs["teacher"].startswith("sha256 ")
        assert tokenizer.job.train.learning_rate == rate  # type: ignore[union-attr]
        assert stages["iteration 1 pretrain"].inputs["labels"].startswith("iteration-1/labels ")


def test_a_run_starts_from_a_released_tokenizer_by_its_content(folder: Path, models: dict[str, Path]) -> None:
    start = f"start.tokenizer={models['tokenizer']}"
    work_off(config_of(folder, start))
    copied = models["tokenizer"].rename(folder / "renamed.pt")
    assert work_off(config_of(folder, f"start.tokenizer={copied}")) == []
    other = SelfDistilledTokenizer(TokenizerConfig(encoder=TINY, quantizer=QuantizerConfig(num_codes=32)))
    other.quantizer.batches_seen.fill_(4)
    save_released(other, copied)
    rows = rows_of(config_of(folder, f"start.tokenizer={copied}"))
    assert rows["1 tokenizer"].reason == "the tokenizer is another"
    assert rows["1 labels"].reason == "because iteration 1 tokenizer runs again"


def test_a_command_of_its_own_notices_a_replaced_tokenizer_and_not_a_moved_one(folder: Path) -> None:
    def config(tokenizer: Path) -> PretrainConfig:
        places = [f"data.path={folder / 'data'}", f"output={folder / 'out'}", f"tokenizer={tokenizer}"]
        return load_config(PretrainConfig, None, places)

    def identity(tokenizer: Path) -> dict[str, Any]:
        return stage_identity(config(tokenizer), content_keys(config(tokenizer)))

    first = save_model(RandomProjectionTokenizer(), folder / "tokenizer")
    before = identity(first)
    run_stage(open_place(str(folder / "out")), before, lambda: None)
    moved = first.rename(folder / "moved")
    assert check_output(open_place(str(folder / "out")), identity(moved))["status"] == "complete"
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + os.urandom(1))
    while identity(moved) == before:  # one time in 256 the same byte
        weights.write_bytes(weights.read_bytes()[:-1] + os.urandom(1))
    assert [name for name, _, _ in differences(before, identity(moved))] == ["inputs.tokenizer"]
    assert "random_projection" not in before  # a tokenizer is given: it plays no part


def test_run_json_keeps_its_beginning_and_says_what_was_changed(folder: Path) -> None:
    run = open_place(str(folder / "run"))
    record_run(run, config_of(folder))
    first = (run / "run.json").read_json()
    record_run(run, config_of(folder))
    assert (run / "run.json").read_json() == first
    first["started"] = "2026-01-01T00:00:00+00:00"
    (run / "run.json").write_json(first)
    record_run(run, config_of(folder, "distill.train.steps=30"))
    second = (run / "run.json").read_json()
    assert second["started"] == first["started"]
    assert second["config"]["distill"]["train"]["steps"] == 30
    assert [change["settings"] for change in second["changes"]] == [[["distill.train.steps", 20, 30]]]


# --- tasks ------------------------------------------------------------------------------------------------------------


def task_config(folder: Path, *overrides: str) -> IterateConfig:
    """Two tasks on a data set of their own, beside an unlabelled corpus."""
    for name, labels in (("corpus", ()), ("judged", ("a", "b"))):
        if not (folder / name).exists():
            write_dataset(folder / name, labels)
    values = {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "corpus"), "clip_seconds": 2},
        "iterations": 2,
        "tasks": {
            "folds": {
                "protocol": "cross-validate",
                "data": {"path": str(folder / "judged"), "clip_seconds": 4},
                "finetune": {"train": {"steps": 20, "warmup_steps": 2, "global_batch_seconds": 32}},
                "cross_validation": {"seeds": [0, 1]},
            },
            "once": {
                "protocol": "finetune",
                "data": {"path": str(folder / "judged")},
                "finetune": {"train": {"steps": 20, "warmup_steps": 2, "global_batch_size": 8}},
            },
            "frozen": {"protocol": "probe", "data": {"path": str(folder / "judged")}},
        },
    }
    path = folder / "tasks.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    plain = [given for given in SMALL if not given.startswith("finetune")]
    return load_config(IterateConfig, str(path), [*plain, *overrides])


TASKS = ["cross-validate-folds", "finetune-once", "probe-frozen"]


def test_every_encoder_is_judged_by_every_task(folder: Path) -> None:
    stages = stages_of(task_config(folder))
    assert [f"{stage.iteration} {stage.name}" for stage in stages] == [
        "0 pretrain", "0 probe-frozen",
        *(f"1 {name}" for name in ["tokenizer", "pretrain", *TASKS]),
        *(f"2 {name}" for name in ["tokenizer", "labels", "pretrain", *TASKS]),
    ]  # fmt: skip
    folds = next(stage for stage in stages if stage.name == TASKS[0])
    assert folds.job.finetune.train.global_batch_size == 8  # type: ignore[union-attr]
    assert folds.job.encoder.endswith("iteration-1/pretrain/model")  # type: ignore[union-attr]


def test_a_task_depends_on_its_own_data_and_settings_and_on_its_encoder(folder: Path) -> None:
    work_off(task_config(folder))
    assert work_off(task_config(folder, "tasks.once.finetune.dropout=0.1")) == ["1 finetune-once", "2 finetune-once"]
    assert work_off(task_config(folder, "tasks.once.data.read_tasks=3")) == []
    (folder / "judged").rename(folder / "elsewhere")
    moved = [f"tasks.{task}.data.path={folder / 'elsewhere'}" for task in ("folds", "once", "frozen")]
    assert work_off(task_config(folder, *moved)) == []
    write_dataset(folder / "other", ("a", "b"))
    manifest = folder / "other" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"sha256":"1"', '"sha256":"2"'))
    other = [*moved, f"tasks.frozen.data.path={folder / 'other'}"]
    assert work_off(task_config(folder, *other)) == [f"{iteration} probe-frozen" for iteration in (0, 1, 2)]
    again = work_off(task_config(folder, *moved, "pretrain.train.steps=30"))
    assert again == [*(f"1 {name}" for name in ["pretrain", *TASKS]), *(f"2 {name}" for name in LATER[:3] + TASKS)]
    names = folder / "elsewhere" / "dataset.json"
    names.write_text(names.read_text().replace('"label_names":["a","b"]', '"label_names":["b","a"]'))
    renamed = work_off(task_config(folder, *moved, "pretrain.train.steps=30"))
    assert renamed == ["0 probe-frozen", *(f"{iteration} {name}" for iteration in (1, 2) for name in TASKS)]


def test_the_plan_counts_the_runs_of_every_fold_and_seed(folder: Path) -> None:
    rows = rows_of(task_config(folder))
    assert rows["1 cross-validate-folds"].clips == 4 * 2 * 20 * 8
    assert rows["1 finetune-once"].clips == 20 * 8
    assert rows["1 probe-frozen"].clips == 40


def test_a_fine_tuned_teacher_is_the_first_task_that_has_one(folder: Path) -> None:
    write_dataset(folder / "own", ("a", "b"))
    manifest = folder / "own" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"sha256":"1"', '"sha256":"2"'))
    config = task_config(folder, "teacher=finetuned", f"tasks.once.data.path={folder / 'own'}")
    stages = {stage.label: stage for stage in stages_of(config)}
    assert stages["iteration 2 tokenizer"].inputs["teacher"].startswith("iteration-1/finetune-once ")
    assert stages["iteration 2 tokenizer"].title == "tokenizer, distilled from iteration 1's fine-tuned model"
    plain = {stage.label: stage for stage in stages_of(task_config(folder))}
    assert plain["iteration 2 tokenizer"].title == "tokenizer, distilled from iteration 1's pre-trained encoder"


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("tasks.once.data.path=/nowhere", "tasks.once.data.path: /nowhere: not a prepared data set"),
        ("tasks.once.data.path=CORPUS", "has no labels to judge by"),
        ("tasks.once.finetune.folds.test_fold=9", "tasks.once.finetune.folds.test_fold=9"),
        ("tasks.folds.cross_validation.folds=[7]", "tasks.folds.cross_validation.folds: 7 is not among the folds"),
        ("tasks.once.data.clip_seconds=0.01", "tasks.once.data.clip_seconds=0.01"),
    ],
)
def test_a_mistake_of_a_task_names_it(folder: Path, override: str, shown: str) -> None:
    given = override.replace("CORPUS", str(folder / "corpus")).replace("JUDGED", str(folder / "judged"))
    (mistake,) = inspect(task_config(folder, given)).mistakes
    assert shown in str(mistake)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("finetune.dropout=0.1", "move it to tasks.NAME.finetune"),
        ("tasks.more={protocol: probe}", "data.path is empty"),
        ("tasks.a/b={data: {path: x}}", "is to be a folder's name"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(folder: Path, override: str, shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        task_config(folder, override)


def test_the_results_are_of_held_out_clips_and_a_row_for_each_encoder_and_task(folder: Path) -> None:
    config = task_config(folder)
    run = open_place(str(folder / "run"))
    stages = {f"{stage.iteration} {stage.name}": stage for stage in stages_of(config)}

    def finish(name: str, file: str, content: str) -> None:
        stage = stages[name]
        run_stage(stage.folder, stage.identity, lambda: (stage.folder / file).write_bytes(content.encode()))

    last = json.dumps({"step": 20, "validation/accuracy": 0.9, "test/accuracy": 0.75})
    finish("1 finetune-once", "metrics.jsonl", json.dumps({"step": 10, "test/accuracy": 0.1}) + "\n" + last + "\n")
    fold = {"accuracy": 0.6, "standard_error": 0.07, "clips": 40}
    finish("1 cross-validate-folds", "cross_validation.json", json.dumps({"encoders": {"encoder": fold}}))
    finish("0 probe-frozen", "evaluation.json", json.dumps({"accuracy": 0.5, "standard_error": 0.08, "clips": 40}))
    write_results(run, stages.values())
    found = (run / "results.json").read_json()["results"]
    assert [(row["iteration"], row["task"], row["protocol"], row["value"], row["clips"]) for row in found] == [
        (0, "frozen", "probe", 0.5, 40), (1, "folds", "cross-validate", 0.6, 40), (1, "once", "finetune", 0.75, 4),
    ]  # fmt: skip
    assert found[2]["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    table = (run / "results.csv").read_bytes().decode().splitlines()
    assert table[0].startswith("iteration,task,protocol,data,metric,value")
    assert len(table) == 4


def test_folds_that_a_teacher_heard_the_labels_of_judge_nothing_after_it(folder: Path) -> None:
    config = config_of(folder, "teacher=[finetuned, pretrained]", "iterations=3")
    assert [stage.iteration for stage in stages_of(config) if stage.name == "probe"] == [0, 1]
    found = inspect(task_config(folder, "teacher=finetuned"))
    assert ["tasks.folds.protocol=cross-validate: takes each fold" in str(one) for one in found.mistakes] == [True]


def test_a_set_without_folds_has_no_probe_and_runs_all_else(folder: Path) -> None:
    path = folder / "data" / "dataset.json"
    values = json.loads(path.read_text()) | {"clips_by_fold": {"0": 40}}
    for shard in values["shards"]:
        for group in shard["row_groups"]:
            group["fold"] = 0
    path.write_text(json.dumps(values))
    assert {stage.name for stage in stages_of(config_of(folder))} == {"pretrain", "tokenizer", "labels", "sweep"}
    (mistake,) = inspect(task_config(folder, f"tasks.frozen.data.path={folder / 'data'}")).mistakes
    assert "tasks.frozen.protocol=probe" in str(mistake)
    assert "has fewer than two folds" in str(mistake)


def test_the_first_pre_training_begins_with_a_given_encoder(folder: Path, models: dict[str, Path]) -> None:
    config = config_of(folder, f"start.initial={models['encoder']}")
    stages = {stage.label: stage for stage in stages_of(config)}
    assert stages["iteration 1 pretrain"].inputs["initial"].startswith("sha256 ")
    assert stages["iteration 1 pretrain"].job.initial == str(models["encoder"])  # type: ignore[union-attr]
    assert "initial" not in stages["iteration 2 pretrain"].inputs
    assert ["has num_layers=1" in str(mistake) for mistake in inspect(config).mistakes] == [True]


def test_a_larger_cluster_is_no_other_sweep(folder: Path) -> None:
    work_off(config_of(folder))
    assert work_off(config_of(folder, "sweep.max_concurrent_trials=7")) == []
