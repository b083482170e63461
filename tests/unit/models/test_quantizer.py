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
from beats_ray.models.quantizer import Quantized, cosine_kmeans

pytestmark = pytest.mark.unit

CODES, DIM = 8, 4


def quantizer(**settings: Any) -> CosineQuantizer:
    return CosineQuantizer(
        QuantizerConfig(**{"num_codes": CODES, "code_dim": DIM, "init_batches": 2} | settings)
    ).train()


def train_step(module: CosineQuantizer, *micro_batches: Tensor) -> list[Quantized]:
    """One optimizer step's forward passes and its end."""
    results = [module(micro_batch) for micro_batch in micro_batches]
    module.end_step(moved=True)
    return results


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
        train_step(module, first)
        train_step(module, second)
        has_negative_code = bool((module.codebook_VD < 0).all(dim=1).any())
        assert has_negative_code == codes_for_second


def test_used_codes_move_by_the_decay_and_unused_codes_stay() -> None:
    module = quantizer(init_batches=1, ema_decay=0.9)
    train_step(module, torch.randn(64, DIM))
    before = module.codebook_VD.clone()
    vectors = before[[2, 2, 5]] + 0.1 * torch.randn(3, DIM)
    (result,) = train_step(module, vectors)
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
        train_step(module, batch)
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
        clean.end_step(moved=True)
        dirty.end_step(moved=True)
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
        clean.end_step(moved=True)
        poisoned.end_step(moved=True)
        assert other.commitment_sum.isnan()  # so that the step is skipped
        assert torch.equal(other.counts_V, one.counts_V)
        assert (other.labels_N[len(batch) :] == -1).all()
    for name, expected in clean.state_dict().items():
        torch.testing.assert_close(poisoned.state_dict()[name], expected)


def test_the_gradient_passes_straight_through_and_commitment_pulls_to_the_code() -> None:
    module = quantizer(init_batches=1)
    train_step(module, torch.randn(64, DIM))
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
        train_step(module, batch)
    before = module.codebook_VD.clone()
    holder = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), module).to(dtype)
    assert next(holder.parameters()).dtype == dtype
    assert module.codebook_VD.dtype == torch.float32
    assert torch.equal(module.codebook_VD, before)
    # A step of 1 % is below bf16's resolution of most values: it must still arrive.
    train_step(module, batches(1)[0].to(dtype))
    assert 0 < (module.codebook_VD - before).abs().max() < 0.02


def test_dead_codes_stay_by_default_and_restart_on_request() -> None:
    cloud = F.normalize(torch.ones(64, DIM) + 0.2 * torch.randn(64, DIM), dim=-1)
    for restart_below, restarts in ((0.0, False), (0.05, True)):
        module = quantizer(init_batches=1, ema_decay=0.5, restart_below=restart_below)
        train_step(module, torch.randn(64, DIM))
        module.codebook_VD[0] = -torch.ones(DIM) / DIM**0.5  # opposite to all that follows
        for _ in range(12):
            train_step(module, cloud)
        assert bool(module.codebook_VD[0].sum() > 0) == restarts


def test_a_restored_codebook_goes_on_exactly() -> None:
    data = batches(8)
    straight, stopped = quantizer(), quantizer()
    for batch in data[:4]:
        train_step(straight, batch)
        train_step(stopped, batch)
    resumed = quantizer()
    resumed.load_state_dict(stopped.state_dict())
    for batch in data[4:]:
        train_step(straight, batch)
        train_step(resumed, batch)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in straight.state_dict().items())


@pytest.mark.parametrize("restart_below", [0.0, 0.3])
def test_the_codebook_moves_once_a_step_however_it_is_cut_into_micro_batches(restart_below: float) -> None:
    whole, accumulated = quantizer(restart_below=restart_below), quantizer(restart_below=restart_below)
    for batch in batches(6):
        (one,) = train_step(whole, batch)
        parts = train_step(accumulated, *batch.split((10, 0, 30, 24)))
        assert torch.equal(one.labels_N, torch.cat([part.labels_N for part in parts]))
        for name, expected in whole.state_dict().items():
            torch.testing.assert_close(accumulated.state_dict()[name], expected, rtol=0, atol=1e-6)
    assert int(whole.batches_seen) == 6


def test_labels_of_a_step_are_those_of_the_codebook_before_it() -> None:
    module = quantizer(init_batches=1, ema_decay=0.0)
    first, second = batches(2)
    train_step(module, first)
    before = module.state_dict()["codebook_VD"].clone()
    expected = module.labels(second)
    results = [module(second), module(second)]
    assert torch.equal(module.codebook_VD, before)
    assert all(torch.equal(result.labels_N, expected) for result in results)
    module.end_step(moved=True)
    assert not torch.equal(module.codebook_VD, before)


@pytest.mark.parametrize("steps_before", [0, 1, 4])  # no codebook yet, k-means, moving average
def test_of_a_step_that_was_left_out_nothing_stays(steps_before: int) -> None:
    clean, skipping = quantizer(restart_below=0.3), quantizer(restart_below=0.3)
    *rest, left_out = batches(6)
    for index, batch in enumerate(rest):
        if index == steps_before:
            skipping(left_out)
            skipping.end_step(moved=False)
        train_step(clean, batch)
        train_step(skipping, batch)
    for name, expected in clean.state_dict().items():
        assert torch.equal(skipping.state_dict()[name], expected), name


def test_vectors_pass_unchanged_and_unlabelled_in_the_first_step() -> None:
    module = quantizer()
    vectors = torch.randn(6, DIM).requires_grad_()
    result = module(vectors)
    torch.testing.assert_close(result.vectors_ND, F.normalize(vectors, dim=-1))
    assert result.labels_N.tolist() == [-1] * 6
    assert float(result.commitment_sum.detach()) == float(result.counts_V.sum()) == 0
    weight = torch.randn(6, DIM)
    gradient, direct = (
        torch.autograd.grad((one * weight).sum(), vectors, retain_graph=True)[0]
        for one in (result.vectors_ND, F.normalize(vectors, dim=-1))
    )
    torch.testing.assert_close(gradient, direct)
    module.end_step(moved=True)
    assert (module(vectors).labels_N >= 0).all()


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
        # Two micro-batches of unequal shares, one of them empty once: the first worker gets a third, then nothing; the
        # second one gets vectors that are no numbers beside its own.
        for half in batch.chunk(2):
            cut = 0 if len(labels) == 6 else len(half) // 3
            mine = half[:cut] if rank == 0 else torch.cat((half[cut:], torch.full((2, DIM), torch.nan)))
            labels.append(module(mine).labels_N[: len(mine) - 2 * rank])
        module.end_step(moved=True)
    torch.save((labels, module.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_keep_the_codebook_and_labels_of_one(tmp_path: Path) -> None:
    alone = quantizer(restart_below=0.3)
    expected = [label for batch in batches(6) for label in train_step(alone, batch)[0].labels_N.chunk(2)]
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
        torch.testing.assert_close(first_state[name], value, rtol=0, atol=1e-6)


if __name__ == "__main__":  # one of the two workers
    work(int(sys.argv[1]), sys.argv[2])
