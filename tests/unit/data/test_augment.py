"""Augmentation: what is mixed, masked and moved, by how much, and that a seed says it all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beats_ray.data.augment import Mixture, change_gain, draw_mixture, mask_spectrogram, mix, mix_targets, roll

pytestmark = pytest.mark.unit


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(*shape: int) -> tuple[Tensor, Tensor]:
    """Noise of (3, L, ...), and lengths of 100 %, 60 % and 30 % of L."""
    length_B = torch.tensor([shape[1], shape[1] * 6 // 10, shape[1] * 3 // 10])
    return torch.randn(shape, generator=seeded(9)), length_B


@pytest.mark.parametrize("shape", [(3, 100), (3, 100, 8)], ids=["waveform", "fbank"])
def test_a_mixture_is_the_sum_of_its_shares_and_padding_adds_nothing(shape: tuple[int, ...]) -> None:
    values, length_B = ragged(*shape)
    mixture = Mixture(torch.tensor([1, 2, 0]), torch.tensor([0.5, 0.75, 0.9]))
    mixed, mixed_length_B = mix(values, length_B, mixture)
    for own, (partner, share) in enumerate(zip(mixture.partner_B.tolist(), mixture.share_B.tolist(), strict=True)):
        expected = torch.zeros(shape[1:])
        expected[: length_B[own]] += share * values[own, : length_B[own]]
        expected[: length_B[partner]] += (1 - share) * values[partner, : length_B[partner]]
        torch.testing.assert_close(mixed[own], expected)
    assert mixed_length_B.tolist() == [100, 60, 100]


def test_mixing_keeps_each_part_at_its_share_of_the_energy() -> None:
    wave_BS = torch.zeros(2, 64)
    wave_BS[0, :32], wave_BS[1, 32:] = 1.0, 1.0
    mixture = Mixture(torch.tensor([1, 0]), torch.tensor([0.8, 0.6]))
    mixed_BS, _ = mix(wave_BS, torch.tensor([64, 64]), mixture)
    energy = torch.stack([mixed_BS[:, :32].square().sum(1), mixed_BS[:, 32:].square().sum(1)], 1) / 32
    torch.testing.assert_close(energy, torch.tensor([[0.64, 0.04], [0.16, 0.36]]))


def test_one_class_targets_sum_to_one_and_a_class_of_both_clips_stays_whole() -> None:
    mixture = draw_mixture(50, 0.8, 1.0, seeded())
    one_class_BC = torch.eye(5)[torch.arange(50) % 5]
    torch.testing.assert_close(mix_targets(one_class_BC, mixture).sum(1), torch.ones(50))
    several_BC = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    mixed_BC = mix_targets(several_BC, Mixture(torch.tensor([1, 0]), torch.tensor([0.7, 0.6])))
    torch.testing.assert_close(mixed_BC, torch.tensor([[1.0, 0.7, 0.3], [1.0, 0.4, 0.6]]))


def test_shares_lead_and_follow_the_beta_distribution() -> None:
    wide, narrow = (draw_mixture(4000, alpha, 1.0, seeded()).share_B for alpha in (10.0, 0.2))
    for share_B in (wide, narrow):
        assert float(share_B.min()) >= 0.5
        assert float(share_B.max()) <= 1.0
    # |share - 0.5| has the deviation of Beta(a, a): 1 / sqrt(4 (2 a + 1)).
    for share_B, alpha in ((wide, 10.0), (narrow, 0.2)):
        deviation = float((share_B - 0.5).square().mean().sqrt())
        assert deviation == pytest.approx((4 * (2 * alpha + 1)) ** -0.5, rel=0.05)


def test_the_clips_that_are_not_chosen_stay_as_they_are() -> None:
    wave_BS, targets_BC = torch.randn(400, 20), torch.eye(4)[torch.arange(400) % 4]
    length_B = torch.randint(5, 20, (400,))
    wave_BS[torch.arange(20) >= length_B[:, None]] = 0.0
    mixture = draw_mixture(400, 0.8, 0.3, seeded())
    mixed_BS, mixed_length_B = mix(wave_BS, length_B, mixture)
    is_same_B = (mixed_BS == wave_BS).all(1) & (mixed_length_B == length_B)
    assert 0.6 < float(is_same_B.float().mean()) < 0.8
    assert torch.equal(mix_targets(targets_BC, mixture)[is_same_B], targets_BC[is_same_B])
    assert float(draw_mixture(400, 0.8, 0.0, seeded()).share_B.min()) == 1.0


def test_gain_scales_each_clip_alone_within_its_bounds() -> None:
    wave_BS = torch.randn(300, 10)
    changed_BS = change_gain(wave_BS, 6.0, seeded())
    ratio_BS = changed_BS / wave_BS
    assert float((ratio_BS / ratio_BS[:, :1] - 1).abs().max()) < 1e-5
    decibels_B = 20 * ratio_BS[:, 0].log10()
    assert -6.0 <= float(decibels_B.min()) < -5.5
    assert 5.5 < float(decibels_B.max()) <= 6.0
    assert torch.equal(change_gain(wave_BS, 0.0, seeded()), wave_BS)


def spans(is_masked: Tensor) -> int:
    """How many separate runs of True there are."""
    return int(is_masked[0]) + int((is_masked[1:] & ~is_masked[:-1]).sum())


def test_masks_are_bounded_spans_of_the_mean_inside_the_clip() -> None:
    fbank_BTF = torch.ones(200, 200, 128)
    frames_B = torch.where(torch.arange(200) % 2 == 0, 200, 80)
    masked_BTF = mask_spectrogram(fbank_BTF, frames_B, (3, 0.1), (2, 24), seeded())
    assert set(masked_BTF.unique().tolist()) == {0.0, 1.0}
    in_time_BT, in_band_BF = (masked_BTF == 0).all(2), (masked_BTF == 0).all(1)
    assert not in_time_BT[frames_B == 80, 80:].any()  # nothing is spent on padding
    for clip in range(200):
        assert spans(in_time_BT[clip]) <= 3
        assert spans(in_band_BF[clip]) <= 2
        assert int(in_time_BT[clip].sum()) <= 3 * (0.1 * int(frames_B[clip]) + 1)
        assert int(in_band_BF[clip].sum()) <= 2 * 25
        both = in_time_BT[clip][:, None] | in_band_BF[clip][None, :]
        assert torch.equal(masked_BTF[clip] == 0, both)
    assert max(spans(one) for one in in_time_BT) == 3
    assert max(spans(one) for one in in_band_BF) == 2


def test_no_masks_leave_the_filterbank_as_it_is() -> None:
    fbank_BTF = torch.randn(3, 50, 128)
    frames_B = torch.tensor([50, 40, 10])
    for masks in (((0, 0.5), (0, 64)), ((1, 0.0), (1, 0))):
        assert torch.equal(mask_spectrogram(fbank_BTF, frames_B, *masks, seeded()), fbank_BTF)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "roll": lambda x, g: roll(x[..., 0], torch.tensor([90, 50, 100]), 30, g),
    "gain": lambda x, g: change_gain(x[..., 0], 6.0, g),
    "masks": lambda x, g: mask_spectrogram(x, torch.tensor([90, 50, 100]), (2, 0.3), (2, 4), g),
    "mixup": lambda x, g: mix(x, torch.tensor([90, 50, 100]), draw_mixture(3, 0.8, 0.9, g))[0],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_seed_reproduces_the_augmentation_and_another_changes_it(name: str) -> None:
    values, augment = torch.randn(3, 100, 8), AUGMENTATIONS[name]
    first = augment(values, seeded(1))
    assert torch.equal(augment(values, seeded(1)), first)
    assert not torch.equal(augment(values, seeded(2)), first)


@pytest.mark.parametrize("name", ["roll", "gain", "masks"])
def test_batch_mates_do_not_change_a_clip(name: str) -> None:
    values, augment = torch.randn(3, 100, 8), AUGMENTATIONS[name]
    others = torch.randn(3, 100, 8)
    others[1] = values[1]
    assert torch.equal(augment(values, seeded())[1], augment(others, seeded())[1])


def test_a_roll_is_a_circle_of_the_clip_and_leaves_padding() -> None:
    wave_BS = torch.arange(1, 13).float().expand(64, -1).clone()
    wave_BS[:, 10:] = 0
    rolled_BS = roll(wave_BS, torch.full((64,), 10), 3, seeded())
    shifts = set()
    for row in rolled_BS:
        shift = int((row == 1).nonzero())
        assert torch.equal(row[:10], wave_BS[0, :10].roll(shift))
        assert not row[10:].any()
        shifts.add(shift)
    assert shifts == {0, 1, 2, 3, 7, 8, 9}
