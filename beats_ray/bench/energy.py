"""Energy of a step on an NVIDIA card, by the counter of the driver (NVML), idle power included.

It needs the package nvidia-ml-py. Cards before Volta, slices of a card (MIG) and some containers have no counter.
"""

import importlib.util
import time
from collections.abc import Callable

ENERGY_SECONDS = 2.0
"""How long a step is repeated between two readings; the counter moves ten to fifty times a second."""


def energy_counter(device: str) -> Callable[[], float] | None:
    """What reads the joules that the current CUDA device has used so far; None where nothing counts them."""
    if device != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import torch

    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")  # whatever CUDA_VISIBLE_DEVICES numbers it
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # this card does not tell: the column stays empty
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0


def joules_per_clip(
    step: Callable[[], object],
    clips: int,
    read_joules: Callable[[], float],
    seconds: float = ENERGY_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Repeats `step`, which must end with its work done, for so many seconds, and returns the joules of a clip."""
    before, started, steps = read_joules(), clock(), 0
    while clock() - started < seconds:
        step()
        steps += 1
    return (read_joules() - before) / (steps * clips)
