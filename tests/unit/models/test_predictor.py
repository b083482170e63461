"""Masked prediction: what may and what must influence the logits, and that cost follows the visible patches."""

from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beats_ray.models import MaskedPatchPredictor, PatchMask, PredictorConfig, build_encoder, sample_patch_mask

pytestmark = pytest.mark.unit


def model(mask_vector: Literal["zero", "learned"] = "zero") -> MaskedPatchPredictor:
    torch.manual_seed(0)
    encoder = build_encoder("tiny")
    predictor = MaskedPatchPredictor(encoder, PredictorConfig(num_codes=50, mask_vector=mask_vector)).eval()
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_()
    return predictor


def mask(*targets: int, visible: tuple[int, ...] = (0, 3, 9, 22)) -> PatchMask:
    return PatchMask(torch.tensor([visible]), torch.tensor([targets]))


@pytest.mark.parametrize("mask_vector", ["zero", "learned"])
def test_masked_content_never_reaches_the_logits(mask_vector: Literal["zero", "learned"]) -> None:
    predictor = model(mask_vector)
    fbank = torch.randn(1, 64, 128)
    changed = fbank.clone()
    changed[0, 16:32, 32:48] = 7.0  # patch 10
    assert torch.equal(predictor(fbank, None, mask(10, 12)), predictor(changed, None, mask(10, 12)))
    changed[0, 16:32, 16:32] = 7.0  # patch 9, which is visible
    assert not torch.equal(predictor(fbank, None, mask(10, 12)), predictor(changed, None, mask(10, 12)))


def test_targets_at_different_places_get_different_logits() -> None:
    logits = model()(torch.randn(1, 64, 128), None, mask(10, 12, 31))[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[1] - logits[2]).abs().max() > 1e-3


def test_logits_do_not_depend_on_batch_mates_or_padding() -> None:
    predictor = model()
    fbank = torch.randn(1, 64, 128)
    alone = predictor(fbank, None, mask(10, 12))
    batch = torch.randn(2, 160, 128)
    batch[1, :64] = fbank[0]
    visible = torch.tensor([[1, 2, 3, 50, 60, 70], [0, 3, 9, 22, -1, -1]])
    target = torch.tensor([[4, 5, 77], [10, 12, -1]])
    logits = predictor(batch, torch.tensor([160, 64]), PatchMask(visible, target))
    torch.testing.assert_close(logits[1, :2], alone[0], atol=1e-5, rtol=1e-4)


def test_every_parameter_learns_from_a_masked_step() -> None:
    predictor = model("learned").train()
    fbank = torch.randn(2, 160, 128)
    chosen = sample_patch_mask(torch.zeros(2, 80, dtype=torch.bool), 0.75, torch.Generator().manual_seed(0))
    logits = predictor(fbank, None, chosen)
    assert logits.shape == (2, 60, 50)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(50, (120,))).backward()
    idle = [name for name, one in predictor.named_parameters() if one.grad is None or not one.grad.any()]
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []


def test_the_encoders_work_follows_the_visible_patches() -> None:
    encoder = build_encoder("tiny")
    fbank = torch.randn(1, 640, 128)

    def flops(visible: int) -> int:
        with FlopCounterMode(display=False) as counter:
            encoder(fbank, None, torch.arange(visible)[None])
        return int(counter.get_total_flops())

    convolution_only = flops(1)
    assert (flops(320) - convolution_only) / (flops(80) - convolution_only) > 3.9
    assert flops(80) < 0.35 * flops(320)


def test_predicting_fewer_targets_costs_less_and_keeps_shapes() -> None:
    predictor = model()
    fbank = torch.randn(1, 640, 128)
    is_pad = torch.zeros(1, 320, dtype=torch.bool)

    def flops(max_targets: int | None) -> int:
        chosen = sample_patch_mask(is_pad, 0.75, torch.Generator().manual_seed(0), max_targets=max_targets)
        with FlopCounterMode(display=False) as counter:
            predictor(fbank, None, chosen)
        return int(counter.get_total_flops())

    assert flops(80) < 0.62 * flops(None)
