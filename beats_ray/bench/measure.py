"""Measures the cases of a benchmark in turns, in processes of their own.

On the CPU each case has one, so that its peak memory is its own; a step of ours allocates as a worker does, what it is
compared with as Python starts it, unless its name or `same_allocator` says otherwise. On CUDA those of a benchmark
share one, which saves most of a short run: the device's memory is counted from where a case begins, and what was
compiled is forgotten.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from beats_ray.bench.cases import BENCHES, Case, Cost, Observation, Step
from beats_ray.bench.energy import energy_counter, joules_per_clip
from beats_ray.bench.processes import Lost, Send, messages_from
from beats_ray.config import BenchConfig, ConfigError
from beats_ray.launch import allocator_environment

MIB = 2**20
CEILING_REPETITIONS = 5


@dataclass(frozen=True)
class Measured:
    """One case: times of its steps over all rounds, and the most memory that a step needed."""

    case: str
    step_ms: list[float]
    """Without the start."""
    start_ms: list[float]
    """Until the first result, where a step has one before its end."""
    cpu_ms: list[float]
    """CPU time of the process in each step, of all threads: what other work on the machine does not change."""
    peak_mib: float
    """Beyond what the process held before the model was built (CPU), or was allocated then (GPU)."""
    clips_per_step: int
    cost: Cost | None = None
    """By formula, of a step."""
    peak_flops: float | None = None
    """FLOP/s of the device at most: by its data sheet where it is known, else of a large matrix product."""
    joules_per_clip: float | None = None
    """On NVIDIA cards that count it."""
    data_wait: float | None = None
    """Share of the time in which training stood still for data."""
    told_mfu: float | None = None
    """As the training processes of a whole run report it."""
    parts_s: dict[str, list[float]] = field(default_factory=dict)
    """Of the start, or what one trial takes, seconds."""

    @property
    def median_ms(self) -> float:
        """Median time of a step."""
        return statistics.median(self.step_ms)

    @property
    def clips_per_s(self) -> float:
        """Clips in a second at the median."""
        return 1000.0 * self.clips_per_step / self.median_ms

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the device does at most; None where nobody knows both."""
        if self.cost is None or self.peak_flops is None:
            return self.told_mfu
        return self.cost.flops / (self.median_ms / 1000.0) / self.peak_flops


@dataclass(frozen=True)
class Failed:
    """A case that gave no figures, and why."""

    case: str
    reason: str


def cases_of(config: BenchConfig) -> tuple[list[Case], dict[str, list[str]]]:
    """The cases that were chosen and can run here, and for each reason why others cannot their names.

    ConfigError where a case is chosen that the benchmark has not.
    """
    cases: list[Case] = []
    lacking: dict[str, list[str]] = {}
    here = [case for case in BENCHES[config.name] if case.is_for(config)]
    chosen = config.cases or tuple(case.name for case in here if not case.asked_for)
    unknown = sorted(set(chosen) - {case.name for case in here})
    if unknown:
        known = "; ".join(case.name for case in here)
        raise ConfigError(f"cases={unknown}: bench {config.name} has no such case; choose among: {known}")
    gpus = _visible_gpus() if config.device == "cuda" and not config.output else None
    for case in (case for case in here if case.name in chosen):
        if not case.available():
            lacking.setdefault(f"package {case.package} is not installed", []).append(case.name)
        elif gpus is not None and case.workers > gpus:
            lacking.setdefault(f"more GPUs needed than the {gpus} visible", []).append(case.name)
        elif config.output and not case.joins_a_cluster:
            lacking.setdefault("on a cluster of its own without output", []).append(case.name)
        else:
            cases.append(case)
    return cases, lacking


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def measure(
    config: BenchConfig,
    tell: Callable[[str], None],
    deadline: float | None = None,
) -> tuple[list[Measured], list[Failed]]:
    """Every case that can run here, in the order of the benchmark, and those that failed in any round.

    deadline: on the clock of `time.monotonic`; what is not measured by then has failed.
    """
    cases, _ = cases_of(config)
    found: dict[str, list[Measured]] = {case.name: [] for case in cases}
    failed: dict[str, Failed] = {}
    for turn in range(config.rounds):
        for group in _groups([case for case in cases if case.name not in failed], config):
            if deadline is None or time.monotonic() < deadline:
                tell(f"round {turn + 1}/{config.rounds}: {', '.join(case.name for case in group)}")
            for one in _in_a_process(group, config, deadline):
                if isinstance(one, Failed):
                    failed[one.case] = one
                else:
                    found[one.case].append(one)
    measured = [merge_rounds(found[case.name]) for case in cases if case.name not in failed]
    return _over_one_peak(measured), list(failed.values())


def _over_one_peak(measured: list[Measured]) -> list[Measured]:
    """The same, with the fastest product of any process as the peak of all; the cases are of one precision."""
    peak = max((one.peak_flops for one in measured if one.peak_flops is not None), default=None)
    return [one if one.peak_flops is None else replace(one, peak_flops=peak) for one in measured]


def _groups(cases: list[Case], config: BenchConfig) -> list[list[Case]]:
    """The cases of each process."""
    return [cases] if cases and _device_of(config) == "cuda" else [[case] for case in cases]


def merge_rounds(rounds: list[Measured]) -> Measured:
    """One case over all rounds."""
    joules = [one.joules_per_clip for one in rounds if one.joules_per_clip is not None]
    waits = [one.data_wait for one in rounds if one.data_wait is not None]
    mfus = [one.told_mfu for one in rounds if one.told_mfu is not None]
    peaks = [one.peak_flops for one in rounds if one.peak_flops is not None]
    return Measured(
        case=rounds[0].case,
        step_ms=[value for one in rounds for value in one.step_ms],
        start_ms=[value for one in rounds for value in one.start_ms],
        cpu_ms=[value for one in rounds for value in one.cpu_ms],
        peak_mib=max(one.peak_mib for one in rounds),
        clips_per_step=rounds[0].clips_per_step,
        cost=rounds[0].cost,
        peak_flops=max(peaks, default=None),
        joules_per_clip=statistics.median(joules) if joules else None,
        data_wait=statistics.median(waits) if waits else None,
        told_mfu=statistics.median(mfus) if mfus else None,
        parts_s={name: [value for one in rounds for value in one.parts_s[name]] for name in rounds[0].parts_s},
    )


def _in_a_process(cases: list[Case], config: BenchConfig, deadline: float | None) -> Iterator[Measured | Failed]:
    """The result of each of the cases, as soon as it is there."""
    waiting = [case.name for case in cases]
    as_worker = config.same_allocator or all(case.as_worker for case in cases)
    try:
        for one in messages_from(_measure_all, (config, tuple(waiting)), deadline, allocation(config, as_worker)):
            waiting.remove(one.case)
            yield one
    except Lost as lost:  # after the last result it changes no figure
        yield from (Failed(name, str(lost)) for name in waiting)


def allocation(config: BenchConfig, as_worker: bool) -> dict[str, str | None]:
    """The variables by which a process allocates memory as our workers do, or as Python starts it: with none.

    On a GPU, whose memory is measured there, it is left as it is.
    """
    if config.device != "cpu":
        return {}
    ours = allocator_environment()
    return dict(ours) if as_worker else dict.fromkeys((*ours, "LD_PRELOAD"))


def _measure_all(send: Send, config: BenchConfig, names: tuple[str, ...]) -> None:
    """In the process of these cases."""
    for name in names:
        case = next(one for one in BENCHES[config.name] if one.name == name)
        try:
            result: Measured | Failed = measure_case(case, config)
        except Exception:  # noqa: BLE001  # it is reported, and the other cases have their turn
            result = Failed(name, traceback.format_exc())
        send(result)
        if _device_of(config) == "cuda":
            _forget()


def _forget() -> None:
    """Frees what a case left on the device, and what was compiled for its shapes."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()


def measure_case(case: Case, config: BenchConfig) -> Measured:
    """Builds the case's step, warms up, and repeats it."""
    import torch

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    before = _begin_memory(config)
    step = case.build(config)
    for _ in range(config.warmup):
        _timed(step, config)
    timed = [_timed(step, config) for _ in range(config.repetitions)]
    peak_mib = (_peak_bytes(config) - before) / MIB
    observed = [one.observed for one in timed if one.observed is not None]
    waits = [one.data_wait for one in observed if one.data_wait is not None]
    mfus = [one.mfu for one in observed if one.mfu is not None]
    read_joules = None if observed else energy_counter(config.device)
    cost = None if case.cost is None else case.cost(config)
    return Measured(
        case=case.name,
        step_ms=[one.step_ms for one in timed],
        start_ms=[one.start_ms for one in timed],
        cpu_ms=[one.cpu_ms for one in timed],
        peak_mib=max((one.peak_mib for one in observed), default=peak_mib),
        clips_per_step=observed[0].clips if observed else config.num_clips,
        cost=cost,
        peak_flops=_most_flops(case, config) if cost is not None and config.name != "ceilings" else None,
        joules_per_clip=joules_per_clip(lambda: _timed(step, config), config.num_clips, read_joules)
        if read_joules
        else None,
        data_wait=statistics.median(waits) if waits else None,
        told_mfu=statistics.median(mfus) if mfus else None,
        parts_s={name: [one.parts_s[name] for one in observed] for name in observed[0].parts_s} if observed else {},
    )


@dataclass(frozen=True)
class _Timed:
    step_ms: float
    start_ms: float
    cpu_ms: float
    observed: Observation | None


def _timed(step: Step, config: BenchConfig) -> _Timed:
    """Milliseconds of the work, of the start before it, and of CPU time in both."""
    started, cpu_started = time.perf_counter(), time.process_time()
    told = step()
    if _device_of(config) == "cuda":
        import torch

        torch.cuda.synchronize()
    cpu_ms = (time.process_time() - cpu_started) * 1000.0
    if isinstance(told, Observation):
        return _Timed(told.seconds * 1000.0, told.start_seconds * 1000.0, cpu_ms, told)
    start = told or 0.0
    return _Timed((time.perf_counter() - started - start) * 1000.0, start * 1000.0, cpu_ms, None)


def _device_of(config: BenchConfig) -> str:
    """Where this process computes: end-to-end leaves that to its workers, which may be on other machines."""
    return "cpu" if config.name == "end-to-end" else config.device


def _begin_memory(config: BenchConfig) -> int:
    """Bytes that are held already."""
    if _device_of(config) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _peak_bytes(config)


def _peak_bytes(config: BenchConfig) -> int:
    if _device_of(config) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _most_flops(case: Case, config: BenchConfig) -> float:
    """FLOP/s that the device does at most in the case's precision."""
    from beats_ray.bench.ceiling_cases import matrix_product
    from beats_ray.bench.costs import matrix_product_cost
    from beats_ray.train.flops import peak_flops

    precision = "fp32" if case.in_fp32 else config.precision
    if config.device == "cuda":
        import torch

        published = peak_flops(torch.cuda.get_device_name(), precision)
        if published is not None:
            return published
    config = config.model_copy(update={"precision": precision})
    product = matrix_product(config)
    fastest_ms = min(_timed(product, config).step_ms for _ in range(CEILING_REPETITIONS))
    return matrix_product_cost(config).flops / (fastest_ms / 1000.0)
