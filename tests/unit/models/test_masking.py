"""Which patches the mask shows, hides and asks for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from beats_ray.models import PatchMask, patch_padding, sample_patch_mask

pytestmark = pytest.mark.unit


def draw(is_pad: Tensor, seed: int = 0, **options: Any) -> PatchMask:
    generator = torch.Generator().manual_seed(seed)
    return sample_patch_mask(is_pad, generator=generator, **options)


def real(index: Tensor) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in index]


PADDED = patch_padding(torch.tensor([496, 300, 40, 10, 0]), 496)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_visible_and_targets_divide_the_real_patches_of_each_clip(ratio: float, block_size: int) -> None:
    visible, target, *_ = draw(PADDED, mask_ratio=ratio, block_size=block_size)
    for clip, (seen, asked) in enumerate(zip(real(visible), real(target), strict=True)):
        count = int((~PADDED[clip]).sum())
        assert sorted(seen + asked) == list(range(count))
        assert len(seen) == round(count * (1 - ratio))
        assert seen == sorted(seen)
        assert asked == sorted(asked)


def test_indices_precede_their_padding_and_shapes_depend_on_the_grid_alone() -> None:
    for is_pad in (PADDED, torch.zeros_like(PADDED)):
        visible, target, *_ = draw(is_pad, mask_ratio=0.75)
        assert visible.shape == (5, 62)
        assert target.shape == (5, 186)
        for index in (visible, target):
            assert ((index[:, :-1] >= 0) | (index[:, 1:] < 0)).all()


def test_max_targets_takes_a_random_part_of_the_masked_patches() -> None:
    everything = draw(PADDED, mask_ratio=0.75)
    thinned = draw(PADDED, mask_ratio=0.75, max_targets=20)
    assert torch.equal(everything.visible_BM, thinned.visible_BM)
    assert thinned.target_BK.shape == (5, 20)
    for full, part in zip(real(everything.target_BK), real(thinned.target_BK), strict=True):
        assert set(part) <= set(full)
        assert len(part) == min(20, len(full))
    clips = torch.zeros(400, 248, dtype=torch.bool)
    counts = torch.bincount(draw(clips, mask_ratio=0.75, max_targets=62).target_BK.flatten(), minlength=248)
    assert counts.min() > 60  # 100 expected at every place: none is left out, none preferred
    assert counts.max() < 145


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    first = draw(PADDED, seed=3, mask_ratio=0.75)
    torch.manual_seed(2)
    assert torch.equal(first.visible_BM, draw(PADDED, seed=3, mask_ratio=0.75).visible_BM)
    assert not torch.equal(first.visible_BM, draw(PADDED, seed=4, mask_ratio=0.75).visible_BM)
    assert not torch.equal(first.visible_BM[0], draw(torch.zeros_like(PADDED), seed=3, mask_ratio=0.75).visible_BM[1])


def test_blocks_are_masked_together() -> None:
    whole = torch.zeros(8, 256, dtype=torch.bool)

    def neighbours_alike(block_size: int) -> float:
        grid = torch.zeros(8, 256)
        grid.scatter_(1, draw(whole, mask_ratio=0.75, block_size=block_size).visible_BM, 1.0)
        grid = grid.view(8, 32, 8)
        return float((grid[:, :, ::2] == grid[:, :, 1::2]).float().mean())

    assert neighbours_alike(1) < 0.75  # 0.625 by chance
    assert neighbours_alike(2) > 0.97


@pytest.mark.parametrize("options", [{"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"mask_ratio": 0.5, "block_size": 0}])
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        draw(PADDED, **options)
