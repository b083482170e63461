"""The stages that go over a data set once, `prepare` and `tokenize`, on 1, 10 and 100 times as many clips.

A step is the stage as the command runs it, on a cluster of its own on this machine. Its start ends when the stage has
gone over a few clips; actors of the labels stage are started anew for all of them, which is in the time of each row.
Labels are those of a distilled tokenizer of the run's encoder with random weights.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from beats_ray.bench.cases import Observation, Step
from beats_ray.bench.data_cases import encoded_clips, write_shards
from beats_ray.bench.end_to_end_cases import STORE_MIB, peak_memory
from beats_ray.config import BenchConfig, RaySettings

FIRST_CLIPS = 16


def prepare_stage(config: BenchConfig, times: int) -> Step:
    """Files of FLAC to a prepared data set."""
    from beats_ray.config import PrepareConfig
    from beats_ray.data.prepare import prepare

    def stage(clips: int, scratch: Path) -> Callable[[], object]:
        source = scratch / f"source-{clips}"
        source.mkdir()
        for name, encoded in encoded_clips(config.model_copy(update={"clips": clips})):
            (source / f"{name}.flac").write_bytes(encoded)
        settings = PrepareConfig(kind="unlabelled", source=str(source), output=str(scratch / f"prepared-{clips}"))
        return lambda: prepare(settings, lambda _done, _all: None)

    return _measured(stage, config.num_clips * times)


def labels_stage(config: BenchConfig, times: int) -> Step:
    """A prepared data set to patch labels."""
    from rich.console import Console as RichConsole

    from beats_ray.bench.tokenize_cases import fitted_tokenizer
    from beats_ray.config import StreamSettings, TokenizeConfig
    from beats_ray.console import Console
    from beats_ray.data.storage import open_place
    from beats_ray.inference import publish
    from beats_ray.tokenize import run_tokenize

    def stage(clips: int, scratch: Path) -> Callable[[], object]:
        tokenizer = scratch / "tokenizer"
        if not tokenizer.exists():
            publish(fitted_tokenizer(config), open_place(str(tokenizer)))
        settings = TokenizeConfig(
            output=str(scratch / f"labels-{clips}"),
            data=StreamSettings(path=write_shards(config.model_copy(update={"clips": clips}))),
            tokenizer=str(tokenizer),
            use_gpu=config.device == "cuda",
        )
        return lambda: run_tokenize(settings, Console(RichConsole(stderr=True)))  # stdout may be one JSON object

    return _measured(stage, config.num_clips * times)


def _measured(stage: Callable[[int, Path], Callable[[], object]], clips: int) -> Step:
    """stage: gives what runs it on so many clips, with a folder for whatever it needs and writes."""

    def step() -> Observation:
        from beats_ray.launch import ray_cluster

        cores = os.cpu_count() or 1
        with tempfile.TemporaryDirectory(prefix="beats-ray-bench-") as scratch, peak_memory() as peak_mib:
            first, whole = (stage(count, Path(scratch)) for count in (FIRST_CLIPS, clips))
            started = time.perf_counter()
            with ray_cluster(RaySettings(address="local", object_store_mib=STORE_MIB, num_cpus=2 * cores)):
                first()
                begun = time.perf_counter()
                whole()
                seconds = time.perf_counter() - begun
            return Observation(seconds, begun - started, clips, peak_mib())

    return step
