"""A frozen encoder: it stays as it is, costs no backward pass, and is starts afresh when it is set free."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from beats_ray.config import ConfigError, FinetuneConfig, FinetuneSettings, load_config, validate
from beats_ray.data.storage import open_place
from beats_ray.models import BeatsEncoder, describe_model, encoder_config
from beats_ray.train.context import WorkerContext, single_process_context
from beats_ray.train.engine import Engine
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.loop import run_training
from beats_ray.train.preflight import measure_model
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {"num_layers": 2, "width": 32, "num_heads": 2, "ffn_width": 64}
STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


class Interrupted(Exception):
    pass


def build(zero_stage: int = 1, **settings: Any) -> tuple[FinetuneTask, FinetuneSettings, dict[str, torch.Tensor]]:
    """A task, its settings, and the weights of the encoder it starts from."""
    train = {
        "steps": 10, "warmup_steps": 0, "learning_rate": 1e-2, "epsilon": 1e-8, "zero_stage": zero_stage,
        "global_batch_size": 4, "micro_batch_size": 2, "log_every_steps": 1, "checkpoint_every_steps": 3,
        "weight_decay": 0.1,
    }  # fmt: skip
    checked = validate(FinetuneSettings, {"train": train | settings.pop("train", {}), **settings})
    torch.manual_seed(0)
    encoder = BeatsEncoder(encoder_config("tiny", **SMALL))
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=False)
    return FinetuneTask(checked, encoder, manifest), checked, encoder.state_dict()


def run(
    output: Path, zero_stage: int, report: Callable[[int, dict[str, float]], None] | None = None, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(loss of each step, encoder before, encoder after)."""
    task, checked, before = build(zero_stage, **settings)
    losses: list[float] = []

    def record(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["train/loss"])
        if report is not None:
            report(step, metrics)

    source = SyntheticBatches(2, 4)
    run_training(task, source, checked.train, single_process_context(record), open_place(str(output)))
    found = load_file(output / "model" / "model.safetensors")
    after = {name.removeprefix("encoder."): value for name, value in found.items() if name.startswith("encoder.")}
    return losses, before, after


def unchanged(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[bool]:
    return {torch.equal(before[name], after[name]) for name in before}


@STAGES
def test_a_probe_trains_the_head_alone_and_resumes_bit_for_bit(tmp_path: Path, zero_stage: int) -> None:
    def interrupt(step: int, _metrics: dict[str, float]) -> None:
        if step == 5:
            raise Interrupted

    whole, before, after = run(tmp_path / "whole", zero_stage, freeze_encoder=True)
    assert unchanged(before, after) == {True}
    assert whole[-1] != whole[0]
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", zero_stage, interrupt, freeze_encoder=True)
    rest, _, _ = run(tmp_path / "broken", zero_stage, freeze_encoder=True)
    assert rest == whole[3:]


@STAGES
def test_an_encoder_set_free_moves_from_then_on_and_resumes_bit_for_bit_on_both_sides(
    tmp_path: Path, zero_stage: int
) -> None:
    whole, before, after = run(tmp_path / "whole", zero_stage, freeze_encoder_steps=5)
    assert unchanged(before, after) == {False}
    probe, _, _ = run(tmp_path / "probe", zero_stage, freeze_encoder=True)
    assert whole[:5] == probe[:5]
    assert whole[6] != pytest.approx(probe[6], rel=1e-6)
    for stop in (5, 8):

        def interrupt(step: int, _metrics: dict[str, float], stop: int = stop) -> None:
            if step == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(tmp_path / f"broken-{stop}", zero_stage, interrupt, freeze_encoder_steps=5)
        rest, _, resumed = run(tmp_path / f"broken-{stop}", zero_stage, freeze_encoder_steps=5)
        assert rest == whole[stop - stop % 3 :]
        assert unchanged(resumed, after) == {True}


@STAGES
def test_the_first_step_of_a_freed_encoder_is_adamw_s_first(zero_stage: int) -> None:
    """Its size is the learning rate: both bias corrections are those of step 1, though the head has made others."""
    task, checked, before = build(zero_stage, freeze_encoder_steps=3, train={"weight_decay": 0.0, "max_grad_norm": 1e9})
    engine = Engine(task.module, checked.train, task.depths(), task.frozen_steps())
    batches = SyntheticBatches(2, 4).training(0)
    name = "encoder.layers.1.fc1.weight"
    for step in range(4):
        task.begin_step(step)
        for micro in range(2):
            prepared = task.prepare(next(batches), torch.Generator().manual_seed(micro), training=True)
            engine.backward(engine(*prepared.inputs)[0])
            engine.step(step, last_micro_batch=micro == 1)
        moved = engine.snapshot()[f"classifier.encoder.{name}/fp32"] - before[name]
        if step < 3:
            assert not moved.any()
    rate = next(group["lr"] for group in engine._adamw.param_groups if group["frozen_steps"] and group["lr"] > 0)
    rates = {group["lr"] for group in engine._adamw.param_groups}
    assert rate in rates
    assert min(abs(float(moved.abs().median()) / one - 1) for one in rates) < 1e-3


def _take_part(rank: int, folder: str) -> None:
    """One of two processes, which runs every stage and leaves its losses."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    os.environ["LOCAL_RANK"] = "0"
    results = {}
    for stage in range(4):
        task, checked, _ = build(stage, **WITHOUT_CHANCE)
        losses: list[float] = []
        context = WorkerContext(
            rank, 2, torch.device("cpu"), lambda _step, metrics, losses=losses: losses.append(metrics["train/loss"])
        )
        source = SyntheticBatches(2, 4, rank, 2)
        run_training(task, source, checked.train, context, open_place(f"{folder}/stage-{stage}"))
        results[stage] = losses
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads abort a process that ends while the other one still leaves the group


WITHOUT_CHANCE: dict[str, Any] = {"freeze_encoder_steps": 4, "layer_drop": 0.0, "augment": {"mixup": 0.0}}


@pytest.mark.slow
def test_two_workers_under_each_stage_have_the_losses_of_one(tmp_path: Path) -> None:
    alone, _, _ = run(tmp_path / "alone", 0, **WITHOUT_CHANCE)
    torch.multiprocessing.spawn(_take_part, args=(str(tmp_path),), nprocs=2)
    for stage, losses in json.loads((tmp_path / "losses.json").read_text()).items():
        assert losses == pytest.approx(alone, rel=1e-4), stage
    assert alone[-1] != pytest.approx(alone[3], rel=1e-3)


def test_a_frozen_encoder_is_in_evaluation_mode_and_gets_no_gradient() -> None:
    task, _, _ = build(freeze_encoder_steps=2, layer_drop=0.9, dropout=0.5)
    (batch,) = [next(SyntheticBatches(2, 4).training(0))]
    task.module.train()
    encoder = task.module.classifier.encoder
    inputs = task.prepare(batch, torch.Generator().manual_seed(0), training=True).inputs
    for step, frozen in ((0, True), (1, True), (2, False)):
        task.begin_step(step)
        task.module.train()  # as after an evaluation
        assert encoder.training is not frozen
        losses = [task.module(*inputs)[0] for _ in range(2)]
        assert bool(losses[0] == losses[1]) is frozen  # neither dropout nor layer drop
        losses[0].backward()
        assert any(one.grad is not None for one in encoder.parameters()) is not frozen
    assert all(one.grad is not None for one in task.module.classifier.predictor.parameters())


def test_the_plan_counts_a_frozen_encoder_as_frozen() -> None:
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=False)
    encoder = BeatsEncoder(encoder_config("tiny", **SMALL))
    parameters, head = sum(one.numel() for one in encoder.parameters()), 3 * 32 + 3
    sizes = [
        measure_model(
            load_config(FinetuneConfig, None, ["output=o", f"freeze_encoder={frozen}"]),
            manifest,
            describe_model(encoder),
        )
        for frozen in ("false", "true")
    ]
    assert [(size.trained, size.frozen) for size in sizes] == [(parameters + head, 0), (head, parameters)]
    assert sizes[1].frozen_bytes == sizes[1].buffer_bytes == 4 * parameters  # held, and in each checkpoint
    assert sizes[0].published_bytes == sizes[1].published_bytes


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freeze_encoder": True, "freeze_encoder_steps": 5}, "freeze_encoder=true freezes it for good"),
        ({"freeze_encoder_steps": 10}, "leaves none of train.steps=10"),
    ],
)
def test_freezing_that_contradicts_itself_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(**settings)
