"""Runs the cases of a benchmark in turns, each in a process of its own, and prints them side by side."""

import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from beats_ray.bench.cases import BENCHES, Case, Cost, Step
from beats_ray.bench.floor import find_floors, show_floors
from beats_ray.config import BenchConfig, ConfigError
from beats_ray.console import Console

MIB = 2**20


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
    """Beyond what the process held before the model was built (CPU), or all that was allocated (GPU)."""
    clips_per_step: int
    cost: Cost | None = None
    """By formula, of a step."""

    @property
    def median_ms(self) -> float:
        """Median time of a step."""
        return statistics.median(self.step_ms)

    @property
    def clips_per_s(self) -> float:
        """Clips in a second at the median."""
        return 1000.0 * self.clips_per_step / self.median_ms


def run_bench(config: BenchConfig, console: Console, as_json: bool = False) -> list[Measured]:
    """Measures every case of `config.name` and prints a table, or one JSON object; the first case is the reference."""
    _check_device(config)
    cases = [case for case in BENCHES[config.name] if case.available()]
    left_out = [case.name for case in BENCHES[config.name] if not case.available()]
    tell = _say_nothing if as_json else console.note
    tell(f"bench {config.name}: {_describe(config)}")
    if left_out:
        tell(f"left out, package not installed: {', '.join(left_out)}")
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    starts: dict[str, list[float]] = {case.name: [] for case in cases}
    cpu_times: dict[str, list[float]] = {case.name: [] for case in cases}
    peaks = {case.name: 0.0 for case in cases}
    clips = {case.name: 0 for case in cases}
    costs: dict[str, Cost | None] = {}
    for turn in range(config.rounds):
        for case in cases:
            tell(f"round {turn + 1}/{config.rounds}: {case.name}")
            found = _in_a_process(case, config)
            times[case.name] += found["step_ms"]
            starts[case.name] += found["start_ms"]
            cpu_times[case.name] += found["cpu_ms"]
            peaks[case.name] = max(peaks[case.name], found["peak_mib"])
            clips[case.name] = found["clips"]
            costs[case.name] = found["cost"]
    measured = [
        Measured(name, times[name], starts[name], cpu_times[name], peaks[name], clips[name], costs[name])
        for name in (case.name for case in cases)
    ]
    _show(config, measured, console, as_json)
    return measured


def _describe(config: BenchConfig) -> str:
    threads = f", {config.threads} threads" if config.device == "cpu" else ""
    clips = f"{config.num_clips} clips of {config.seconds:g} s"
    has_model = config.name in ("ceilings", "checkpoint", "encoder", "pretrain")
    model = f"{config.preset} encoder, {config.precision}, " if has_model else ""
    return f"{model}{clips}, {config.device}{threads}"


def _say_nothing(_text: str) -> None:
    return None


def _check_device(config: BenchConfig) -> None:
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device=cuda: no CUDA device is visible; use device=cpu, or a machine with a GPU")


def _show(config: BenchConfig, measured: list[Measured], console: Console, as_json: bool) -> None:
    reference = measured[0]
    if as_json:
        rows = [asdict(one) | {"median_ms": one.median_ms, "clips_per_s": one.clips_per_s} for one in measured]
        floors = {"floors": [asdict(one) for one in find_floors(measured)]} if config.name == "ceilings" else {}
        print(json.dumps({"config": config.model_dump(mode="json"), "cases": rows} | floors))
        return
    if config.name == "ceilings":
        show_floors(measured, console, by_cpu_time=config.device == "cpu")
        return
    table = [
        (
            one.case,
            f"{one.median_ms:.1f}",
            f"{min(one.step_ms):.1f}-{max(one.step_ms):.1f}",
            f"{statistics.median(one.start_ms):.0f}",
            f"{one.clips_per_s:.2f}",
            f"{one.median_ms / reference.median_ms:.2f}",
            f"{one.peak_mib:.0f}",
            f"{one.peak_mib / max(reference.peak_mib, 1.0):.2f}",
        )
        for one in measured
    ]
    columns = [
        "case",
        "ms/step, median",
        "min-max",
        "start ms",
        "clips/s",
        f"time / {reference.case}",
        "peak MiB",
        "memory, ratio",
    ]
    console.table(f"bench {config.name}", columns, table)


def _in_a_process(case: Case, config: BenchConfig) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure, args=(sender, config, case.name))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"bench {config.name}: case {case.name!r} ended with status {process.exitcode} (-9: out of memory); "
            "lower clips or seconds"
        ) from None
    process.join()
    return dict(found)


def _measure(sender: Any, config: BenchConfig, name: str) -> None:
    """In the case's process: build, warm up, repeat."""
    import torch

    case = next(one for one in BENCHES[config.name] if one.name == name)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    before = _peak_bytes(config)
    step = case.build(config)
    clips = config.num_clips
    timed = [_timed(step, config) for _ in range(config.warmup + config.repetitions)][config.warmup :]
    times, starts, cpu_times = (list(column) for column in zip(*timed, strict=True))
    sender.send(
        {
            "step_ms": times,
            "start_ms": starts,
            "cpu_ms": cpu_times,
            "peak_mib": (_peak_bytes(config) - before) / MIB,
            "clips": clips,
            "cost": None if case.cost is None else case.cost(config),
        }
    )
    sender.close()


def _timed(step: Step, config: BenchConfig) -> tuple[float, float, float]:
    """Milliseconds of the work, of the start before it, and of CPU time in both."""
    started, cpu_started = time.perf_counter(), time.process_time()
    start = step() or 0.0
    if config.device == "cuda":
        import torch

        torch.cuda.synchronize()
    cpu = time.process_time() - cpu_started
    return (time.perf_counter() - started - start) * 1000.0, start * 1000.0, cpu * 1000.0


def _peak_bytes(config: BenchConfig) -> int:
    if config.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
