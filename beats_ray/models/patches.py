"""The time-major grid of patches: cutting a filterbank into it, and moving rows of features in and out of it.

Shapes: B clips, T frames, F mel bins, R time steps of the grid, C patches along frequency, N = R x C patches,
P values in a patch, M kept patches, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beats_ray.models.config import EncoderConfig
from beats_ray.models.fbank import CountT, num_frames, num_patch_rows, zero_past_end

SILENT_RANGE = 1e-4
"""Normalised log-mel values that differ by less are the same up to rounding."""


def patchify(fbank_BTF: Tensor, num_frames_B: Tensor | None = None, patch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Cuts normalised filterbanks into square patches, time step by time step, low frequencies first.

    Returns patches_BNP (values in the order of a 2-D convolution's weight) and is_pad_BN. A rest under one patch at a
    clip's end is dropped, as in the release; a clip of 1-15 frames is filled up with zeros to one time step.
    """
    if fbank_BTF.dim() != 3 or fbank_BTF.shape[2] % patch_size:
        raise ValueError(
            f"fbank has shape {tuple(fbank_BTF.shape)}; it must be (clips, frames, mel bins), bins a multiple of "
            f"{patch_size}: use beats_ray.models.compute_fbank"
        )
    frames, bins = fbank_BTF.shape[1:]
    columns = bins // patch_size
    if num_frames_B is not None:
        fbank_BTF = zero_past_end(fbank_BTF, num_frames_B)
    if frames < patch_size:
        fbank_BTF = F.pad(fbank_BTF, (0, 0, 0, patch_size - frames))
    # (clips, time steps, columns, frames of a patch, bins of a patch)
    grid = fbank_BTF.unfold(1, patch_size, patch_size).unflatten(2, (columns, patch_size)).transpose(3, 4)
    patches_BNP = grid.flatten(3).flatten(1, 2)
    if num_frames_B is None:
        return patches_BNP, torch.zeros(patches_BNP.shape[:2], dtype=torch.bool, device=fbank_BTF.device)
    return patches_BNP, _padding(num_frames_B.to(fbank_BTF.device), patches_BNP.shape[1], patch_size, columns)


def silent_patches(fbank_BTF: Tensor, patch_size: int = 16) -> Tensor:
    """Returns is_silent_BN: patches whose values are all the same, as digital silence makes them, and padding."""
    patches_BNP, _ = patchify(fbank_BTF, patch_size=patch_size)
    return patches_BNP.amax(-1) - patches_BNP.amin(-1) < SILENT_RANGE


def grid_patches(num_samples: CountT, config: EncoderConfig) -> CountT:
    """Patches of a clip of so many samples, or of each of several, in the grid of an encoder."""
    patches: Any = num_patch_rows(num_frames(num_samples), config.patch_size) * config.patches_per_row
    return patches


def count_patches(num_samples_B: Tensor | None, config: EncoderConfig) -> int | None:
    """Patches of all clips of so many samples together, on the CPU; None of None."""
    return None if num_samples_B is None else int(grid_patches(num_samples_B, config).sum())


def patch_padding(num_frames_B: Tensor, frames: int, patch_size: int = 16, columns: int = 8) -> Tensor:
    """Returns is_pad_BN, True at padding, of the grid that a batch of so many frames is cut into."""
    return _padding(num_frames_B, max(frames // patch_size, 1) * columns, patch_size, columns)


def _padding(num_frames_B: Tensor, num_patches: int, patch_size: int, columns: int) -> Tensor:
    rows_B = num_patch_rows(num_frames_B, patch_size)
    return torch.arange(num_patches, device=num_frames_B.device) >= (rows_B * columns).unsqueeze(1)


def release_patch_padding(padding_mask_BS: Tensor, frames: int, num_patches: int) -> Tensor:
    """Returns is_pad_BN as the released code derives it from a mask of samples.

    It cuts the sample mask into as many equal runs as there are frames, then the frame mask into as many as there are
    patches, and calls a run padding when all of it is. Patch n is thus judged by two frames near it, not by its own
    sixteen: at a clip's end the last patches along frequency may count as padding while the first ones do not.
    """
    is_pad = padding_mask_BS
    for runs in (frames, num_patches):
        is_pad = is_pad[:, : is_pad.shape[1] - is_pad.shape[1] % runs].unflatten(1, (runs, -1)).all(-1)
    return is_pad


def take_patches(features_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Gathers rows by grid index; a negative index yields row 0 of its clip, to be masked by the caller."""
    batch, patches, width = features_BND.shape
    offset_B1 = torch.arange(batch, device=index_BM.device).unsqueeze(1) * patches
    flat = (index_BM.clamp(min=0) + offset_B1).reshape(-1)
    return features_BND.reshape(-1, width).index_select(0, flat).view(batch, -1, width)


def put_patches(features_BMD: Tensor, index_BM: Tensor, num_patches: int) -> Tensor:
    """Scatters rows to their grid index in a grid of zeros; rows with a negative index are dropped."""
    batch, _, width = features_BMD.shape
    spare = num_patches + 1  # one more row a clip takes what is dropped
    offset_B1 = torch.arange(batch, device=index_BM.device).unsqueeze(1) * spare
    flat = (torch.where(index_BM < 0, num_patches, index_BM) + offset_B1).reshape(-1)
    return scatter_rows(features_BMD.reshape(-1, width), flat, (batch, spare))[:, :num_patches]


def scatter_rows(features_RD: Tensor, place_R: Tensor, shape: tuple[int, int]) -> Tensor:
    """Puts each of R rows to its place in the flattened grid of this shape (clips, places): (clips, places, D)."""
    clips, places = shape
    width = features_RD.shape[1]
    grid = features_RD.new_zeros(clips * places, width).index_copy_(0, place_R, features_RD)
    return grid.view(clips, places, width)
