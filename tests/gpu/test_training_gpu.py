"""A worker's whole steps on a CUDA device: copy, filterbank, module and engine. Run by `make test-gpu`."""

import pytest
import torch

from beats_ray.bench.cases import BENCHES, int16_batch
from beats_ray.bench.measure import measure_case
from beats_ray.config import BenchConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def settings(name: str, precision: str = "bf16") -> BenchConfig:
    return BenchConfig(
        name=name,  # type: ignore[arg-type]
        preset="tiny", clips=8, seconds=5.0, repetitions=2, warmup=1, rounds=1, device="cuda",
        precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bench", "case"), [("pretrain", "whole step of a worker, 75 % masked"), ("finetune", "beats_ray")]
)
def test_a_worker_steps(bench: str, case: str, precision: str) -> None:
    pytest.importorskip("deepspeed", reason="the engine's package is not installed")
    config = settings(bench, precision)
    measured = measure_case(next(one for one in BENCHES[bench] if one.name == case), config)
    assert measured.peak_mib > 0
    assert len(measured.step_ms) == config.repetitions


def test_a_batch_in_pinned_memory_arrives_as_it_was() -> None:
    batch = int16_batch(settings("finetune").model_copy(update={"device": "cpu"}))
    pinned = batch.pinned()
    assert pinned.audio_BS.is_pinned()
    assert not batch.audio_BS.is_pinned()
    assert torch.equal(pinned.to("cuda").audio_BS.cpu(), batch.audio_BS)
