"""A hundred losses of each task, as they were when the files beside this one were written.

A change of the code that should change no result must leave them as they are. One that should is written down by

    PYTHONPATH=. python -m tests.unit.train.test_golden

and the new files say in the review how far the losses moved. Everything is small and synthetic: fp32 on one CPU thread.

The tolerance: another machine's matrix products round otherwise. With two threads instead of one, or without oneDNN,
the losses moved by 2e-6 of their size at most (distill; the others 2e-7). A learning rate that is 1 % off moves them
by 1.2e-3 (finetune), 8e-3 (pretrain) and 0.1 (distill).
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from beats_ray.data.storage import open_place
from beats_ray.train.context import single_process_context
from beats_ray.train.loop import run_training
from tests.support.tasks import TASKS
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
STEPS, GLOBAL_BATCH, MICRO_BATCH = 100, 4, 2
LEARNING_RATES = {"finetune": 1e-2}


def train_settings(name: str) -> dict[str, object]:
    return {
        "steps": STEPS, "warmup_steps": 10, "learning_rate": LEARNING_RATES.get(name, 1e-3), "epsilon": 1e-8,
        "zero_stage": 1, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "log_every_steps": 1,
    }  # fmt: skip


def losses_of(name: str, output: Path) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    torch.manual_seed(0)
    task, settings = TASKS[name](train_settings(name))
    context = single_process_context(lambda _step, metrics: losses.append(metrics["train/loss"]))
    source = SyntheticBatches(MICRO_BATCH, GLOBAL_BATCH)
    run_training(task, source, settings.train, context, open_place(str(output)))
    return losses


@pytest.mark.parametrize("name", TASKS)
def test_a_hundred_losses_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert len(golden) == STEPS
    losses = losses_of(name, tmp_path)
    assert losses == pytest.approx(golden, rel=TOLERANCE)


def rewrite() -> None:
    """Writes the golden files anew."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in TASKS:
        path = FOLDER / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else None
        with tempfile.TemporaryDirectory() as output:
            losses = [round(loss, 7) for loss in losses_of(name, Path(output))]
        path.write_text(json.dumps(losses) + "\n")
        moved = max(abs(a / b - 1) for a, b in zip(losses, before, strict=True)) if before else float("nan")
        print(f"{name}: {losses[0]:.4f} to {losses[-1]:.4f}; moved by {moved:.1e} at most")


if __name__ == "__main__":
    rewrite()
