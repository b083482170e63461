"""How often to make a checkpoint, and what faults then leave of a run: the formulas of Young and Daly.

    young_interval(pause_seconds=1.6, mtbf_seconds=560)          # 42 s
    expected_goodput(600, 1.6, mtbf_seconds=560, recovery_seconds=51)

Faults come as a Poisson process and hit recoveries too; a checkpoint counts when its pause is over. Sources: Young,
"A first order approximation to the optimum checkpoint interval" (1974); Daly, "A higher order estimate of the optimum
checkpoint interval for restart dumps" (2006), equations 20 and 37.
"""

import math


def mtbf_seconds(hourly_preemption: float, nodes: int) -> float:
    """Mean time between two losses of a node of a run, in seconds; infinity where nodes are never taken away.

    hourly_preemption: the chance that one node is taken away within an hour, in [0, 1).
    """
    rate_per_hour = -nodes * math.log1p(-hourly_preemption)
    return 3600.0 / rate_per_hour if rate_per_hour else math.inf


def young_interval(pause_seconds: float, mtbf_seconds: float) -> float:
    """Young's distance between two checkpoints, in seconds of training."""
    return math.sqrt(2.0 * pause_seconds * mtbf_seconds)


def daly_interval(pause_seconds: float, mtbf_seconds: float) -> float:
    """Daly's, of a higher order: Young's where the pause is short beside the time between faults."""
    if pause_seconds >= 2.0 * mtbf_seconds:
        return mtbf_seconds
    ratio = pause_seconds / (2.0 * mtbf_seconds)
    series = 1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0
    return young_interval(pause_seconds, mtbf_seconds) * series - pause_seconds


def expected_goodput(
    interval_seconds: float, pause_seconds: float, mtbf_seconds: float, recovery_seconds: float
) -> float:
    """Share of the time that is training which counts, with a checkpoint after every `interval_seconds` of it.

    recovery_seconds: from a fault to training again, the wait for another node included.
    """
    if math.isinf(mtbf_seconds):
        return interval_seconds / (interval_seconds + pause_seconds)
    exponent = (interval_seconds + pause_seconds) / mtbf_seconds
    if exponent + recovery_seconds / mtbf_seconds > 700.0:  # the time for one interval leaves what a float holds
        return 0.0
    return interval_seconds / (mtbf_seconds * math.exp(recovery_seconds / mtbf_seconds) * math.expm1(exponent))
