"""How far each stage is from what the device could do: its FLOPs and bytes by formula over the measured ceilings.

    beats-ray bench ceilings clips=4 repetitions=2 rounds=1

The floor of a step is the longer of two times: its FLOPs at the rate of a large matrix product, and its bytes at the
rate of a copy in memory, both measured in the same run. A stage under its floor would show a wrong formula.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from beats_ray.console import Console

if TYPE_CHECKING:
    from beats_ray.bench.run import Measured


@dataclass(frozen=True)
class Floor:
    """One stage, per clip."""

    case: str
    gflop: float
    mib: float
    floor_ms: float
    bound_by: Literal["compute", "memory"]
    measured_ms: float

    @property
    def reached(self) -> float:
        """Share of the possible speed."""
        return self.floor_ms / self.measured_ms


def find_floors(measured: "list[Measured]") -> list[Floor]:
    """Of all cases after the first two, which are the ceilings: a matrix product and a copy."""
    flops_per_ms, bytes_per_ms = _ceilings(measured)
    floors = []
    for one in measured[2:]:
        assert one.cost is not None, one.case
        compute_ms, memory_ms = one.cost.flops / flops_per_ms, one.cost.bytes / bytes_per_ms
        floors.append(
            Floor(
                case=one.case,
                gflop=one.cost.flops / 1e9 / one.clips_per_step,
                mib=one.cost.bytes / 2**20 / one.clips_per_step,
                floor_ms=max(compute_ms, memory_ms) / one.clips_per_step,
                bound_by="compute" if compute_ms >= memory_ms else "memory",
                measured_ms=one.median_ms / one.clips_per_step,
            )
        )
    return floors


def show_floors(measured: "list[Measured]", console: Console) -> None:
    """Prints the ceilings, then every stage beside its floor."""
    flops_per_ms, bytes_per_ms = _ceilings(measured)
    console.note(
        f"ceilings: {flops_per_ms / 1e6:,.0f} GFLOP/s in a matrix product, {bytes_per_ms / 1e6:,.1f} GB/s copied"
    )
    rows = [
        (
            one.case,
            _three_digits(one.gflop),
            _three_digits(one.mib),
            _three_digits(one.floor_ms),
            one.bound_by,
            _three_digits(one.measured_ms),
            f"{one.reached:.0%}",
        )
        for one in find_floors(measured)
    ]
    columns = ["a clip", "GFLOP", "MiB", "floor, ms", "bound by", "measured, ms", "of what is possible"]
    console.table("bench ceilings", columns, rows)


def _ceilings(measured: "list[Measured]") -> tuple[float, float]:
    """(FLOP, bytes) in a millisecond. The fastest repetitions count: a ceiling is what was possible."""
    product, copy = measured[:2]
    assert product.cost is not None
    assert copy.cost is not None
    return product.cost.flops / min(product.step_ms), copy.cost.bytes / min(copy.step_ms)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
