"""How far each stage is from what the device could do: its FLOPs and bytes by formula over the measured ceilings.

    beats-ray bench ceilings clips=4 repetitions=2 rounds=1

The floor of a step is the longer of two times: its FLOPs at the rate of a large matrix product, and its bytes at the
rate of a copy in memory, both measured in the same run. A stage under its floor would show a wrong formula. On a CPU
the same is said by CPU time too, ceilings included, which other work on the machine does not stretch.
"""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from beats_ray.console import Console

if TYPE_CHECKING:
    from beats_ray.bench.cases import Cost
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
    reached_by_cpu_time: float
    """Share of the possible speed, floor and stage in CPU time."""

    @property
    def reached(self) -> float:
        """Share of the possible speed."""
        return self.floor_ms / self.measured_ms


def find_floors(measured: "list[Measured]") -> list[Floor]:
    """Of all cases after the first two, which are the ceilings: a matrix product and a copy."""
    ceilings, cpu_ceilings = _ceilings(measured), _ceilings(measured, by_cpu_time=True)
    floors = []
    for one in measured[2:]:
        assert one.cost is not None, one.case
        compute_ms, memory_ms = (amount / rate for amount, rate in zip(_amounts(one.cost), ceilings, strict=True))
        cpu_floor_ms = max(amount / rate for amount, rate in zip(_amounts(one.cost), cpu_ceilings, strict=True))
        floors.append(
            Floor(
                case=one.case,
                gflop=one.cost.flops / 1e9 / one.clips_per_step,
                mib=one.cost.bytes / 2**20 / one.clips_per_step,
                floor_ms=max(compute_ms, memory_ms) / one.clips_per_step,
                bound_by="compute" if compute_ms >= memory_ms else "memory",
                measured_ms=one.median_ms / one.clips_per_step,
                reached_by_cpu_time=cpu_floor_ms / statistics.median(one.cpu_ms),
            )
        )
    return floors


def _amounts(cost: "Cost") -> tuple[float, float]:
    return cost.flops, cost.bytes


def show_floors(measured: "list[Measured]", console: Console, by_cpu_time: bool) -> None:
    """Prints the ceilings, then every stage beside its floor."""
    for clock in ("wall", "CPU")[: 1 + by_cpu_time]:
        flops_per_ms, bytes_per_ms = _ceilings(measured, by_cpu_time=clock == "CPU")
        product, copy = f"{flops_per_ms / 1e6:,.0f} GFLOP/s", f"{bytes_per_ms / 1e6:,.1f} GB/s"
        console.note(f"ceilings by {clock} time: {product} in a matrix product, {copy} read and written in a copy")
    rows = []
    for one in find_floors(measured):
        figures = [one.gflop, one.mib, one.floor_ms, one.measured_ms]
        shares = [one.reached, one.reached_by_cpu_time][: 1 + by_cpu_time]
        rows.append([one.case, *map(_three_digits, figures), one.bound_by, *(f"{share:.0%}" for share in shares)])
    columns = ["a clip", "GFLOP", "MiB", "floor, ms", "measured, ms", "bound by"]
    reached = ["of what is possible", "by CPU time"][: 1 + by_cpu_time]
    console.table("bench ceilings", [*columns, *reached], rows)


def _ceilings(measured: "list[Measured]", by_cpu_time: bool = False) -> tuple[float, float]:
    """(FLOP, bytes) in a millisecond. The fastest repetitions count: a ceiling is what was possible."""
    product, copy = measured[:2]
    assert product.cost is not None
    assert copy.cost is not None
    product_ms, copy_ms = (one.cpu_ms if by_cpu_time else one.step_ms for one in (product, copy))
    return product.cost.flops / min(product_ms), copy.cost.bytes / min(copy_ms)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
