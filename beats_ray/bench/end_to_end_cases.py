"""The whole pipeline: shards, Ray Data's stream, Ray Train's workers, and the step of pre-training or of a tokenizer.

One step of this benchmark is one run over all clips once, on a cluster of its own on this machine, or on the one that
is there (`output`), of whose memory it sees the driver's alone. Its start ends with the first optimizer step; the time,
the data wait and the rate are those of the steps after it, but for the last, which has no next one to prepare. The
global batch is the same for up to four workers, and a micro-batch for each of more. Labels are those of the random
projection, computed on the fly.

`beats-ray bench end-to-end` holds the time of a clip on 1, 10 and 100 times as many clips against that on the first:
a pipeline that is linear gives 1. Clips are short, so that it is their number that grows and not the hours of sound.
"""

import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from beats_ray.bench.cases import Observation, Step, seeded_encoder
from beats_ray.config import BenchConfig, RaySettings
from beats_ray.data.storage import Place, open_place

MICRO_BATCHES = 4
"""Of an optimizer step, over all workers; one for each where there are more of them."""
SAMPLE_SECONDS = 1.0
STORE_MIB = 1024
RESULT_FILE = "bench.json"


Kind = Literal["pretrain", "distill"]


def pipeline(config: BenchConfig, kind: Kind = "pretrain", workers: int = 1, times: int = 1) -> Step:
    """A run with so many workers on so many times `config.num_clips` clips."""
    from beats_ray.bench.data_cases import write_shards

    step_clips = _step_clips(config, workers)
    steps = max(3, config.num_clips * times // step_clips)
    config = config.model_copy(update={"clips": steps * step_clips})
    folder = _for_all_nodes(Path(write_shards(config)), config.output)

    def step() -> Observation:
        with _output(config.output) as output, peak_memory() as peak_mib:
            settings = _run_config(config, kind, workers, steps, folder, output)
            ray_s, fit_started = _run(config, kind, settings)
            told = (output / "run" / RESULT_FILE).read_json()
            return observe(told, ray_s, fit_started, peak_mib())

    return step


def _step_clips(config: BenchConfig, workers: int) -> int:
    return max(MICRO_BATCHES, workers) * config.micro_batch_size


def _for_all_nodes(folder: Path, output: str) -> str:
    """Where every worker finds the clips: the folder itself, or its copy in `output`, made once."""
    if not output:
        return str(folder)
    copy, manifest = open_place(output) / f"clips-{folder.name}", "dataset.json"
    if not (copy / manifest).exists():  # which comes last
        (copy / "shards").upload(folder / "shards")
        (copy / manifest).write_bytes((folder / manifest).read_bytes())
    return copy.uri


@contextmanager
def _output(output: str) -> Iterator[Place]:
    """An empty folder of a run, which goes afterwards."""
    if output:
        place = open_place(output) / f"run-{uuid.uuid4().hex[:12]}"
        try:
            yield place
        finally:
            place.delete()
    else:
        with tempfile.TemporaryDirectory(prefix="beats-ray-bench-") as folder:
            yield open_place(folder)


def _run(config: BenchConfig, kind: Kind, settings: Any) -> tuple[float, float]:
    """Runs it; returns the seconds in which Ray started, and when the run was handed over (`time.time`)."""
    from beats_ray.launch import ray_cluster
    from beats_ray.train.jobs import fit_with

    started = time.time()
    cores = os.cpu_count() or 1
    address = "auto" if config.output else "local"
    cluster = RaySettings(
        address=address, object_store_mib=STORE_MIB, num_cpus=max(2 * cores, settings.train.num_workers + 3)
    )
    with ray_cluster(cluster):
        ray_s = time.time() - started
        fit_started = time.time()
        fit_with(kind, settings, partial(_worker, config.threads))
    return ray_s, fit_started


def _run_config(config: BenchConfig, kind: Kind, workers: int, steps: int, folder: str, output: Place) -> Any:
    """Of pre-training, or of a tokenizer that learns from an encoder with random weights, published in `output`."""
    from beats_ray.config import DistillConfig, PretrainConfig

    settings: type[PretrainConfig | DistillConfig] = PretrainConfig
    more: dict[str, Any] = {}
    if kind == "distill":
        settings = DistillConfig
        more = {"teacher": (output / "teacher").uri, "tokenizer": {"init_batches": 1}}  # k-means is part of the start
        publish_encoder(config, output / "teacher")
    return settings.model_validate(
        {
            "output": (output / "run").uri,
            **more,
            "data": {"path": folder, "clip_seconds": config.seconds},
            "encoder": {"preset": config.preset},
            "train": {
                "steps": steps,
                "warmup_steps": 0,
                "global_batch_size": _step_clips(config, workers),
                "micro_batch_size": config.micro_batch_size,
                "num_workers": workers,
                "use_gpu": config.device == "cuda",
                "precision": config.precision,
                "seed": config.seed,
                "log_every_steps": 1,  # the first report is that of the first step
                "checkpoint_every_steps": steps + 1,
                "max_failures": 0,
                "loggers": (),
            },
        }
    )


def publish_encoder(config: BenchConfig, place: Place) -> None:
    """Writes the run's encoder, whose weights are random, there as a published model."""
    from beats_ray.inference import publish

    publish(seeded_encoder(config.model_copy(update={"device": "cpu"})), place)


def _worker(threads: int, payload: dict[str, Any]) -> None:
    """On every worker: the run, with a note of when its reports came, which stay here until the last."""
    began = time.time()
    import torch

    from beats_ray.train.context import ray_train_context
    from beats_ray.train.worker import train

    torch.set_num_threads(threads)
    context = ray_train_context()
    steps = payload["run"].train.steps
    reports: list[dict[str, float]] = []

    def report(step: int, metrics: dict[str, float]) -> None:
        reports.append({"at": time.time(), **metrics})
        if step == steps:
            context.report(step, metrics)

    train(payload["run"], replace(context, report=report))
    if context.rank == 0:
        told = {"began": began, "reports": [{name: one[name] for name in _TOLD if name in one} for one in reports]}
        (payload["run"].output / RESULT_FILE).write_json(told)


_TOLD = ("at", "seconds", "clips", "data/wait_fraction", "perf/mfu")
"""The last where the device is one whose peak is known."""


def observe(told: dict[str, Any], ray_s: float, fit_started: float, peak_mib: float) -> Observation:
    """What the first worker's reports of a run say of its start and of the steps after the first.

    A report's `seconds` count from where the worker asked for its first batch. A step's time has the wait for the next
    step's batches in it, for which the last step has no need: it does not count.
    """
    first, *others, _ = told["reports"]
    last = others[-1]
    asked = first["at"] - first["seconds"]
    first_batch_s = first["data/wait_fraction"] * first["seconds"]
    seconds = last["seconds"] - first["seconds"]
    waits = [
        one["data/wait_fraction"] * (one["seconds"] - before["seconds"])
        for before, one in zip(told["reports"], others, strict=False)
    ]
    mfus = [one["perf/mfu"] for one in others if "perf/mfu" in one]
    parts = {
        "Ray": ray_s,
        "workers": told["began"] - fit_started,
        "model, engine": asked - told["began"],
        "first batch": first_batch_s,
        "first step": first["seconds"] - first_batch_s,
    }
    return Observation(
        seconds=seconds,
        start_seconds=sum(parts.values()),
        clips=round(last["clips"] - first["clips"]),
        peak_mib=peak_mib,
        data_wait=sum(waits) / seconds,
        parts_s=parts,
        mfu=statistics.median(mfus) if mfus else None,
    )


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives what tells the largest sum so far, MiB, of this process and all below it; shared pages count once."""
    samples_mib = [0.0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples_mib.append(sum(map(_proportional_bytes, [me, *me.children(recursive=True)])) / 2**20)

    me = psutil.Process()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: max(samples_mib)
    finally:
        done.set()
        thread.join()


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        held: int = process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return 0
    return held
