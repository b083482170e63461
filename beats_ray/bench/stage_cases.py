"""The stages that go over a data set once, `prepare`, `tokenize` and `embed`, on 1, 10 and 100 times as many clips; and
what one trial more costs a sweep, in sweeps of 4 and 16 trials of one step.

A step is the stage as the command runs it, on a cluster of its own on this machine. Its start ends when the stage has
gone over a few clips; actors that have a model are started anew for all of them, which is in the time of each row.
Labels are those of a distilled tokenizer of the run's encoder; all weights are random.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from beats_ray.bench.cases import Observation, Step
from beats_ray.bench.data_cases import encoded_clips, write_shards
from beats_ray.bench.end_to_end_cases import STORE_MIB, peak_memory, publish_encoder
from beats_ray.config import BenchConfig, RaySettings
from beats_ray.console import Console
from beats_ray.data.storage import Place, open_place

FIRST_CLIPS = 16
FIRST_TRIALS = 2
SWEEP_CLIPS = 100


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
    from beats_ray.bench.tokenize_cases import fitted_tokenizer
    from beats_ray.config import TokenizeConfig
    from beats_ray.inference import publish
    from beats_ray.tokenize import run_tokenize

    def publish_tokenizer(place: Place) -> None:
        publish(fitted_tokenizer(config), place)

    return _with_a_model(config, times, publish_tokenizer, TokenizeConfig, "tokenizer", run_tokenize)


def embed_stage(config: BenchConfig, times: int) -> Step:
    """A prepared data set to one vector a clip."""
    from beats_ray.config import EmbedConfig
    from beats_ray.embed import run_embed

    return _with_a_model(config, times, partial(publish_encoder, config), EmbedConfig, "model", run_embed)


def _with_a_model(
    config: BenchConfig,
    times: int,
    publish_model: Callable[[Place], None],
    kind: Any,
    name: str,
    run: Callable[[Any, Console], object],
) -> Step:
    """A stage whose config, of this kind, names its published model so."""
    from beats_ray.config import StreamSettings

    def stage(clips: int, scratch: Path) -> Callable[[], object]:
        model = open_place(str(scratch / "model"))
        if not model.exists():
            publish_model(model)
        settings = kind(
            output=str(scratch / f"output-{clips}"),
            data=StreamSettings(path=write_shards(config.model_copy(update={"clips": clips}))),
            use_gpu=config.device == "cuda",
            **{name: model.uri},
        )
        return lambda: run(settings, _on_stderr())

    return _measured(stage, config.num_clips * times)


def sweep_stage(config: BenchConfig, trials: int) -> Step:
    """Trials of one step on a labelled set of 100 clips, side by side as the machine allows."""
    from beats_ray.config import PrepareConfig, SweepConfig
    from beats_ray.data.prepare import prepare
    from beats_ray.data.sample import make_sample_set
    from beats_ray.tune.sweep import run_sweep

    def stage(trials: int, scratch: Path) -> Callable[[], object]:
        encoder, source, dataset = scratch / "encoder", scratch / "source", scratch / "dataset"
        if not encoder.exists():
            publish_encoder(config, open_place(str(encoder)))
            make_sample_set(source, SWEEP_CLIPS, clip_seconds=config.seconds)
        on_gpu = config.device == "cuda"
        train = {"steps": 1, "warmup_steps": 0, "global_batch_size": 16, "micro_batch_size": 16, "use_gpu": on_gpu}
        settings = SweepConfig.model_validate(
            {
                "output": str(scratch / f"sweep-{trials}"),
                "encoder": str(encoder),
                "data": {"path": str(dataset), "clip_seconds": config.seconds},
                "finetune": {"validate_every_steps": 1, "train": train},
                "sweep": {
                    "num_trials": trials,
                    "max_concurrent_trials": None,
                    "space": {"train.learning_rate": {"distribution": "loguniform", "low": 1e-5, "high": 1e-3}},
                },
            }
        )

        def run() -> None:
            prepare(PrepareConfig(kind="esc50", source=str(source), output=str(dataset)), lambda _done, _all: None)
            run_sweep(settings, _on_stderr())

        return run

    return _measured(stage, trials, FIRST_TRIALS, part="a trial")


def _on_stderr() -> Console:
    return Console(RichConsole(stderr=True))  # stdout may be one JSON object


def _measured(
    stage: Callable[[int, Path], Callable[[], object]], count: int, first_count: int = FIRST_CLIPS, part: str = ""
) -> Step:
    """stage: gives what runs it on so many clips, with a folder for whatever it needs and writes.

    part: what the time of one is called, where they are no clips.
    """

    def step() -> Observation:
        from beats_ray.launch import ray_cluster

        with tempfile.TemporaryDirectory(prefix="beats-ray-bench-") as scratch, peak_memory() as peak_mib:
            first, whole = (stage(number, Path(scratch)) for number in (first_count, count))
            started = time.perf_counter()
            with ray_cluster(RaySettings(address="local", object_store_mib=STORE_MIB)):
                first()
                begun = time.perf_counter()
                whole()
                seconds = time.perf_counter() - begun
            parts_s = {part: seconds / count} if part else {}
            return Observation(seconds, begun - started, count, peak_mib(), parts_s=parts_s)

    return step
