"""Runs a benchmark and prints its cases side by side."""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from beats_ray.bench.cases import BENCHES, patches_of_clip
from beats_ray.bench.floor import find_floors, show_floors
from beats_ray.bench.measure import Failed, Measured, cases_of, measure
from beats_ray.config import BenchConfig, ConfigError
from beats_ray.console import Console
from beats_ray.launch import check_answers

FEWEST_STEPS = 3
"""Below this a table says that its ratios are worth little."""


def run_bench(config: BenchConfig, console: Console, as_json: bool = False) -> int:
    """Measures every case of `config.name` and prints a table, or one JSON object; returns the exit status.

    Each case is set beside its reference, which is the first one unless it says otherwise. A case that fails is named
    after the figures of the others, and the status is 1.
    """
    check_settings(config)
    if config.name == "gpu":
        from beats_ray.bench.suite import run_suite

        return run_suite(config, console, as_json)
    if config.name == "profile":
        from beats_ray.bench.profile import run_profile

        return run_profile(config, console, as_json)
    tell = say_nothing if as_json else console.note
    _, lacking = cases_of(config)
    tell(f"bench {config.name}: {describe(config)}")
    for reason, names in lacking.items():
        tell(f"left out, {reason}: {'; '.join(names)}")
    measured, failed = measure(config, tell)
    if as_json:
        print(json.dumps({"config": config.model_dump(mode="json")} | report(config, measured, failed)))
    else:
        _show(config, measured, console)
        name_failures(failed, console)
    return 1 if failed else 0


def describe(config: BenchConfig) -> str:
    """What is measured, and on what, in one line."""
    threads = f", {_count(config.threads, 'thread')}" if config.device == "cpu" else ""
    clips = f"{_count(config.num_clips, 'clip')} of {config.seconds:g} s"
    model = "" if config.name in ("data", "fbank") else f"{config.preset} encoder, {_precision(config)}, "
    allocator = ", one allocator for all" if config.same_allocator else ""
    return f"{model}{clips}, {config.device}{threads}{allocator}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _precision(config: BenchConfig) -> str:
    cases = BENCHES.get(config.name, ())
    return "fp32" if cases and all(case.in_fp32 for case in cases) else config.precision


def say_nothing(_text: str) -> None:
    """Where JSON is all that is printed."""


def check_settings(config: BenchConfig) -> None:
    """ConfigError for a device or a cluster that is not there, a folder without a use, and clips without a patch."""
    if config.output and config.name != "end-to-end":
        raise ConfigError(f"output={config.output}: bench {config.name} writes nothing; leave it out")
    if config.output and "RAY_ADDRESS" not in os.environ:
        raise ConfigError(
            f"output={config.output}: no cluster to join; submit it as a job, set RAY_ADDRESS, or leave output out"
        )
    if config.output:
        check_answers(os.environ["RAY_ADDRESS"], "RAY_ADDRESS")  # before clips are written
    if config.name not in ("data", "fbank") and not patches_of_clip(config):
        raise ConfigError(f"seconds={config.seconds:g}: shorter than one patch; use 0.2 or more")
    if config.device == "cuda" and not config.output:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device=cuda: no CUDA device is visible; use device=cpu, or a machine with a GPU")


def name_failures(failed: list[Failed], console: Console) -> None:
    """Says which cases failed and why."""
    for one in failed:
        console.note(f"{one.case} failed: {one.reason.rstrip()}")


def labels_per_s(config: BenchConfig, one: Measured) -> float | None:
    """Patch labels in a second, of what computes them."""
    if config.name != "tokenize":
        return None
    return one.clips_per_s * patches_of_clip(config)


def reference_of(config: BenchConfig, case: str) -> str:
    """The case that a case is set beside."""
    cases = BENCHES[config.name]
    return next(one.beside for one in cases if one.name == case) or cases[0].name


def report(config: BenchConfig, measured: list[Measured], failed: list[Failed]) -> dict[str, Any]:
    """All figures, for JSON."""
    rows = []
    for one in measured:
        derived = {"median_ms": one.median_ms, "clips_per_s": one.clips_per_s, "mfu": one.mfu}
        labels = labels_per_s(config, one)
        rows.append(asdict(one) | derived | ({} if labels is None else {"labels_per_s": labels}))
    found: dict[str, Any] = {"cases": rows, "failed": [asdict(one) for one in failed]}
    if config.name == "ceilings" and len(measured) > 2 and not failed:
        found["floors"] = [asdict(one) for one in find_floors(measured)]
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def _show(config: BenchConfig, measured: list[Measured], console: Console) -> None:
    if config.name == "ceilings":
        if [one.case for one in measured[:2]] == [case.name for case in BENCHES["ceilings"][:2]]:
            show_floors(measured, console, by_cpu_time=config.device == "cpu")
        return
    columns = figures(config, measured)
    console.table(f"bench {config.name}", list(columns), list(zip(*columns.values(), strict=True)))
    _show_parts(measured, console)
    if len(measured) > 1:
        console.note("ratio: over the row in `beside`, or else the first; above 1 takes longer, or more memory")
    few = min((len(one.step_ms) for one in measured), default=0)
    if few < FEWEST_STEPS:
        console.note(f"measured steps of a case: {few}; read no ratio from fewer than {FEWEST_STEPS}")
    if any(one.mfu is not None for one in measured):
        console.note(f"MFU: model FLOPs without what is computed twice, over {_peak(measured)}")


def _show_parts(measured: list[Measured], console: Console) -> None:
    """What a start is made of, or what one part of the work takes, in a table of its own."""
    parts = list(dict.fromkeys(part for one in measured for part in one.parts_s))
    if not parts:
        return
    rows = [
        [one.case, *(f"{statistics.median(one.parts_s[part]):.1f}" if part in one.parts_s else "-" for part in parts)]
        for one in measured
        if one.parts_s
    ]
    console.table("seconds, of parts of the start or for a trial", ["case", *parts], rows)


def _peak(measured: list[Measured]) -> str:
    peak = next((one.peak_flops for one in measured if one.peak_flops is not None), None)  # which all have
    if peak is None:
        return "the GPU's data sheet, as the workers report it"
    return f"{peak / 1e12:.3g} TFLOP/s: the GPU's data sheet, or the fastest matrix product of the run"


def figures(config: BenchConfig, measured: list[Measured]) -> dict[str, Sequence[str]]:
    """The columns of a benchmark's table; those that say nothing of any case are left out."""
    by_name = {one.case: one for one in measured}
    reference = {one.case: by_name.get(reference_of(config, one.case)) for one in measured}
    several = len({reference_of(config, one.case) for one in measured}) > 1
    ratio_title = "time, ratio" if several else f"time / {reference_of(config, measured[0].case)}" if measured else ""

    def ratio(one: Measured, of: Callable[[Measured], float]) -> str:
        beside = reference[one.case]
        return "-" if beside is None else f"{of(one) / max(of(beside), 1e-9):.2f}"

    columns: dict[str, Sequence[str]] = {
        "case": [one.case for one in measured],
        "ms/step, median": [f"{one.median_ms:.1f}" for one in measured],
        "min-max": [f"{min(one.step_ms):.1f}-{max(one.step_ms):.1f}" for one in measured],
        "start ms": [f"{statistics.median(one.start_ms):.0f}" for one in measured],
        "clips/s": [f"{one.clips_per_s:.2f}" for one in measured],
        "labels/s": ["-" if (rate := labels_per_s(config, one)) is None else f"{rate:,.0f}" for one in measured],
        "MFU": ["-" if one.mfu is None else f"{one.mfu:.1%}" for one in measured],
        "data wait": ["-" if one.data_wait is None else f"{one.data_wait:.1%}" for one in measured],
        "J/clip": ["-" if one.joules_per_clip is None else f"{one.joules_per_clip:.3g}" for one in measured],
        "beside": [reference_of(config, one.case) if several else "-" for one in measured],
        ratio_title: [ratio(one, lambda case: case.median_ms / case.clips_per_step) for one in measured],
        "peak MiB": [f"{one.peak_mib:.0f}" for one in measured],
        "memory, ratio": [ratio(one, lambda case: max(case.peak_mib, 1.0)) for one in measured],
    }
    said = {name: values for name, values in columns.items() if name == "case" or any(one != "-" for one in values)}
    if all(float(value) == 0.0 for value in said.get("start ms", ())):
        said.pop("start ms", None)
    return said
