"""`beats-ray bench gpu`: what a GPU does, in one go of seven minutes; the table comes last.

    make bench-gpu                              # in the environment of this repository
    make bench-gpu PYTHON=/opt/conda/bin/python # or in one that a machine brings along
    beats-ray bench gpu device=cpu preset=tiny clips=2 seconds=2 repetitions=1 warmup=1 minutes=30    # a rehearsal

The parts come in the order of what they are worth. What is not measured when the time (`minutes`) is up is named, and
the status is then 1, as where a part fails.
"""

import json
import time
from dataclasses import asdict
from typing import Any

from beats_ray.bench.floor import show_floors
from beats_ray.bench.measure import Failed, Measured, measure
from beats_ray.bench.profile import Profile, profile_apart, show_profile
from beats_ray.bench.run import describe, figures, name_failures, reference_of, report, say_nothing
from beats_ray.config import BenchConfig
from beats_ray.console import Console

PARTS: dict[str, int] = {"pretrain": 64, "ceilings": 32, "profile": 64, "finetune": 32, "encoder": 32, "tokenize": 64,
                         "fbank": 256, "padding": 32, "compiled": 32}  # fmt: skip
"""The parts and their clips of 10 s, which the base encoder and the published formula fit into 80 GB with."""


def part_of(config: BenchConfig, name: str) -> BenchConfig:
    """The settings of one part."""
    return config.model_copy(update={"name": name, "clips": config.clips or PARTS[name]})


def run_suite(config: BenchConfig, console: Console, as_json: bool = False) -> int:
    """Measures all parts and prints them, or one JSON object; returns the exit status."""
    tell = say_nothing if as_json else console.note
    deadline = time.monotonic() + 60.0 * config.minutes
    found: dict[str, tuple[list[Measured], list[Failed]]] = {}
    profile: Profile | str = ""
    for name in PARTS:
        part = part_of(config, name)
        tell(f"bench {name}: {describe(part)}")
        if name == "profile":
            profile = profile_apart(part, deadline)
        else:
            found[name] = measure(part, tell, deadline)
    failed = [Failed(f"{name}: {one.case}", one.reason) for name, (_, lost) in found.items() for one in lost]
    failed += [Failed("profile", profile)] if isinstance(profile, str) else []
    if as_json:
        print(json.dumps(_as_json(config, found, profile, failed)))
    else:
        _show(config, found, profile, console)
        name_failures(failed, console)
        console.table(*_joint_table(config, found))
    return 1 if failed else 0


def _as_json(
    config: BenchConfig, found: dict[str, tuple[list[Measured], list[Failed]]], profile: Profile | str,
    failed: list[Failed],
) -> dict[str, Any]:  # fmt: skip
    parts = {name: report(part_of(config, name), *results) for name, results in found.items()}
    return {
        "config": config.model_dump(mode="json"),
        "device": device_name(config.device),
        "parts": parts,
        "profile": None if isinstance(profile, str) else asdict(profile),
        "failed": [asdict(one) for one in failed],
    }


def device_name(device: str) -> str:
    """As CUDA gives it."""
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def _show(
    config: BenchConfig, found: dict[str, tuple[list[Measured], list[Failed]]], profile: Profile | str, console: Console
) -> None:
    if not isinstance(profile, str):
        show_profile(profile, console)
    measured, lost = found["ceilings"]
    if len(measured) > 2 and not lost:
        show_floors(measured, console, by_cpu_time=config.device == "cpu")


def _joint_table(
    config: BenchConfig, found: dict[str, tuple[list[Measured], list[Failed]]]
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of all parts, each beside its own reference."""
    titles = (
        "case", "ms/step, median", "clips/s", "MFU", "J/clip", "beside", "time, ratio", "peak MiB", "memory, ratio"
    )  # fmt: skip
    rows: list[list[str]] = []
    for name, (measured, _) in found.items():
        if name == "ceilings" or not measured:
            continue
        part = part_of(config, name)
        columns = {
            "time, ratio" if title.startswith("time / ") else title: values
            for title, values in figures(part, measured).items()
        }
        columns.setdefault("beside", [reference_of(part, one.case) for one in measured])
        nothing = ["-"] * len(measured)
        cells = zip(*(columns.get(title, nothing) for title in titles), strict=True)
        rows += ([name, str(part.num_clips), *row] for row in cells)
    where = f"{device_name(config.device)}, {config.preset} encoder, {config.precision}, {config.seconds:g} s"
    return f"bench gpu: {where}", ["bench", "clips", *titles], rows
