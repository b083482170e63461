"""The convolutional position embedding: by its spectrum it is the convolution that the formula says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beats_ray.models.spectral import SPECTRAL_CLIPS
from beats_ray.models.transformer import PositionConv

pytestmark = pytest.mark.unit


def by_formula(conv: PositionConv, x_BND: Tensor) -> Tensor:
    """One product for each tap, in float64."""
    weight = conv.weight_v.double() / conv.weight_v.double().norm(dim=(0, 1), keepdim=True) * conv.weight_g.double()
    patches, taps = x_BND.shape[1], conv.kernel
    padded = F.pad(x_BND.double(), (0, 0, taps // 2, taps))
    out_BND = conv.bias.double().expand(*x_BND.shape).clone()
    for tap in range(taps):
        place_BNGC = padded[:, tap : tap + patches].unflatten(2, (conv.groups, -1))
        kernel_GOC = weight[..., tap].unflatten(0, (conv.groups, -1))
        out_BND = out_BND + torch.einsum("bngc,goc->bngo", place_BNGC, kernel_GOC).flatten(2)
    return F.gelu(out_BND)


@pytest.mark.parametrize("clips", [SPECTRAL_CLIPS - 1, SPECTRAL_CLIPS], ids=["direct", "by spectrum"])
@pytest.mark.parametrize(("patches", "taps"), [(37, 16), (64, 128), (5, 32), (50, 9), (1, 8)])
def test_output_and_gradients_are_those_of_the_formula(clips: int, patches: int, taps: int) -> None:
    torch.manual_seed(0)
    conv = PositionConv(width=24, kernel=taps, groups=4)
    torch.nn.init.normal_(conv.bias)
    x_BND = torch.randn(clips, patches, 24, requires_grad=True)
    wanted = torch.randn(clips, patches, 24)
    leaves = [x_BND, *conv.parameters()]
    found, expected = conv(x_BND), by_formula(conv, x_BND)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, wanted),
        torch.autograd.grad(expected, leaves, wanted.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("clips", [SPECTRAL_CLIPS - 1, SPECTRAL_CLIPS], ids=["direct", "by spectrum"])
@pytest.mark.parametrize(("width", "taps", "groups"), [(24, 64, 4), (128, 128, 16)])
def test_in_bf16_it_is_computed_in_fp32(clips: int, width: int, taps: int, groups: int) -> None:
    """Of groups of 8 channels and 128 taps oneDNN's bf16 kernel on CPUs with AMX makes something else."""
    torch.manual_seed(0)
    conv = PositionConv(width, taps, groups)
    x_BND = torch.randn(clips, 80, width).bfloat16()
    rounded = PositionConv(width, taps, groups)
    rounded.load_state_dict({name: value.bfloat16() for name, value in conv.state_dict().items()})
    found = conv.bfloat16()(x_BND)
    assert found.dtype == torch.bfloat16
    error = (found.double() - by_formula(rounded, x_BND)).abs().max()
    assert error < 2**-8 * 4, error  # values of at most 4 are rounded once, and not at each of 64 taps
    with torch.autocast("cpu", torch.bfloat16):
        mixed = conv.float()(x_BND.float())
    torch.testing.assert_close(mixed.double(), by_formula(rounded, x_BND), rtol=0, atol=1e-4)


def test_many_clips_need_no_product_for_each_tap() -> None:
    conv = PositionConv(width=768, kernel=128, groups=16)
    counts = {}
    for clips in (SPECTRAL_CLIPS - 1, SPECTRAL_CLIPS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            conv(torch.randn(clips, 496, 768))
        counts[clips] = counter.get_total_flops() / clips
    direct, by_spectrum = counts.values()
    assert direct == 2 * 497 * 768 * 48 * 128
    assert 0 < 4 * by_spectrum < direct / 20  # it counts a complex product as a real one
