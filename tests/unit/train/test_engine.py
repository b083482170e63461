"""The engine: what its settings become, offloading, and compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from beats_ray.config import ConfigError, TrainSettings, validate
from beats_ray.train.engine import deepspeed_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer=true needs a zero_stage of 1, 2 or 3"),
        ({"offload_parameters": True, "zero_stage": 2}, "offload_parameters=true needs zero_stage=3, and it is 2; use"),
    ],
)
def test_offloading_needs_a_zero_stage_that_divides_what_it_moves(train: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainSettings, train)


def test_offloading_becomes_deepspeeds_settings_and_extras_may_not_contradict() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"ratio": 0.5}}}
    settings = TrainSettings(zero_stage=3, offload_optimizer=True, offload_parameters=True, deepspeed=extra)
    assert deepspeed_config(settings, 1)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5},
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    nvme: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}}
    assert deepspeed_config(TrainSettings(deepspeed=nvme), 1)["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match=r"offload_optimizer.device='nvme' contradicts 'cpu'"):
        deepspeed_config(TrainSettings(offload_optimizer=True, deepspeed=nvme), 1)


class Interrupted(Exception):
    """Stands for a killed worker."""


def interrupt(step: int, _metrics: dict[str, float]) -> None:
    if step == 4:
        raise Interrupted


@pytest.mark.parametrize(
    "offload",
    [
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ],
    ids=lambda offload: f"stage-{offload['zero_stage']}",
)
def test_an_offloaded_run_trains_and_resumes_like_one_that_is_not(
    tmp_path: Path, pretraining, offload: dict[str, object]
) -> None:
    options = {"steps": 6, "checkpoint_every_steps": 3, "ema_decay": 0.5, "micro_batch_size": 2}
    plain = pretraining.run(tmp_path / "plain", zero_stage=0, **options)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "offloaded", interrupt, **options, **offload)
    rest = pretraining.run(tmp_path / "offloaded", **options, **offload)
    assert rest == pytest.approx(plain[3:], abs=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "offloaded")]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_compiled_run_trains_alike_and_is_compiled_for_its_first_batch_alone(
    tmp_path: Path, pretraining, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    from torch._dynamo.utils import counters

    options = {"steps": 6, "checkpoint_every_steps": 3, "zero_stage": zero_stage}
    eager = pretraining.run(tmp_path / "eager", **options)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    losses = pretraining.run(
        tmp_path / "compiled",
        lambda _step, _metrics: graphs.append(counters["stats"]["unique_graphs"]),
        compile=True,
        **options,
    )
    assert graphs[0] >= 1
    assert set(graphs) == {graphs[0]}  # lengths of clips and numbers of targets differ from batch to batch
    assert losses == pytest.approx(eager, rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("eager", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    checkpoints = [load_file(next((tmp_path / name / "checkpoints" / "step-00000003").glob("*.safetensors")))
                   for name in ("eager", "compiled")]  # fmt: skip
    assert checkpoints[0].keys() == checkpoints[1].keys()
