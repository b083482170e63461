"""Random choice of the patches that the encoder sees and of those whose labels are predicted.

Shapes: B clips, N patches of the grid, M visible patches, K targets.
Source: paper section 3.2, 75 % masked.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PatchMask(NamedTuple):
    """Grid indices, ascending, padded with -1: what the encoder sees, and whose labels are to be predicted."""

    visible_BM: Tensor
    target_BK: Tensor
    num_visible: int | None = None
    """How many patches are visible, over all clips, where the host knows it."""
    num_targets: int | None = None
    """How many are targets."""


def sample_patch_mask(
    is_pad_BN: Tensor,
    mask_ratio: float,
    generator: torch.Generator,
    block_size: int = 1,
    max_targets: int | None = None,
    *,
    patches_per_row: int = 8,
    num_real_B: Tensor | None = None,
) -> PatchMask:
    """Masks the given part of each clip's real patches; padding is never visible and never a target.

    Every real patch is visible or masked; targets are the masked patches, or `max_targets` of them at random.
    block_size: side of the squares of the grid that are masked together; 1 is the paper's.
    num_real_B: real patches of each clip, on the CPU, where they are known there; the mask has its counts then.
    M and K depend on N alone, never on the clips, so a step always has the same shapes.
    Raises ValueError for a ratio outside [0, 1) and sizes under 1.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} must be in [0, 1); the paper uses 0.75")
    if block_size < 1 or (max_targets is not None and max_targets < 1):
        raise ValueError(f"block_size={block_size} and max_targets={max_targets} must be at least 1")
    batch, patches = is_pad_BN.shape
    device = is_pad_BN.device
    noise_BN = _block_noise(batch, patches, block_size, patches_per_row, generator).to(device)
    noise_BN = noise_BN.masked_fill(is_pad_BN, torch.inf)
    rank_BN = noise_BN.argsort(dim=1).argsort(dim=1)
    keep_B1 = _num_visible(patches - is_pad_BN.sum(dim=1, keepdim=True), mask_ratio)
    num_visible, num_targets = visible_and_target_counts(patches, mask_ratio, max_targets)
    is_visible_BN = rank_BN < keep_B1
    is_target_BN = ~is_visible_BN & ~is_pad_BN
    if max_targets is not None and max_targets < patches - num_visible:
        lottery_BN = torch.rand(batch, patches, generator=generator, device=generator.device).to(device)
        place_BN = lottery_BN.masked_fill(~is_target_BN, torch.inf).argsort(dim=1).argsort(dim=1)
        is_target_BN &= place_BN < max_targets
    counts = () if num_real_B is None else _counts(num_real_B, mask_ratio, num_visible, num_targets)
    return PatchMask(_indices(is_visible_BN, num_visible), _indices(is_target_BN, num_targets), *counts)


def _num_visible(real: Tensor, mask_ratio: float) -> Tensor:
    """Visible patches of clips of so many real ones."""
    return (real * (1.0 - mask_ratio)).round().long().clamp(min=1).minimum(real)


def _counts(real_B: Tensor, mask_ratio: float, num_visible: int, num_targets: int) -> tuple[int, int]:
    """(visible, target) patches of clips of so many real ones, of which a mask holds so many a clip at most."""
    visible_B = _num_visible(real_B, mask_ratio)
    targets_B = real_B - visible_B
    return int(visible_B.clamp(max=num_visible).sum()), int(targets_B.clamp(max=num_targets).sum())


def visible_and_target_counts(patches: int, mask_ratio: float, max_targets: int | None = None) -> tuple[int, int]:
    """(visible, target) patches of a clip of so many real ones: M and K of its mask."""
    visible = max(round(patches * (1.0 - mask_ratio)), 1)
    targets = patches - visible
    return visible, targets if max_targets is None else min(targets, max_targets)


def _block_noise(batch: int, patches: int, block_size: int, columns: int, generator: torch.Generator) -> Tensor:
    if block_size == 1:
        return torch.rand(batch, patches, generator=generator, device=generator.device)
    rows = -(-patches // columns)
    blocks = (batch, -(-rows // block_size), -(-columns // block_size))
    coarse = torch.rand(blocks, generator=generator, device=generator.device)
    fine = coarse.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, :rows, :columns]
    # Patches of one block stay neighbours in rank; the last block of the budget is cut at random places.
    jitter = torch.rand(fine.shape, generator=generator, device=generator.device) * 1e-6
    return (fine + jitter).reshape(batch, -1)[:, :patches]


def _indices(chosen_BN: Tensor, count: int) -> Tensor:
    patches = chosen_BN.shape[1]
    index_N = torch.arange(patches, device=chosen_BN.device)
    ordered_BN = torch.where(chosen_BN, index_N, patches).sort(dim=1).values
    index_BM = ordered_BN[:, :count]
    return index_BM.masked_fill(index_BM == patches, -1)
