"""Which rows the layers of a stack work on: every place of a padded batch, or the real patches alone, packed.

Packed rows of all clips lie one after the other, so that norms, projections and feed-forward blocks, most of a layer's
work, spend nothing on padding; attention alone sees the batch with its padding.

Shapes: B clips, N places of a clip, D width; R rows that enter a layer, W rows that leave it; Q places of a clip from
`first` on, N where that is 0.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

PACKED_BELOW = 0.9
"""Rows are packed where less than this share of the places is real: moving rows costs some time itself."""


class PaddedRows:
    """Every place of the batch is a row: rows have the shape (B, N, D), and those that leave a layer (B, Q, D)."""

    def __init__(self, first: int = 0) -> None:
        """first: the first place of a clip that leaves the layer."""
        self.first = first

    def wanted(self, rows: Tensor) -> Tensor:
        """Of the rows that enter a layer those that leave it."""
        return rows[:, self.first :]

    def grid(self, rows: Tensor) -> Tensor:
        """Rows that enter the layer as (B, N, D)."""
        return rows

    def wanted_grid(self, rows: Tensor) -> Tensor:
        """Rows that leave the layer as (B, Q, D)."""
        return rows

    def wanted_rows(self, grid_BQD: Tensor) -> Tensor:
        """The rows that `wanted_grid` came from."""
        return grid_BQD

    def of_clips(self, value_B: Tensor) -> Tensor:
        """The value of its clip for each row that leaves the layer, to be broadcast along the width."""
        return value_B.view(-1, 1, 1)


@dataclass(frozen=True)
class PackedRows:
    """The real patches alone: rows have the shape (R, D), and those that leave a layer (W, D)."""

    shape: tuple[int, int]
    """B and N."""
    place_R: Tensor
    """Place of each row in the flattened batch, ascending."""
    first: int = 0
    row_W: Tensor | None = None
    """Which of the rows leave the layer; all where None."""

    @classmethod
    def of(cls, is_pad_BN: Tensor, num_real: int) -> Self:
        """The rows of all patches that are no padding, of which the host knows the number."""
        # By a sort, which has a size that is known; a selection by a mask would make the host wait for the device.
        places = is_pad_BN.flatten().to(torch.uint8).argsort(stable=True)
        return cls((is_pad_BN.shape[0], is_pad_BN.shape[1]), places[:num_real])

    def from_place(self, first: int, num_wanted: int) -> "PackedRows":
        """The same where only the patches from the place `first` of a clip on, so many in all, leave the layer."""
        is_left_R = (self.place_R % self.shape[1] < first).to(torch.uint8)
        return PackedRows(self.shape, self.place_R, first, is_left_R.argsort(stable=True)[:num_wanted])

    def pack(self, grid_BND: Tensor) -> Tensor:
        """The rows (R, D) of a batch."""
        return grid_BND.flatten(0, 1).index_select(0, self.place_R)

    def wanted(self, rows: Tensor) -> Tensor:
        """Of the rows that enter a layer those that leave it."""
        return rows if self.row_W is None else rows.index_select(0, self.row_W)

    def grid(self, rows: Tensor) -> Tensor:
        """Rows that enter the layer as (B, N, D), zeros at padding."""
        return _spread(rows, self.place_R, self.shape)

    def wanted_grid(self, rows: Tensor) -> Tensor:
        """Rows that leave the layer as (B, Q, D), zeros at padding."""
        return _spread(rows, self._wanted_place_W(), (self.shape[0], self.shape[1] - self.first))

    def wanted_rows(self, grid_BQD: Tensor) -> Tensor:
        """The rows that `wanted_grid` came from."""
        return grid_BQD.flatten(0, 1).index_select(0, self._wanted_place_W())

    def of_clips(self, value_B: Tensor) -> Tensor:
        """The value of its clip for each row that leaves the layer, to be broadcast along the width."""
        places = self.place_R if self.row_W is None else self.place_R[self.row_W]
        return value_B[places // self.shape[1]].unsqueeze(1)

    def _wanted_place_W(self) -> Tensor:
        if self.row_W is None:
            return self.place_R
        place_W, columns = self.place_R[self.row_W], self.shape[1]
        return place_W // columns * (columns - self.first) + place_W % columns - self.first


Rows = PaddedRows | PackedRows
EVERY_PLACE = PaddedRows()


def _spread(rows: Tensor, place_R: Tensor, shape: tuple[int, int]) -> Tensor:
    clips, places = shape
    return rows.new_zeros(clips * places, rows.shape[1]).index_copy(0, place_R, rows).view(clips, places, -1)
