"""`--dry-run`: the plan agrees with the real modules, and every mistake is a line of its own; Ray is never touched."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from beats_ray import cli
from beats_ray.config import ConfigError, DistillConfig, FinetuneConfig, PretrainConfig, fingerprint, load_config
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, shards_fingerprint
from beats_ray.data.storage import open_place
from beats_ray.identity import content_keys, run_identity, stage_identity
from beats_ray.models import (
    BeatsEncoder,
    QuantizerConfig,
    RandomProjectionTokenizer,
    SelfDistilledTokenizer,
    TokenizerConfig,
    encoder_config,
    save_model,
)
from beats_ray.train import preflight
from beats_ray.train.checks import Inputs, find_mistakes, read_inputs, settings_mistakes
from beats_ray.train.distill import DistillTask
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.jobs import run_finetune, run_pretrain
from beats_ray.train.preflight import RunPlan, plan_run
from beats_ray.train.pretrain import PretrainTask, num_codes_of
from tests.support.prepared import CLIPS_OF_FOLD, write_dataset

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
SMALL = ["train.global_batch_size=12", "train.micro_batch_size=2", "train.num_workers=2", "data.clip_seconds=2"]
TINY = ["encoder.preset=tiny", *SMALL]


@dataclass(frozen=True)
class Places:
    """A data set, models and labels, all on disk."""

    data: Path
    manifest: DatasetManifest
    tokenizer: Path
    distilled: Path
    encoder: Path
    labels: Path
    output: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    tiny = encoder_config("tiny", num_layers=2)
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=tiny, quantizer=QuantizerConfig(num_codes=64)))
    save_model(RandomProjectionTokenizer(), folder / "tokenizer")
    save_model(tokenizer, folder / "distilled")
    save_model(BeatsEncoder(tiny), folder / "encoder")
    manifest = write_dataset(folder / "data", ("a", "b", "c"))
    (folder / "labels" / "shards").mkdir(parents=True)
    for shard in manifest.shards:
        (folder / "labels" / "shards" / shard.file).touch()
    fingerprint = {"fingerprint": shards_fingerprint(manifest)}
    (folder / "labels" / "labels.json").write_text(json.dumps(fingerprint))
    parts = {name: folder / name for name in ("data", "tokenizer", "distilled", "encoder", "labels")}
    return Places(manifest=manifest, output=folder / "runs" / "new", **parts)


def plan_of(kind: str, job: type, places: Places, *overrides: str) -> tuple[RunPlan, object]:
    config = load_config(job, None, [f"data.path={places.data}", f"output={places.output}", *overrides])
    inputs = read_inputs(kind, config)
    assert not inputs.mistakes + find_mistakes(kind, config, inputs)
    return plan_run(kind, config, inputs.manifest, inputs.published), config


def trained(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_batch_arithmetic(places: Places) -> None:
    overrides = ["train.steps=100", "train.warmup_steps=10", "train.checkpoint_every_steps=20"]
    plan, _ = plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.tokenizer}", *TINY, *overrides)
    assert plan.train.accumulation_steps(2) == 3
    assert plan.clips_per_epoch == 40
    assert plan.steps_per_epoch == pytest.approx(40 / 12)
    assert plan.clips == 1200
    assert plan.epochs == 30
    assert plan.audio_hours == pytest.approx(1200 * 2 / 3600)
    assert plan.flops_per_step == 12 * plan.flops_per_clip
    assert plan.flops == 1200 * plan.flops_per_clip
    assert plan.checkpoints_written == 5  # after 20, 40, 60, 80 and 100 steps
    assert plan.checkpoints_kept == 2
    assert plan.shard_bytes == sum(path.stat().st_size for path in (places.data / "shards").iterdir())


def test_parameters_of_pre_training_are_those_of_the_module(places: Places, tmp_path: Path) -> None:
    random_projection = f"tokenizer={places.tokenizer}"
    plan, config = plan_of("pretrain", PretrainConfig, places, random_projection, *TINY)
    tokenizer = RandomProjectionTokenizer()
    task = PretrainTask(config, num_codes_of(tokenizer), tokenizer)
    assert plan.size.trained == trained(task.module)
    assert plan.size.frozen == 0
    assert plan.size.frozen_bytes == sum(one.nbytes for one in tokenizer.buffers())
    assert plan.checkpoint_bytes == 12 * trained(task.module)
    weights = save_model(task.module.predictor.encoder, tmp_path / "model") / "model.safetensors"
    assert plan.size.published_bytes == pytest.approx(weights.stat().st_size, rel=0.01)  # the rest is the header


def test_without_a_tokenizer_it_is_the_paper_s_random_projection(places: Places) -> None:
    given, _ = plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.tokenizer}", *TINY)
    made, _ = plan_of("pretrain", PretrainConfig, places, *TINY)
    assert (made.size, made.flops) == (given.size, given.flops)
    fewer, _ = plan_of("pretrain", PretrainConfig, places, "random_projection.num_codes=512", *TINY)
    assert made.size.frozen_bytes - fewer.size.frozen_bytes == 512 * 256 * 4
    with pytest.raises(ConfigError, match="are both set; set one of them"):
        plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.tokenizer}", "random_projection.seed=1", *TINY)


def test_a_tokenizer_that_labels_on_the_fly_is_held_and_written_labels_are_not(places: Places) -> None:
    on_the_fly, _ = plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.distilled}", *TINY)
    written, _ = plan_of(
        "pretrain", PretrainConfig, places, f"tokenizer={places.distilled}", f"labels={places.labels}", *TINY
    )
    assert on_the_fly.size.frozen > 100_000
    assert written.size.frozen == written.size.frozen_bytes == 0
    assert on_the_fly.states[1].weights - written.states[1].weights == on_the_fly.size.frozen_bytes
    assert on_the_fly.flops > written.flops


def test_parameters_of_tokenizer_training_are_those_of_the_module(places: Places) -> None:
    plan, config = plan_of("distill", DistillConfig, places, f"teacher={places.encoder}", *TINY)
    teacher = BeatsEncoder(encoder_config("tiny", num_layers=2))
    module = DistillTask(config, teacher).module
    assert plan.size.trained == trained(module)
    assert plan.size.frozen == trained(teacher)
    codebook = module.model.tokenizer.quantizer.codebook_VD.nbytes
    assert codebook < plan.checkpoint_bytes - 12 * trained(module) < 1.1 * codebook


def test_clips_that_a_draw_keeps_apart_are_not_counted_as_trained_on(places: Places) -> None:
    given = [f"encoder={places.encoder}", *SMALL, "folds.validation_fraction=0.25"]
    plan, _ = plan_of("finetune", FinetuneConfig, places, *given)
    assert plan.clips_per_epoch == 27  # of the 36 of folds 2, 3 and 4


def test_fine_tuning_trains_on_the_folds_that_are_left_and_reads_all(places: Places) -> None:
    plan, config = plan_of("finetune", FinetuneConfig, places, f"encoder={places.encoder}", *SMALL)
    assert plan.clips_per_epoch == CLIPS_OF_FOLD[3] + CLIPS_OF_FOLD[4]
    assert plan.shard_bytes == sum(shard.bytes for shard in places.manifest.shards)
    source = BeatsEncoder(encoder_config("tiny", num_layers=2))
    assert plan.size.trained == trained(FinetuneTask(config, source, places.manifest).module)


def test_nothing_is_allocated_for_a_large_model(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = preflight._build
    monkeypatch.setattr(preflight, "_build", lambda *given: built.append(build(*given)) or built[-1])
    plan, _ = plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.tokenizer}", "encoder.preset=large")
    assert plan.size.trained > 300e6
    assert plan.checkpoint_bytes > 3.6e9
    assert all(parameter.is_meta for parameter in built[0][0].parameters())


def test_bf16_has_no_stage_0(places: Places) -> None:
    tokenizer = f"tokenizer={places.tokenizer}"
    half, _ = plan_of("pretrain", PretrainConfig, places, tokenizer, *TINY, "train.precision=bf16")
    whole, _ = plan_of("pretrain", PretrainConfig, places, tokenizer, *TINY)
    assert [state.zero_stage for state in half.states] == [1, 2, 3]
    assert [state.zero_stage for state in whole.states] == [0, 1, 2, 3]
    assert whole.checkpointed_activation_bytes < whole.activation_bytes


# --- the command ------------------------------------------------------------------------------------------------------


def dry(capsys: pytest.CaptureFixture[str], command: str, *overrides: str) -> tuple[int, str, list[str]]:
    status = cli.main([command, "--dry-run", *overrides])
    out, err = capsys.readouterr()
    return status, out, [line.removeprefix("beats-ray: error: ") for line in err.splitlines()]


@pytest.mark.parametrize("command", ["pretrain", "train-tokenizer", "finetune"])
def test_the_plan_is_printed(command: str, places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"pretrain": f"tokenizer={places.tokenizer}", "train-tokenizer": f"teacher={places.encoder}"}
    sizes = SMALL if command == "finetune" else TINY
    status, out, mistakes = dry(
        capsys, command, f"data.path={places.data}", f"output={places.output}",
        source.get(command, f"encoder={places.encoder}"), *sizes,
    )  # fmt: skip
    assert (status, mistakes) == (0, [])
    assert "12 clips = 2 x 2 workers x 3 accumulated" in out
    assert "trained" in out
    assert "(this run)" in out
    assert not places.output.exists()


def test_every_mistake_is_a_line_and_no_plan_is_printed(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, mistakes = dry(
        capsys, "finetune", "output=o", f"data.path={places.data}", f"encoder={places.tokenizer}", *SMALL,
        "folds.test_fold=8", "folds.validation_fold=9", "data.clip_seconds=0.001",
        "train.deepspeed={gradient_clipping: 3}",
    )  # fmt: skip
    assert (status, out) == (2, "")
    assert [line.split(":")[0].split("=")[0] for line in mistakes] == [
        "encoder",
        "train.deepspeed.gradient_clipping",
        "data.clip_seconds",
        "folds.validation_fold",
        "folds.test_fold",
    ]
    assert "is not a fold of" in mistakes[-1]
    assert mistakes[-1].endswith("choose one of them")


def test_beside_wrong_settings_the_places_are_looked_at(capsys: pytest.CaptureFixture[str], places: Places) -> None:
    status, out, mistakes = dry(
        capsys, "pretrain", "output=o", "train.steps=many", "train.sleps=3", "masking.ratio=2", "data.path=/nowhere",
        f"tokenizer={places.encoder}", f"labels={places.labels}", "train.deepspeed={a: [}",
    )  # fmt: skip
    assert (status, out) == (2, "")
    starts = ["override", "train.sleps", "masking.ratio", "train.steps", "tokenizer", "/nowhere"]
    assert sorted(line.replace("=", " ").replace(":", " ").split()[0] for line in mistakes) == sorted(starts)
    assert "did you mean train.steps?" in "".join(mistakes)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("pretrain", ["data.folds=[1, 7]"], "data.folds=[1, 7]: 7 is not in the data set; it has [1, 2, 3, 4]"),
        ("pretrain", ["data.splits=[train]"], "data.splits=['train']: 'train' is not in the data set"),
        ("pretrain", ["labels=OTHER"], "these labels belong to other shards"),
        ("pretrain", ["labels=/nowhere"], "no labels here (no labels.json)"),
        ("pretrain", ["tokenizer=", "labels=LABELS"], "needs the tokenizer that wrote them; set tokenizer"),
        ("train-tokenizer", ["teacher="], "teacher is empty; give the folder of a published encoder"),
        ("pretrain", ["data.path="], "data.path is empty; give the folder that `beats-ray prepare` wrote"),
        ("pretrain", ["data.path=UNLABELLED", "data.sampling=balanced"], "has no labels; use uniform"),
        ("pretrain", ["data.path=DAMAGED"], "bytes, dataset.json says"),
        ("pretrain", ["output=TAKEN"], "belongs to a run of another config: train.steps is 3 there"),
        ("train-tokenizer", ["tokenizer.teacher_layer=3"], "the teacher has 2 layers; use at most 2"),
        ("finetune", ["data.path=UNLABELLED"], "has no labels to fine-tune on"),
        (
            "finetune",
            ["data.folds=[1, 3]", "folds.validation_fold=2"],
            "folds.validation_fold=2 is not among data.folds",
        ),
        ("pretrain", ["predictor.num_layers=0"], "predictor.num_layers=0: input should be greater than 0"),
        (
            "finetune",
            ["data.folds=[1, 2]", "folds.validation_fold=2"],
            "leaves no clip to train on beside folds.test_fold=1",
        ),
        ("pretrain", ["train.loggers=[mlflow]"], "train.loggers=['mlflow']: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value[:20],
)
def test_a_mistake_beyond_the_settings(
    command: str,
    overrides: list[str],
    message: str,
    places: Places,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    unlabelled = write_dataset(tmp_path / "UNLABELLED", ())
    write_dataset(tmp_path / "DAMAGED", ("a",))
    (tmp_path / "DAMAGED" / "shards" / unlabelled.shards[0].file).write_bytes(b"short")
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "labels.json").write_text('{"fingerprint": "0"}')
    source = {"pretrain": f"tokenizer={places.tokenizer}", "train-tokenizer": f"teacher={places.encoder}"}
    given = [f"data.path={places.data}", f"output={places.output}", source.get(command, f"encoder={places.encoder}")]
    given += SMALL if command == "finetune" else TINY
    overrides = [override.replace("LABELS", str(places.labels)) for override in overrides]
    taken = load_config(PretrainConfig, None, [*given, "train.steps=3", "train.warmup_steps=0"]) if (
        command == "pretrain"
    ) else None  # fmt: skip
    if taken is not None:
        record = {"status": "running", "fingerprint": "0", "config": stage_identity(taken, content_keys(taken))}
        open_place(str(tmp_path / "TAKEN" / "stage.json")).write_json(record)
    for name in ("UNLABELLED", "DAMAGED", "OTHER", "TAKEN"):
        overrides = [override.replace(name, str(tmp_path / name)) for override in overrides]
    status, out, mistakes = dry(capsys, command, *given, *overrides)
    assert (status, out, len(mistakes)) == (2, "", 1)
    assert message in mistakes[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{zero_optimisation: {}}", "zero_optimisation: unknown DeepSpeed key; did you mean zero_optimization?"),
        ("{spam: 1}", "spam: unknown DeepSpeed key; valid keys: aio, "),
        ("{bfloat16: {}}", "bfloat16: use train.precision=bf16"),
        ("{amp: {}}", "amp: use train.precision=bf16 or fp16"),
        ("{scheduler: {}}", "scheduler: the learning rate follows train.schedule"),
        ("{optimizer: {}}", "optimizer: AdamW is the run's own"),
        ("{prescale_gradients: true}", "prescale_gradients: beats_ray does this itself"),
        ("{bf16: {check_grad_overflow: false}}", "bf16.check_grad_overflow=False contradicts"),
        ("{zero_optimization: {reduce_bucket_sise: 3}}", "zero_optimization.reduce_bucket_sise=3: "),
        ("{zero_optimization: {reduce_bucket_size: x}}", "zero_optimization.reduce_bucket_size='x': Input should be a"),
    ],
)
def test_an_extra_setting_that_deepspeed_would_not_heed_is_a_mistake(
    extra: str, message: str, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.path={places.data}", f"output={places.output}", f"tokenizer={places.tokenizer}", *TINY]
    status, out, (mistake,) = dry(capsys, "pretrain", *given, f"train.deepspeed={extra}")
    assert (status, out) == (2, "")
    assert mistake.startswith(f"train.deepspeed.{message}")


def test_a_run_raises_the_first_mistake_before_it_needs_a_cluster(places: Places) -> None:
    given = [f"data.path={places.data}", f"output={places.output}", f"encoder={places.encoder}", *SMALL]
    with pytest.raises(ConfigError, match=r"folds.validation_fold=9 is not a fold"):
        run_finetune(
            load_config(FinetuneConfig, None, [*given, "folds.validation_fold=9", "folds.test_fold=8"]), Console()
        )
    given[2] = f"tokenizer={places.tokenizer}"
    wrong = load_config(PretrainConfig, None, [*given, "train.deepspeed={gradient_clipping: 3}"])
    with pytest.raises(ConfigError, match="which the train section derives"):
        run_pretrain(wrong, Console())


def test_ray_is_not_even_imported(places: Places) -> None:
    given = ["pretrain", "--dry-run", f"data.path={places.data}", "output=o", f"tokenizer={places.tokenizer}", *TINY]
    code = f"import sys; from beats_ray import cli; assert cli.main({given!r}) == 0; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_config_error_has_a_line_for_each_mistake() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, ["output=o", "train.steps=many", "train.seed=x", "predictor.num_layers=-1"])
    assert len(caught.value.mistakes) == 3
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, ["output=o", "train.num_workers=3", "train.sleps=3"])
    assert [line.split("=")[0] for line in caught.value.mistakes] == [
        "train.sleps: unknown config key; did you mean train.steps?",
        "train.global_batch_size",
    ]
    copied = copy.copy(caught.value)  # as pickling does
    assert copied.mistakes == caught.value.mistakes
    assert str(caught.value) == caught.value.mistakes[0]


def test_the_state_of_the_chosen_stage_is_for_the_settings_workers(places: Places) -> None:
    plan, config = plan_of("pretrain", PretrainConfig, places, f"tokenizer={places.tokenizer}", *TINY)
    chosen = plan.states[config.train.zero_stage]
    assert chosen.moments == 8 * -(-plan.size.trained // 2)


def test_a_size_that_is_auto_is_deepspeeds_default(places: Places) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY]
    auto = "train.deepspeed={zero_optimization: {reduce_bucket_size: auto, stage3_max_live_parameters: auto}}"
    assert plan_of("pretrain", PretrainConfig, places, *given, auto)[0].states == (
        plan_of("pretrain", PretrainConfig, places, *given)[0].states
    )


def test_the_memory_of_an_elastic_run_is_that_with_the_fewest_workers(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY]
    elastic, _ = plan_of("pretrain", PretrainConfig, places, *given, "train.num_workers=[1, 3]")
    alone, _ = plan_of("pretrain", PretrainConfig, places, *given, "train.num_workers=1")
    assert elastic.states == alone.states
    assert elastic.activation_bytes == alone.activation_bytes
    preflight.show_plan(elastic, Console())
    assert "Memory of one of 1 workers, the fewest" in capsys.readouterr().out


@pytest.mark.parametrize(("every", "kept"), [(10, 3), (30, 3), (70, 2), (33, 2)])
def test_the_checkpoint_with_the_best_validation_result_is_counted(places: Places, every: int, kept: int) -> None:
    given = [f"encoder={places.encoder}", *SMALL, "train.steps=100", "train.warmup_steps=0", "validate_every_steps=20"]
    given.append(f"train.checkpoint_every_steps={every}")
    plan, _ = plan_of("finetune", FinetuneConfig, places, *given)
    assert plan.checkpoints_kept == kept  # of steps that both divide there is one, or none
    for unset in ("folds.validation_fold=-1", "folds.validation_fraction=0"):
        unjudged, _ = plan_of("finetune", FinetuneConfig, places, *given, unset)
        assert unjudged.checkpoints_kept == min(2, kept)


def test_a_run_that_counts_in_seconds_keeps_its_clips_when_it_goes_on_at_another_size(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.path={places.data}", f"output={tmp_path}", f"tokenizer={places.tokenizer}", TINY[0], SMALL[3]]
    given += ["train.micro_batch_size=2"]
    seconds = "train.global_batch_seconds=27"
    first = load_config(PretrainConfig, None, [*given, seconds, "train.num_workers=2"])
    assert first.train.global_batch_size == 12
    identity = stage_identity(first, content_keys(first))
    record = {"status": "running", "fingerprint": fingerprint(identity), "config": identity}
    open_place(str(tmp_path / "stage.json")).write_json(record)
    assert load_config(PretrainConfig, None, [*given, seconds, "train.num_workers=1"]).train.global_batch_size == 14
    status, out, mistakes = dry(capsys, "pretrain", *given, seconds, "train.num_workers=1")
    assert (status, mistakes) == (0, [])
    assert "12 clips = 2 x 1 workers x 6 accumulated" in out
    status, _, mistakes = dry(capsys, "pretrain", *given, seconds, "train.num_workers=7")
    assert status == 2
    assert "has 12 clips in a step, which is not divisible by micro_batch_size (2) x num_workers (7)" in mistakes[0]
    status, _, mistakes = dry(capsys, "pretrain", *given, "train.global_batch_seconds=80", "train.num_workers=1")
    assert status == 2
    assert "belongs to a run of another config: train.global_batch_size is 12 there" in mistakes[0]


def test_checkpoints_with_a_moving_average_are_larger_and_the_table_shows_it(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY]
    averaged, _ = plan_of("pretrain", PretrainConfig, places, *given, "train.ema_decay=0.999")
    without, _ = plan_of("pretrain", PretrainConfig, places, *given)
    assert averaged.checkpoint_bytes - without.checkpoint_bytes == 4 * averaged.size.trained
    for plan, shown in ((averaged, True), (without, False)):
        preflight.show_plan(plan, Console())
        assert ("average" in capsys.readouterr().out) is shown


def test_offloading_shows_the_memory_of_the_host(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY]
    for overrides, shown in (([], False), (["train.offload_optimizer=true"], True)):
        plan, _ = plan_of("pretrain", PretrainConfig, places, *given, *overrides)
        preflight.show_plan(plan, Console())
        assert ("host memory" in capsys.readouterr().out) is shown


def test_a_batch_in_seconds_is_shown_in_clips_and_is_the_same_run(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY[:1], *SMALL[1:]]
    seconds, config = plan_of("pretrain", PretrainConfig, places, *given, "train.global_batch_seconds=25")
    preflight.show_plan(seconds, Console())
    text = capsys.readouterr().out
    assert "12 clips = 2 x 2 workers x 3 accumulated; 24 s of sound for the 25 s asked for" in text
    _, same = plan_of("pretrain", PretrainConfig, places, *given, "train.global_batch_size=12")
    assert run_identity(config) == run_identity(same)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp16"], "train.precision=fp16 needs train.use_gpu=true; use bf16 or fp32 on the CPU"),
        (["train.attention=flex"], "train.attention=flex needs train.use_gpu=true; use auto on the CPU"),
        (
            ["train.compile=true", "data.clip_seconds=10", "data.length_bucket_seconds=1"],
            "data.length_bucket_seconds=1: clips of 10 lengths, and train.compile=true compiles 8 at most; use 1.25",
        ),
        (["data.streams=3"], "data.streams=3 neither divides train.num_workers=2 nor is a multiple of it; use 1"),
        (
            ["data.streams=8"],
            "train.global_batch_size=16 is not divisible into micro-batches of 4 from each of data.streams=8; use 32",
        ),
    ],
)
def test_settings_that_no_run_could_have_are_found_before_it(overrides: list[str], message: str) -> None:
    given = ["output=o", "data.path=d", "train.global_batch_size=16", "train.micro_batch_size=4", "train.num_workers=2"]
    config = load_config(PretrainConfig, None, [*given, *overrides])
    mistakes = [str(one) for one in settings_mistakes("pretrain", config, Inputs(None, None, []))]
    assert [one for one in mistakes if one.startswith(message)]


def test_a_kernel_that_cannot_drop_attention_weights_is_refused_before_a_run(places: Places) -> None:
    given = [f"tokenizer={places.tokenizer}", *TINY[:1], *SMALL, "train.attention=flex", "train.use_gpu=true"]
    plan_of("pretrain", PretrainConfig, places, *given)
    with pytest.raises(ConfigError, match=r"train\.attention=flex cannot drop attention weights"):
        plan_of("pretrain", PretrainConfig, places, *given, "encoder.overrides.attention_dropout=0.1")


def test_a_released_file_that_is_not_there_is_named_with_its_field(places: Places, tmp_path: Path) -> None:
    overrides = [f"data.path={places.data}", f"output={tmp_path}/o", *SMALL, f"encoder={tmp_path}/none.pt"]
    mistakes = read_inputs("finetune", load_config(FinetuneConfig, None, overrides)).mistakes
    assert [str(one).split("=")[0] for one in mistakes] == ["encoder"]
