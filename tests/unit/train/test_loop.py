"""The loop: exact resumption, exact weighting, and what it leaves behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import open_place
from beats_ray.models import load_model
from beats_ray.train.committed import sound_steps
from beats_ray.train.context import single_process_context
from beats_ray.train.faults import TrainingDiverged
from beats_ray.train.loop import Prepared, run_training
from beats_ray.train.metrics import read_metrics

pytestmark = pytest.mark.unit


class Interrupted(Exception):
    """Stands for a killed worker."""


def interrupt_at(stop: int):
    def report(step: int, _metrics: dict[str, float]) -> None:
        if step == stop:
            raise Interrupted

    return report


def test_ten_steps_equal_five_a_restore_and_five_bit_for_bit(tmp_path: Path, pretraining) -> None:
    whole = pretraining.run(tmp_path / "whole", checkpoint_every_steps=5)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(7), checkpoint_every_steps=5)
    rest = pretraining.run(tmp_path / "broken", checkpoint_every_steps=5)
    assert rest == whole[5:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [record["step"] for record in read_metrics(open_place(str(tmp_path / "broken")))]
    assert steps == list(range(1, 11))


class Regression:
    """A task without chance: every real sample is a target, so clips of other lengths count for more or less."""

    def __init__(self) -> None:
        self.module = RegressionModule()

    def depths(self) -> dict[str, int]:
        return {}

    def frozen_steps(self) -> dict[str, int]:
        return {}

    def begin_step(self, step: int) -> None:
        pass

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        is_real_BS = torch.arange(batch.audio_BS.shape[1]) < batch.num_samples_B.unsqueeze(1)
        return Prepared((batch.audio_BS.float() / 3000, is_real_BS), is_real_BS.sum())

    def publish(self, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir()
        save_file(state_dict, folder / "model.safetensors")


class RegressionModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, wave_BS: torch.Tensor, is_real_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
        error_BS = (self.linear(wave_BS.unsqueeze(-1)).squeeze(-1) - wave_BS.abs()).square()
        return (error_BS * is_real_BS).sum(), {}


def test_accumulated_micro_batches_train_exactly_as_one_batch_of_unequal_clips(
    tmp_path: Path, synthetic_batches
) -> None:
    losses: dict[int, list[float]] = {}
    for size in (8, 2):
        settings = TrainSettings(
            steps=5, warmup_steps=0, learning_rate=0.1, global_batch_size=8, micro_batch_size=size, log_every_steps=1
        )
        seen = losses.setdefault(size, [])
        context = single_process_context(lambda _step, metrics, seen=seen: seen.append(metrics["train/loss"]))
        torch.manual_seed(0)
        source = synthetic_batches(size, 8)
        run_training(Regression(), source, settings, context, open_place(str(tmp_path / str(size))))
    assert losses[2] == pytest.approx(losses[8], rel=1e-5)
    assert losses[8][-1] < losses[8][0]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, pretraining, damage: Callable[[bytes], bytes]
) -> None:
    whole = pretraining.run(tmp_path / "whole", checkpoint_every_steps=3)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(8), checkpoint_every_steps=3)
    checkpoints = open_place(str(tmp_path / "broken" / "checkpoints"))
    assert sound_steps(checkpoints) == [3, 6]
    (newest,) = (tmp_path / "broken" / "checkpoints" / "step-00000006").glob("*.safetensors")
    newest.write_bytes(damage(newest.read_bytes()))
    assert pretraining.run(tmp_path / "broken", checkpoint_every_steps=3) == whole[3:]


def test_a_checkpoint_without_commit_is_never_used(tmp_path: Path, pretraining) -> None:
    whole = pretraining.run(tmp_path / "whole", checkpoint_every_steps=5)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(7), checkpoint_every_steps=5)
    (tmp_path / "broken" / "checkpoints" / "step-00000005" / "commit.json").unlink()
    assert pretraining.run(tmp_path / "broken", checkpoint_every_steps=5) == whole


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path: Path, pretraining) -> None:
    pretraining.run(tmp_path, checkpoint_every_steps=2, keep_checkpoints=2)
    assert sound_steps(open_place(str(tmp_path / "checkpoints"))) == [6, 8]


def test_published_encoder_has_learned_and_loads(tmp_path: Path, pretraining) -> None:
    losses = pretraining.run(tmp_path, steps=30)
    assert losses[-1] < losses[0] - 0.5
    encoder = load_model(tmp_path / "model")
    assert encoder.config.width == 32


def test_another_seed_gives_another_run_and_the_same_seed_the_same(tmp_path: Path, pretraining) -> None:
    first = pretraining.run(tmp_path / "a", steps=4)
    assert pretraining.run(tmp_path / "b", steps=4) == first
    assert pretraining.run(tmp_path / "c", steps=4, seed=1) != first


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(tmp_path: Path, pretraining) -> None:
    with pytest.raises(TrainingDiverged, match=r"max_bad_steps=3.*3 steps in a row.*clip-\d+.*learning_rate"):
        pretraining.run(tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_bad_steps=3)
    skipped = json.loads((tmp_path / "skipped-steps.json").read_text())
    assert len(skipped) == 3
    assert len(skipped[0]["clips"]) == 4


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_poisoned_batch_is_left_out_counted_and_named(tmp_path: Path, pretraining, zero_stage: int) -> None:
    clean = pretraining.run(tmp_path / "clean", zero_stage=zero_stage, steps=6)
    seen: list[float] = []
    losses = pretraining.run(
        tmp_path / "poisoned",
        lambda _step, metrics: seen.append(metrics["train/skipped_steps"]),
        zero_stage=zero_stage,
        steps=6,
        poisoned_step=2,
    )
    assert losses[:2] == clean[:2]
    assert math.isnan(losses[2])  # nothing was reported of it
    assert all(math.isfinite(loss) for loss in losses[3:])
    assert losses[-1] < losses[0]
    assert seen == [0, 0, 1, 1, 1, 1]
    assert json.loads((tmp_path / "poisoned" / "skipped-steps.json").read_text()) == [
        {"step": 3, "clips": ["clip-10", "clip-11", "clip-8", "clip-9"]}
    ]
