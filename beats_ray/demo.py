"""The demo: the whole method, small, on one machine, from raw clips to a leaderboard.

It starts a real object store, prepares shards on it, and runs two BEATs iterations from there: two Ray Train workers
under DeepSpeed ZeRO-2, and a Ray Tune sweep after each. Sizes are small; the parts are those of a cluster run.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from beats_ray.config import (
    DistillSettings,
    EncoderSettings,
    FinetuneSettings,
    IterateConfig,
    MaskingSettings,
    PredictorSettings,
    PrepareConfig,
    PrepareSettings,
    PretrainSettings,
    RaySettings,
    SearchParameter,
    Section,
    StreamSettings,
    SweepSettings,
    TokenizerSettings,
    TrainSettings,
    UserError,
    load_config,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.storage import open_place
from beats_ray.train.jobs import Written

BUCKET = "beats"
MARK = "demo.json"  # says what a folder is the demo of
BASE_MINUTES = 12.0
"""The budget that the step counts below are made for, on two cores."""


SectionT = TypeVar("SectionT", bound=Section)


class DemoData(StreamSettings, PrepareSettings):
    """Settings of preparing and of streaming, side by side."""


class DemoConfig(IterateConfig):
    """Everything that the demo does; `data.path` and `output` are its own to choose."""

    data: DemoData = DemoData()


def demo_settings(budget_minutes: float) -> dict[str, Any]:
    """The demo's settings for a budget: steps grow with it, everything else stays."""
    scale = budget_minutes / BASE_MINUTES
    encoder = EncoderSettings(preset="tiny")

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    def train(count: int, **changes: object) -> TrainSettings:
        fields: dict[str, object] = {
            "steps": steps(count),
            "warmup_steps": steps(count) // 10,
            "num_workers": 2,
            "zero_stage": 2,
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "log_every_steps": 10,
            "checkpoint_every_steps": max(25, steps(count) // 4),
            "epsilon": 1e-8,
        }
        return validate(TrainSettings, fields | changes)

    validations = 4
    tuning = steps(60) // validations * validations
    return {
        "iterations": 2,
        "data": DemoData(clip_seconds=5.0, row_group_clips=40, shard_mib=8.0, shuffle_window_clips=512),
        "pretrain": PretrainSettings(
            encoder=encoder,
            masking=MaskingSettings(max_targets=62),
            predictor=PredictorSettings(mask_vector="learned"),  # docs/convergence.md has its figures with this one
            train=train(200, learning_rate=1e-3),
        ),
        "distill": DistillSettings(
            encoder=encoder, tokenizer=TokenizerSettings(init_batches=8), train=train(30, learning_rate=5e-4)
        ),
        "finetune": FinetuneSettings(
            validate_every_steps=tuning // validations,
            train=train(
                tuning,
                steps=tuning,
                warmup_steps=tuning // 10,
                num_workers=1,
                zero_stage=1,
                checkpoint_every_steps=tuning // validations,
                learning_rate=1e-3,
            ),
        ),
        "sweep": SweepSettings(
            num_trials=4,
            space={
                "train.learning_rate": SearchParameter(distribution="loguniform", low=5e-4, high=4e-3),
                "train.layer_decay": SearchParameter(distribution="choice", values=(0.6, 0.8, 1.0)),
                "augment.mixup": SearchParameter(distribution="choice", values=(0.0, 0.4)),
            },
        ),
        "ray": RaySettings(address="local", object_store_mib=768),
    }


def run_demo(data: str | None, budget_minutes: float, output: str, overrides: list[str], console: Console) -> Written:
    """Runs the demo, or goes on with it, below the local folder `output`.

    data: a folder in ESC-50's layout, local, s3:// or gs://; a sample set is made where there is none.
    """
    from beats_ray.data.datasets.esc50 import check_layout

    if not budget_minutes > 0:
        raise UserError(f"--budget={budget_minutes:g} must be a positive number of minutes")
    if "://" in output:
        raise UserError(f"--output={output}: the demo keeps its object store in a local folder; give a local path")
    folder = Path(output).absolute()
    settings = demo_settings(budget_minutes)
    places = {
        "output": f"s3://{BUCKET}/run",
        "data": settings["data"].model_copy(update={"path": f"s3://{BUCKET}/data"}),
    }
    config = load_config(DemoConfig, None, overrides, **(settings | places))
    if data:
        check_layout(open_place(data))
    mark = {"data": data or "sample clips", "budget": f"{budget_minutes:g} minutes", "settings": overrides}
    _check_mark(folder, mark)
    raw = _raw_clips(data, folder, console)
    with _object_store(folder):
        from beats_ray.iterate import check_plan
        from beats_ray.launch import ray_cluster

        console.stage("start Ray and the object store")
        with ray_cluster(config.ray):
            check_plan(config, is_labelled=True)
            (open_place(str(folder)) / MARK).write_json(mark)
            written = _prepare_and_iterate(config, raw, console)
            _show_leaderboard(config, console)
    buckets = f"{folder / 'store' / 'buckets'}/"
    _closing_words(Path(config.output.replace("s3://", buckets, 1)), config.iterations, raw, console)
    return [(label, uri.replace("s3://", buckets, 1)) for label, uri in written]


def _raw_clips(data: str | None, folder: Path, console: Console) -> Path:
    """The local folder of the raw clips; a sample set is made, remote clips are copied, once for each output folder."""
    from beats_ray.data.sample import make_sample_set

    if data and not open_place(data).is_remote:
        return Path(data).absolute()
    raw, done = folder / "raw", folder / "raw.done"
    wanted = data or "sample clips"
    if not done.exists() or done.read_text() != wanted:
        console.stage("copy the raw clips" if data else "make sample clips")
        shutil.rmtree(raw, ignore_errors=True)
        if data:
            open_place(data).download(raw)
        else:
            make_sample_set(raw)
        done.write_text(wanted)
    return raw


def _check_mark(folder: Path, wanted: Mapping[str, object]) -> None:
    """UserError, before anything is done, where the folder holds a demo with other data, budget or settings."""
    mark = open_place(str(folder)) / MARK
    if not mark.exists():
        return
    found = mark.read_json()
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"--output={folder}: holds a demo with {name} = {found.get(name)!r}, now it is {value!r}; give the "
                "same to go on with it, or another --output"
            )


@contextlib.contextmanager
def _object_store(folder: Path) -> Iterator[None]:
    from beats_ray.objectstore import EmbeddedObjectStore

    with EmbeddedObjectStore(folder / "store") as store:
        store.make_bucket(BUCKET)
        before = dict(os.environ)
        os.environ.update(store.environment())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _prepare_and_iterate(config: DemoConfig, raw: Path, console: Console) -> Written:
    from beats_ray.data.prepare import prepare
    from beats_ray.iterate import run_iterate

    console.stage("prepare: raw clips to shards on the object store")
    settings = PrepareConfig(
        output=config.data.path,
        kind="esc50",
        source=str(raw),
        ray=config.ray,
        data=_part(PrepareSettings, config.data),
    )
    prepare(settings, console.progress)
    fields = {name: getattr(config, name) for name in IterateConfig.model_fields}
    return run_iterate(IterateConfig(**fields | {"data": _part(StreamSettings, config.data)}), console)


def _part(kind: type[SectionT], section: DemoData) -> SectionT:
    return kind(**{name: getattr(section, name) for name in kind.model_fields})


def _show_leaderboard(config: DemoConfig, console: Console) -> None:
    from beats_ray.report import leaderboard_rows

    columns, rows = leaderboard_rows(config.output)
    console.table("Leaderboard", columns, rows)


def _closing_words(run: Path, iterations: int, raw: Path, console: Console) -> None:
    example = next(path for path in sorted((raw / "audio").iterdir()) if path.is_file())
    console.note("Next:")
    if shutil.which("beats-ray") is None:
        console.note(f"  source {Path(sys.prefix) / 'bin' / 'activate'}")
    console.note(f"  beats-ray predict {run}/iteration-{iterations}/sweep/model {example}")
    console.note(f"  tensorboard --logdir {run}")
    console.note(f"  beats-ray prepare esc50 {raw} runs/data/esc10 && beats-ray iterate jobs/iterate-tiny.yaml")
