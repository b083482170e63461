"""What the layers of a stack work on: every place of a padded batch, or the real patches alone, packed.

Packed patches of all clips lie one after the other, so that norms, projections and feed-forward blocks, most of a
layer's work, spend nothing on padding; attention alone sees the batch with its padding.

Shapes: B clips, N places of a clip, D width; R patches that enter a layer, W those that leave it; Q places of a clip
from `first` on, N where that is 0.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from beats_ray.models.patches import scatter_rows

PACKED_BELOW = 0.9
"""Patches are packed where less than this share of the places is real."""


def count_real(is_pad_BN: Tensor, known: int | None = None) -> int | None:
    """How many patches are no padding, which a CPU counts and elsewhere the host knows, or does not: None.

    None while PyTorch compiles too, which makes one program for all batches. Raises ValueError where what is known is
    not so, on a CPU; elsewhere it is believed, because to look would make the host wait.
    """
    if torch.compiler.is_compiling():
        return None
    if is_pad_BN.device.type != "cpu":
        return known
    counted = int((~is_pad_BN).sum())
    if known not in (None, counted):
        raise ValueError(f"num_real={known}, but {counted} patches of the batch are no padding; leave it out, or count")
    return counted


@dataclass(frozen=True)
class PaddedLayout:
    """Every place of the batch: what enters a layer has the shape (B, N, D), what leaves it (B, Q, D)."""

    first: int = 0
    """The first place of a clip that leaves the layer."""

    def pack(self, x_BND: Tensor) -> Tensor:
        """What enters the first layer, of a batch."""
        return x_BND

    def wanted(self, x_BND: Tensor) -> Tensor:
        """Of what enters a layer that which leaves it."""
        return x_BND[:, self.first :]

    def grid(self, x_BND: Tensor) -> Tensor:
        """What enters the layer as (B, N, D)."""
        return x_BND

    def wanted_grid(self, x_BQD: Tensor) -> Tensor:
        """What leaves the layer as (B, Q, D)."""
        return x_BQD

    def from_wanted_grid(self, x_BQD: Tensor) -> Tensor:
        """What `wanted_grid` was given."""
        return x_BQD

    def of_clips(self, value_B: Tensor) -> Tensor:
        """The value of its clip for each patch that leaves the layer, to be broadcast along the width."""
        return value_B.view(-1, 1, 1)


@dataclass(frozen=True)
class PackedLayout:
    """The real patches alone: what enters a layer has the shape (R, D), what leaves it (W, D)."""

    shape: tuple[int, int]
    """B and N."""
    place_R: Tensor
    """Place of each patch in the flattened batch, ascending."""
    wanted_place_W: Tensor
    """Place of each patch that leaves the layer in the flattened (B, Q), ascending."""
    first: int = 0
    wanted_W: Tensor | None = None
    """Which of the patches leave the layer; all where None."""

    @classmethod
    def of(cls, is_pad_BN: Tensor, num_real: int) -> Self:
        """All patches that are no padding, of which the host knows the number."""
        place_R = _indices(~is_pad_BN.flatten(), num_real)
        return cls((is_pad_BN.shape[0], is_pad_BN.shape[1]), place_R, wanted_place_W=place_R)

    def from_place(self, first: int, num_wanted: int) -> "PackedLayout":
        """The same where only the patches from the place `first` of a clip on, so many in all, leave the layer."""
        places = self.shape[1]
        wanted_W = _indices(self.place_R % places >= first, num_wanted)
        place_W = self.place_R.index_select(0, wanted_W)
        place_W = place_W // places * (places - first) + place_W % places - first
        return PackedLayout(self.shape, self.place_R, place_W, first, wanted_W)

    def pack(self, x_BND: Tensor) -> Tensor:
        """What enters the first layer, of a batch."""
        return x_BND.flatten(0, 1).index_select(0, self.place_R)

    def wanted(self, x_RD: Tensor) -> Tensor:
        """Of what enters a layer that which leaves it."""
        return x_RD if self.wanted_W is None else x_RD.index_select(0, self.wanted_W)

    def grid(self, x_RD: Tensor) -> Tensor:
        """What enters the layer as (B, N, D), zeros at padding."""
        return scatter_rows(x_RD, self.place_R, self.shape)

    def wanted_grid(self, x_WD: Tensor) -> Tensor:
        """What leaves the layer as (B, Q, D), zeros at padding."""
        return scatter_rows(x_WD, self.wanted_place_W, (self.shape[0], self.shape[1] - self.first))

    def from_wanted_grid(self, x_BQD: Tensor) -> Tensor:
        """What `wanted_grid` was given."""
        return x_BQD.flatten(0, 1).index_select(0, self.wanted_place_W)

    def of_clips(self, value_B: Tensor) -> Tensor:
        """The value of its clip for each patch that leaves the layer, to be broadcast along the width."""
        return value_B[self.wanted_place_W // (self.shape[1] - self.first)].unsqueeze(1)


Layout = PaddedLayout | PackedLayout
EVERY_PLACE = PaddedLayout()


def _indices(chosen: Tensor, count: int) -> Tensor:
    """Where a vector is true, which the host knows to be at so many places: it does not wait for the device."""
    return chosen.nonzero_static(size=count).squeeze(1)
