"""Outputs of norms and of GELU that are computed again instead of kept."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beats_ray.models.recompute import gelu_again, norm_again

pytestmark = pytest.mark.unit


def gradients(again: bool, operation: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    before, norm, linear = torch.randn(3, 5, 8, requires_grad=True), nn.LayerNorm(8), nn.Linear(8, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    after = norm(before) if operation == "norm" else F.gelu(before)
    block = norm_again(after, norm) if operation == "norm" else gelu_again(after)
    with block if again else nullcontext():
        out = linear(after)
    wanted = (before, linear.weight, *(norm.parameters() if operation == "norm" else ()))
    return torch.autograd.grad(out.sin().sum(), wanted)


@pytest.mark.parametrize("operation", ["norm", "gelu"])
def test_gradients_are_those_of_what_would_have_been_kept(operation: str) -> None:
    for mine, kept in zip(gradients(True, operation), gradients(False, operation), strict=True):
        assert torch.equal(mine, kept)


@pytest.mark.parametrize("operation", ["norm", "gelu"])
def test_the_output_is_gone_until_the_backward_pass(operation: str) -> None:
    before, norm, linear = torch.randn(3, 8, requires_grad=True), nn.LayerNorm(8), nn.Linear(8, 4)
    after = norm(before) if operation == "norm" else F.gelu(before)
    with norm_again(after, norm) if operation == "norm" else gelu_again(after):
        out = linear(after)
    assert out.grad_fn is not None
    storage = torch.multiprocessing.reductions.StorageWeakRef(after.untyped_storage())
    del after
    assert storage.expired()
    out.sum().backward()


def test_another_operations_output_is_kept() -> None:
    """After dropout, say, whose input nothing keeps."""
    before, norm, linear = torch.randn(3, 8, requires_grad=True), nn.LayerNorm(8), nn.Linear(8, 4)
    dropped = norm(before) * 2
    with norm_again(dropped, norm):
        out = linear(dropped)
    (expected,) = torch.autograd.grad(linear(norm(before) * 2).sum(), before)
    assert torch.equal(torch.autograd.grad(out.sum(), before)[0], expected)
