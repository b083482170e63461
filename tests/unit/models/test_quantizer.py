"""The codebook: how it starts and moves, and that workers, precision and padding cannot disturb it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import beats_ray
from beats_ray.models import CosineQuantizer, QuantizerConfig, codebook_usage
from beats_ray.models.quantizer import cosine_kmeans

pytestmark = pytest.mark.unit

CODES, DIM = 8, 4


def quantizer(**settings: Any) -> CosineQuantizer:
    return CosineQuantizer(
        QuantizerConfig(**{"num_codes": CODES, "code_dim": DIM, "init_batches": 2} | settings)
    ).train()


def batches(count: int, rows: int = 64) -> list[Tensor]:
    """Clouds around eight directions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CODES, DIM, generator=generator) * 3
    picks = torch.randint(CODES, (count, rows), generator=generator)
    return list(centres[picks] + 0.3 * torch.randn(count, rows, DIM, generator=generator))


def test_kmeans_finds_separate_clouds() -> None:
    directions = F.normalize(torch.eye(5).repeat(40, 1) + 0.05 * torch.randn(200, 5), dim=-1)
    centres = cosine_kmeans(directions, 12, 10, torch.Generator().manual_seed(0))
    assert torch.allclose(centres.norm(dim=-1), torch.ones(12))
    closeness = (directions @ centres.t()).amax(dim=1).mean()
    start = cosine_kmeans(directions, 12, 0, torch.Generator().manual_seed(0))
    assert closeness > 0.99
    assert closeness > (directions @ start.t()).amax(dim=1).mean()


def test_the_start_uses_several_batches() -> None:
    first, second = torch.randn(200, DIM).abs(), -torch.randn(200, DIM).abs()
    for init_batches, codes_for_second in ((1, False), (2, True)):
        module = quantizer(init_batches=init_batches)
        module(first)
        module(second)
        has_negative_code = bool((module.codebook_VD < 0).all(dim=1).any())
        assert has_negative_code == codes_for_second


def test_used_codes_move_by_the_decay_and_unused_codes_stay() -> None:
    module = quantizer(init_batches=1, ema_decay=0.9)
    module(torch.randn(64, DIM))
    before = module.codebook_VD.clone()
    vectors = before[[2, 2, 5]] + 0.1 * torch.randn(3, DIM)
    result = module(vectors)
    assert result.labels_N.tolist() == [2, 2, 5]
    unit = F.normalize(vectors, dim=-1)
    for code, mean in ((2, unit[:2].sum(0)), (5, unit[2])):
        expected = F.normalize(0.9 * before[code] + 0.1 * F.normalize(mean, dim=-1), dim=-1)
        torch.testing.assert_close(module.codebook_VD[code], expected)
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(module.codebook_VD[others], before[others])
    assert result.counts_V.tolist() == [0, 0, 2, 0, 0, 1, 0, 0]


def test_evaluation_changes_no_buffer() -> None:
    module = quantizer()
    for batch in batches(4):
        module(batch)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    assert torch.equal(module(batches(1)[0]).labels_N, module.labels(batches(1)[0]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_padding_enters_neither_start_nor_update_nor_loss_nor_counts() -> None:
    clean, dirty = quantizer(), quantizer()
    for batch in batches(5):
        rubbish = torch.cat((batch, 100 * torch.ones(16, DIM)))
        is_pad = torch.arange(len(rubbish)) >= len(batch)
        one, other = clean(batch), dirty(rubbish, is_pad)
        torch.testing.assert_close(other.commitment_sum, one.commitment_sum)
        assert torch.equal(other.counts_V, one.counts_V)
        assert torch.equal(other.labels_N[: len(batch)], one.labels_N)
        assert (other.labels_N[len(batch) :] == -1).all()
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(dirty.state_dict()[name], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_enters_the_loss_but_never_the_codebook(value: float) -> None:
    clean, poisoned = quantizer(restart_below=0.3), quantizer(restart_below=0.3)
    for batch in batches(5):  # the first two are k-means' start
        bad = torch.ones(16, DIM).index_fill(1, torch.tensor([1]), value)
        one, other = clean(batch), poisoned(torch.cat((batch, bad)))
        assert other.commitment_sum.isnan()  # so that the step is skipped
        assert torch.equal(other.counts_V, one.counts_V)
        assert (other.labels_N[len(batch) :] == -1).all()
    for name, expected in clean.state_dict().items():
        torch.testing.assert_close(poisoned.state_dict()[name], expected)


def test_the_gradient_passes_straight_through_and_commitment_pulls_to_the_code() -> None:
    module = quantizer(init_batches=1)
    module(torch.randn(64, DIM))
    module.eval()
    vectors = F.normalize(torch.randn(6, DIM), dim=-1).requires_grad_()
    weight = torch.randn(6, DIM)
    result = module(vectors)
    assert torch.allclose(result.vectors_ND, module.codebook_VD[result.labels_N], atol=1e-6)
    (gradient,) = torch.autograd.grad((result.vectors_ND * weight).sum(), vectors, retain_graph=True)
    direct = torch.autograd.grad((F.normalize(vectors, dim=-1) * weight).sum(), vectors)[0]
    torch.testing.assert_close(gradient, direct)
    step = vectors - 0.1 * torch.autograd.grad(result.commitment_sum, vectors)[0]
    assert module(step).commitment_sum < result.commitment_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_codebook_keeps_its_exact_fp32_values_through_a_cast(dtype: torch.dtype) -> None:
    module = quantizer()
    for batch in batches(4):
        module(batch)
    before = module.codebook_VD.clone()
    holder = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), module).to(dtype)
    assert next(holder.parameters()).dtype == dtype
    assert module.codebook_VD.dtype == torch.float32
    assert torch.equal(module.codebook_VD, before)
    # A step of 1 % is below bf16's resolution of most values: it must still arrive.
    module(batches(1)[0].to(dtype))
    assert 0 < (module.codebook_VD - before).abs().max() < 0.02


def test_dead_codes_stay_by_default_and_restart_on_request() -> None:
    cloud = F.normalize(torch.ones(64, DIM) + 0.2 * torch.randn(64, DIM), dim=-1)
    for restart_below, restarts in ((0.0, False), (0.05, True)):
        module = quantizer(init_batches=1, ema_decay=0.5, restart_below=restart_below)
        module(torch.randn(64, DIM))
        module.codebook_VD[0] = -torch.ones(DIM) / DIM**0.5  # opposite to all that follows
        for _ in range(12):
            module(cloud)
        assert bool(module.codebook_VD[0].sum() > 0) == restarts


def test_a_restored_codebook_goes_on_exactly() -> None:
    data = batches(8)
    straight, stopped = quantizer(), quantizer()
    for batch in data[:4]:
        straight(batch)
        stopped(batch)
    resumed = quantizer()
    resumed.load_state_dict(stopped.state_dict())
    for batch in data[4:]:
        straight(batch)
        resumed(batch)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in straight.state_dict().items())


def test_usage_counts_codes_and_their_balance() -> None:
    assert codebook_usage(torch.tensor([5.0, 5.0, 0.0, 0.0])) == pytest.approx((0.5, 2.0))
    assert codebook_usage(torch.tensor([7, 7, 7, 7])) == pytest.approx((1.0, 4.0))
    assert codebook_usage(torch.tensor([9.0, 0.0])) == pytest.approx((0.5, 1.0))
    assert codebook_usage(torch.zeros(4)) == (0.0, 0.0)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = quantizer(restart_below=0.3)
    labels: list[Tensor] = []
    for batch in batches(6):
        # Unequal shares, one of them empty once: the first worker gets a third, then nothing; the second one gets
        # vectors that are no numbers beside its own.
        cut = 0 if len(labels) == 3 else len(batch) // 3
        mine = batch[:cut] if rank == 0 else torch.cat((batch[cut:], torch.full((2, DIM), torch.nan)))
        labels.append(module(mine).labels_N[: len(mine) - 2 * rank])
    torch.save((labels, module.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_keep_the_codebook_and_labels_of_one(tmp_path: Path) -> None:
    alone = quantizer(restart_below=0.3)
    expected = [alone(batch).labels_N for batch in batches(6)]
    environment = os.environ | {"PYTHONPATH": str(Path(beats_ray.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    (first, first_state), (second, second_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for mine, parts in zip(expected, zip(first, second, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(parts))
    for name, value in alone.state_dict().items():
        assert torch.equal(first_state[name], second_state[name])
        torch.testing.assert_close(first_state[name], value)


if __name__ == "__main__":  # one of the two workers
    work(int(sys.argv[1]), sys.argv[2])
