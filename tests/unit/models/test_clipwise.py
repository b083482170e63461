"""The backward pass of attention that goes clip by clip, against the formula's own by autograd."""

from typing import Any

import pytest
import torch

from beats_ray.models.attention import GatedSelfAttention, RelativeBias, _attend_clipwise
from beats_ray.models.layout import PaddedLayout

pytestmark = pytest.mark.unit

CLIPS, PATCHES, WIDTH, HEADS = 3, 17, 32, 4


def gradients(backend: Any, dtype: torch.dtype, *, shared: bool, first_query: int, frozen: bool) -> dict[str, Any]:
    """Output and gradients of one layer's attention; the first clip is whole, the last one padding alone."""
    torch.manual_seed(0)
    attention = GatedSelfAttention(WIDTH, HEADS, 0.0, True, RelativeBias(16, HEADS, 20)).to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x_BND = torch.randn(CLIPS, PATCHES, WIDTH, dtype=dtype, requires_grad=True)
    bias_BHNN = torch.randn(1 if shared else CLIPS, HEADS, PATCHES, PATCHES, dtype=dtype, requires_grad=not frozen)
    is_pad_BN = torch.arange(PATCHES) >= torch.tensor([[PATCHES], [9], [0]])
    out = attention(x_BND, bias_BHNN, is_pad_BN, backend=backend, layout=PaddedLayout(first_query))
    (out * torch.randn(out.shape).to(dtype)).sum().backward()
    found = {"out": out.detach(), "x": x_BND.grad, "bias": bias_BHNN.grad}
    found |= {name: parameter.grad for name, parameter in attention.named_parameters()}
    assert (found["bias"] is None) == frozen
    del found["k_proj.bias"]  # softmax ignores what is added to all keys alike: rounding is all that there is
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("shared", [True, False], ids=["one bias", "a bias for each clip"])
@pytest.mark.parametrize("first_query", [0, 5])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen bias"])
def test_gradients_are_those_of_the_formula(shared: bool, first_query: int, frozen: bool) -> None:
    kind: Any = {"shared": shared, "first_query": first_query, "frozen": frozen}
    formula, ours = (gradients(backend, torch.float32, **kind) for backend in ("matmul", "clipwise"))
    assert formula.keys() == ours.keys()
    assert {"x", "grep_a", "k_proj.weight"} <= ours.keys()
    for name, expected in formula.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_in_half_precision_they_are_as_near_to_fp32_as_the_formula_s(shared: bool) -> None:
    kind: Any = {"shared": shared, "first_query": 0, "frozen": False}
    exact = gradients("matmul", torch.float32, **kind)
    formula, ours = (gradients(backend, torch.bfloat16, **kind) for backend in ("matmul", "clipwise"))
    for name, expected in exact.items():
        theirs, mine = ((one[name].float() - expected).norm() for one in (formula, ours))
        assert mine <= 1.2 * theirs, name


def test_a_backward_pass_under_autocast_computes_in_fp32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, PATCHES, 8, requires_grad=True) for _ in range(3))
    found = []
    for autocast in (False, True):
        for one in (q, k, v):
            one.grad = None
        bias = torch.zeros(1, HEADS, PATCHES, PATCHES)
        out = _attend_clipwise((q, k, v, None, bias, None, 0.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out.square().sum().backward()
        found.append([one.grad.clone() for one in (q, k, v) if one.grad is not None])
    assert len(found[0]) == 3
    assert all(torch.equal(mine, expected) for expected, mine in zip(*found, strict=True))
