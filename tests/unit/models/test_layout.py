"""Padding is left out of the layers, and nothing else changes."""

from typing import Any

import pytest
import torch

from beats_ray.models import (
    MaskedPatchPredictor,
    PredictorConfig,
    build_encoder,
    sample_patch_mask,
    transformer,
)
from beats_ray.models.layout import PackedLayout
from beats_ray.models.patches import patch_padding

pytestmark = pytest.mark.unit

FRAMES_B = torch.tensor([96, 16, 48, 0])
FBANK_BTF = torch.randn(4, 96, 128, generator=torch.Generator().manual_seed(0))


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build_encoder("tiny", **changes).train()


def results(share: float, run: Any) -> tuple[torch.Tensor, list[torch.Tensor], set]:
    """Output and gradients with patches packed below `share`, and the ranks of what the feed-forward blocks got."""
    ranks = set()
    module, forward = run()
    transformer.pack_below(module, share)
    for layer in module.modules():
        if isinstance(layer, transformer.TransformerLayer):
            layer.fc1.register_forward_hook(lambda _module, inputs, _output: ranks.add(inputs[0].dim()))
    torch.manual_seed(1)  # of layer drop
    out = forward(module)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return out.detach(), gradients, ranks


def assert_same(run: Any) -> None:
    out, gradients, ranks = results(0.0, run)
    packed_out, packed_gradients, packed_ranks = results(1.1, run)
    assert (ranks, packed_ranks) == ({3}, {2})
    torch.testing.assert_close(packed_out, out, atol=1e-5, rtol=1e-4)
    assert len(gradients) == len(packed_gradients) > 10
    for packed, padded in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-3 * float(padded.abs().max()) + 1e-7, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True, "deep_norm": False}, {"layer_drop": 0.5}], ids=str)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_features_and_gradients_of_padded_clips_are_the_same(
    changes: dict[str, Any], known: bool, checkpointed: bool
) -> None:
    num_real = int((~patch_padding(FRAMES_B, 96)).sum()) if known else None

    def run() -> Any:
        encoder = build(**changes)
        encoder.use(checkpoint_layers=checkpointed)
        return encoder, lambda module: module(FBANK_BTF, FRAMES_B, num_real=num_real).features_BND

    assert_same(run)


def test_every_layer_of_padded_clips_is_the_same() -> None:
    assert_same(
        lambda: (build(), lambda module: torch.stack(module(FBANK_BTF, FRAMES_B, return_layers=True).layers)),
    )


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("max_targets", [None, 5])
def test_predictions_of_padded_clips_are_the_same(known: bool, max_targets: int | None) -> None:
    is_pad_BN = patch_padding(FRAMES_B, 96)
    num_real_B = (~is_pad_BN).sum(1) if known else None
    generator = torch.Generator().manual_seed(0)
    mask = sample_patch_mask(is_pad_BN, 0.75, generator, max_targets=max_targets, num_real_B=num_real_B)
    is_target_BK1 = (mask.target_BK >= 0).unsqueeze(-1)

    def run() -> Any:
        predictor = MaskedPatchPredictor(build(), PredictorConfig(num_layers=2, num_codes=16)).train()
        return predictor, lambda module: module(FBANK_BTF, FRAMES_B, mask).masked_fill(~is_target_BK1, 0.0)

    assert_same(run)


def test_padded_clips_of_which_nothing_is_asked_pass() -> None:
    mask = sample_patch_mask(patch_padding(FRAMES_B, 96), 0.0, torch.Generator())
    predictor = MaskedPatchPredictor(build(), PredictorConfig(num_layers=2, num_codes=16))
    assert predictor(FBANK_BTF, FRAMES_B, mask).shape == (4, 0, 16)


@pytest.mark.parametrize("max_targets", [None, 1, 7, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_the_counts_of_a_mask_are_known_before_it_is_drawn(ratio: float, max_targets: int | None) -> None:
    for frames_B in (FRAMES_B, torch.tensor([96, 96, 96, 90])):
        is_pad_BN = patch_padding(frames_B, 96)
        generator = torch.Generator().manual_seed(0)
        mask = sample_patch_mask(is_pad_BN, ratio, generator, max_targets=max_targets, num_real_B=(~is_pad_BN).sum(1))
        counts = int((mask.visible_BM >= 0).sum()), int((mask.target_BK >= 0).sum())
        assert (mask.num_visible, mask.num_targets) == counts


def test_a_wrong_count_is_refused() -> None:
    with pytest.raises(ValueError, match="num_real=7, but 80 patches"):
        build()(FBANK_BTF, FRAMES_B, num_real=7)


def test_batches_with_little_padding_are_not_packed() -> None:
    is_pad_BN = torch.zeros(4, 10, dtype=torch.bool)
    is_pad_BN[0, -3:] = True
    stack = build().encoder
    assert not isinstance(stack._layouts(is_pad_BN, 0, 37, None)[0], PackedLayout)
    is_pad_BN[1, -3:] = True
    assert isinstance(stack._layouts(is_pad_BN, 0, 34, None)[0], PackedLayout)
    nothing_BN = torch.ones_like(is_pad_BN)
    assert not isinstance(stack._layouts(nothing_BN, 0, 0, None)[0], PackedLayout)
