"""Settings: files, overrides, defaults of nested sections, round trips, and one-line errors."""

from pathlib import Path

import pytest
import yaml

from beats_ray import config
from beats_ray.cli import COMMANDS, to_yaml
from beats_ray.config import ConfigError, IterateConfig, PretrainConfig, SweepConfig, TaskSettings, load_config, replace

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[2] / "jobs"
KINDS: dict[str, type[config.Section]] = {"prepare": config.PrepareConfig, "embed": config.EmbedConfig}
KINDS |= {name: command.kind for name, command in COMMANDS.items()}
KIND_OF_FILE = {"cross": "cross-validate", "tokenizer": "train-tokenizer"}


def failure(kind: type[config.Section], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(kind, None, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def job_files() -> list[Path]:
    return sorted(path for path in JOBS.glob("*.yaml") if path.name != "runtime-env.yaml")


def test_an_entry_that_has_sections_is_set_by_its_name_and_taken_out_by_null() -> None:
    given = ["output=out", "tasks.a.data.path=2024", "tasks.b.data.path=x", "tasks.a.finetune.dropout=0.1"]
    assert load_config(IterateConfig, None, given).tasks["a"].data.path == "2024"
    assert load_config(IterateConfig, None, given).tasks["a"].finetune.dropout == 0.1
    assert list(load_config(IterateConfig, None, [*given, "tasks.a=null"]).tasks) == ["b"]
    assert "tasks.a.finetune.dropuot" in failure(IterateConfig, *given, "tasks.a.finetune.dropuot=1")


def test_there_are_job_files() -> None:
    assert len(job_files()) >= 6


@pytest.mark.parametrize("path", job_files(), ids=lambda path: path.name)
def test_every_job_file_is_valid_and_holds_only_differences(path: Path) -> None:
    prefix = path.name.split("-")[0]
    kind = KINDS[KIND_OF_FILE.get(prefix, prefix)]
    settings = load_config(kind, str(path))
    required = {name: "x" for name, field in kind.model_fields.items() if field.is_required()}
    defaults = kind.model_validate(required).model_dump(mode="json")
    task = TaskSettings.model_validate({"data": {"path": "x"}}).model_dump(mode="json")
    defaults |= {"tasks": dict.fromkeys(getattr(settings, "tasks", {}), task)} if "tasks" in defaults else {}
    same = list(unchanged(yaml.safe_load(path.read_text()), settings.model_dump(mode="json"), defaults))
    allowed = {"kind", "folds.test_fold", "folds.validation_fold"}  # stated for the reader
    assert {name for name in same if not name.endswith(".protocol")} <= allowed


def unchanged(written: dict, chosen: dict, defaults: dict, prefix: str = ""):
    """Dotted names that a file sets to what they are anyway."""
    for name, value in written.items():
        if isinstance(value, dict) and isinstance(defaults[name], dict) and name not in ("space", "encoders"):
            yield from unchanged(value, chosen[name], defaults[name], f"{prefix}{name}.")
        elif chosen[name] == defaults[name]:
            yield prefix + name


@pytest.mark.parametrize("name", sorted(KINDS))
def test_yaml_round_trip_gives_the_same_settings(name: str, tmp_path: Path) -> None:
    extra = ["source=raw"] if name == "prepare" else []
    first = load_config(KINDS[name], None, ["output=out", *extra])
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(first))
    second = load_config(KINDS[name], str(path))
    assert second == first
    assert config.fingerprint(second) == config.fingerprint(first)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("output: out\ntrain: {steps: 50, warmup_steps: 5, seed: 3}\nmasking:\n")
    settings = load_config(PretrainConfig, str(path), ["train.steps=60"])
    assert (settings.train.steps, settings.train.seed, settings.train.zero_stage) == (60, 3, 2)
    assert settings.masking.ratio == 0.75


def test_one_changed_field_keeps_the_other_defaults_of_its_section() -> None:
    settings = load_config(IterateConfig, None, ["output=out", "finetune.train.seed=5", "distill.train.seed=6"])
    assert settings.finetune.train.steps == 6000
    assert settings.finetune.train.layer_decay == 0.6
    assert settings.distill.train.learning_rate == 5e-5
    assert settings.pretrain.train.learning_rate == 5e-4


def test_an_override_of_a_section_leaves_others_alone_that_share_its_anchor(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text(
        "pretrain: &stage\n  encoder: &encoder {preset: tiny}\n  train: {steps: 9, warmup_steps: 1}\n"
        "distill: {<<: *stage}\nfinetune: {train: {steps: 9, warmup_steps: 1}}\n"
    )
    changed = load_config(
        IterateConfig, str(path), ["output=o", "distill.encoder.preset=mini", "distill.train.steps=7"]
    )
    assert (changed.pretrain.encoder.preset, changed.distill.encoder.preset) == ("tiny", "mini")
    assert (changed.pretrain.train.steps, changed.distill.train.steps) == (9, 7)


def test_a_section_that_is_null_counts_as_left_out() -> None:
    given = ["output=o", "tasks.a.data.path=x", "finetune.dropout=0.1"]
    assert "finetune is for a run without tasks" in failure(IterateConfig, *given)
    assert "finetune" not in load_config(IterateConfig, None, [*given, "finetune=null"]).model_fields_set


def test_an_embedding_is_of_the_whole_set() -> None:
    message = failure(config.EmbedConfig, "output=o", "model=m", "data.folds=[1]")
    assert "data.folds=[1]: every clip of a data set is embedded; leave it out" in message


def test_overrides_reach_into_sections_that_a_program_passes_and_leave_them_alone() -> None:
    given = config.SweepSettings(num_trials=3)
    more = {"pretrain": {"train": {"steps": 50, "warmup_steps": 5}}}
    overrides = ["output=o", "sweep.seed=4", "sweep.space.train.learning_rate.low=2e-4", "pretrain.train.steps=60"]
    settings = load_config(IterateConfig, None, overrides, sweep=given, **more)
    assert (settings.sweep.num_trials, settings.sweep.seed) == (3, 4)
    assert settings.sweep.space["train.learning_rate"].low == 2e-4
    assert settings.pretrain.train.steps == 60
    assert (given.seed, given.space["train.learning_rate"].low, more["pretrain"]["train"]["steps"]) == (0, 1e-4, 50)


class QuickJob(config.Section):
    finetune: config.FinetuneSettings = config.FinetuneSettings(train=config.TrainSettings(steps=40, warmup_steps=4))


def test_defaults_that_an_outer_section_gives_an_inner_one_hold_at_any_depth() -> None:
    chosen = config.validate(QuickJob, {"finetune": {"train": {"seed": 1}}}).finetune.train
    assert (chosen.steps, chosen.warmup_steps, chosen.seed) == (40, 4, 1)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.e-4"])
def test_numbers_in_scientific_notation_are_numbers(text: str, tmp_path: Path) -> None:
    override = f"train.deepspeed.x={text}"  # a free-form section: no type repairs a string
    assert load_config(PretrainConfig, None, ["output=o", override]).train.deepspeed == {"x": 1e-4}
    path = tmp_path / "a.yaml"
    path.write_text(f"output: o\ntrain: {{deepspeed: {{x: {text}}}}}\n")
    assert load_config(PretrainConfig, str(path)).train.deepspeed == {"x": 1e-4}


@pytest.mark.parametrize("text", ["2024", "on", "1e5", "null", "[a"])
def test_a_path_is_taken_literally(text: str) -> None:
    assert load_config(PretrainConfig, None, [f"output={text}"]).output == text


def test_positions_true_means_the_word_true(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("output: o\nencoder: {positions: true}\n")
    assert load_config(PretrainConfig, str(path)).encoder.positions == "true"


def test_one_bound_of_the_search_space_can_be_overridden() -> None:
    settings = load_config(SweepConfig, None, ["output=o", "sweep.space.train.learning_rate.low=2e-4"])
    rate = settings.sweep.space["train.learning_rate"]
    assert (rate.distribution, rate.low, rate.high) == ("loguniform", 2e-4, 3e-3)
    assert len(settings.sweep.space) == 3
    again = replace(settings, {"sweep.space.train.learning_rate.high": 1e-2})
    assert again.sweep.space["train.learning_rate"].low == 2e-4


def test_search_parameters_can_be_added_and_taken_out() -> None:
    added = "sweep.space.augment.roll_seconds={distribution: uniform, low: 0, high: 2}"
    settings = load_config(SweepConfig, None, ["output=o", added, "sweep.space.augment.mixup=null"])
    assert set(settings.sweep.space) == {"train.learning_rate", "train.layer_decay", "augment.roll_seconds"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.seed=-1"], "train.seed=-1: input should be greater than or equal to 0"),
        (["outptu=o"], "outptu: unknown config key; did you mean output?"),
        (["output=o", "train.sleps=1"], "train.sleps: unknown config key; did you mean train.steps?"),
        (["output=o", "masking.qqqqqqqq=1"], "masking.qqqqqqqq: unknown config key; valid keys: ratio, block_size"),
        (["train.seed=5"], "output: missing"),
        (["output="], "output=''"),
        (["output=o", "train.steps=abc"], "train.steps='abc': input should be a valid integer"),
        (["output=o", "train.steps=0"], "train.steps=0: input should be greater than 0"),
        (["output=o", "train=4"], "train=4: is a section"),
        (["output=o", "output.x=4"], "output is a value, not a section"),
        (["output=o", "data.folds=3"], "write data.folds=[3]"),
        (["output=o", "train.learning_rate=.nan"], "finite number"),
        (["output=o", "encoder.preset=huge"], "encoder.preset='huge' is not one of tiny"),
        (["output=o", "encoder.overrides.num_layer=2"], "did you mean 'num_layers'?"),
        (["output=o", "encoder.overrides.num_heads=7"], "num_heads=7 must divide width=768"),
        (["output=o", "train.warmup_steps=9", "train.steps=8"], "use at most 8"),
        (["output=o", "train.steps=[1"], "not valid YAML"),
        (["output"], "expected section.field=value"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(overrides: list[str], message: str) -> None:
    assert message in failure(PretrainConfig, *overrides)


def test_an_indivisible_batch_names_the_rule_and_the_nearest_size() -> None:
    message = failure(
        PretrainConfig,
        *["output=o", "train.global_batch_size=500", "train.micro_batch_size=8", "train.num_workers=16"],
    )
    assert message == (
        "train.global_batch_size=500 is not divisible by micro_batch_size (8) x num_workers (16) = 128; use 512"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "found list"),
        ("output: [", "not valid YAML, line 1"),
        ("output: a\noutput: b\n", "line 2: key 'output' stands twice"),
        ("train: {steps: 1, steps: 2}\n", "key 'steps' stands twice"),
    ],
)
def test_a_broken_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as caught:
        load_config(PretrainConfig, str(path))
    assert message in str(caught.value)


def test_fingerprints_differ_when_any_setting_differs() -> None:
    settings = load_config(PretrainConfig, None, ["output=o"])
    assert config.fingerprint(replace(settings, {"train.seed": 1})) != config.fingerprint(settings)


@pytest.mark.parametrize(
    ("kind", "overrides", "clips"),
    [
        ("pretrain", ["train.global_batch_seconds=5600", "train.micro_batch_size=35", "train.num_workers=16"], 560),
        ("pretrain", ["train.global_batch_seconds=5600", "train.num_workers=16"], 512),  # 4.375 micro-batches on each
        ("pretrain", ["train.global_batch_seconds=5600", "train.num_workers=[1,3]", "data.clip_seconds=5"], 1104),
        ("train-tokenizer", ["train.global_batch_seconds=1400", "train.micro_batch_size=7"], 140),
        ("finetune", ["train.global_batch_seconds=81", "data.clip_seconds=1"], 80),
    ],
)
def test_a_batch_in_seconds_is_the_nearest_one_in_clips_that_the_workers_can_share(
    kind: str, overrides: list[str], clips: int
) -> None:
    job = load_config(KINDS[kind], None, ["output=o", *overrides])
    assert job.train.global_batch_size == clips
    again = KINDS[kind].model_validate(job.model_dump())
    assert again.train.global_batch_size == clips


def test_a_batch_in_seconds_reaches_the_stages_inside_a_job() -> None:
    given = ["output=o", "data.clip_seconds=2", "finetune.train.global_batch_seconds=64"]
    assert load_config(IterateConfig, None, given).finetune.train.global_batch_size == 32
    sweep = load_config(SweepConfig, None, given)
    assert replace(sweep.finetune, {"train.learning_rate": 1e-3}).train.global_batch_size == 32
    assert load_config(SweepConfig, None, ["output=o"]).finetune.train.global_batch_size == 64


def test_a_batch_in_seconds_and_another_one_in_clips_are_one_too_many() -> None:
    message = "train.global_batch_seconds=5600 makes 560 clips of 10 s, and global_batch_size=480 is set too; set one"
    given = ["output=o", "train.global_batch_seconds=5600", "train.global_batch_size=480"]
    assert message in failure(PretrainConfig, *given)
    assert "pretrain.train.global_batch_seconds=5600 makes 560 clips" in failure(
        IterateConfig, *(override.replace("train.", "pretrain.train.") for override in given)
    )


def test_a_batch_of_too_few_seconds_names_the_least() -> None:
    message = (
        "train.global_batch_seconds=100 is less than half of micro_batch_size (8) x num_workers (4) = 32 clips of 10"
    )
    found = failure(PretrainConfig, "output=o", "train.global_batch_seconds=100", "train.num_workers=4")
    assert message in found
    assert "use 320, or lower micro_batch_size" in found


def test_a_length_bucket_holds_a_patch() -> None:
    message = "data.length_bucket_seconds=0.1 is shorter than a patch, 0.16 s; use at least that, or 0 for off"
    assert message in failure(PretrainConfig, "output=o", "data.length_bucket_seconds=0.1")
    assert load_config(PretrainConfig, None, ["output=o", "data.length_bucket_seconds=0.16"])
