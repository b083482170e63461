"""The training commands, on the driver: check everything, then hand one run to Ray Train.

`run_pretrain`, `run_distill` and `run_finetune` differ in the task they name; `_Run` is what the workers get.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from beats_ray.config import (
    DistillConfig,
    FinetuneConfig,
    PretrainConfig,
    StreamSettings,
    TrainSettings,
    fingerprint,
)
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.parts import ClipPart
from beats_ray.data.storage import Place, StorageError, open_place, with_retries
from beats_ray.identity import content_keys, stage_identity
from beats_ray.launch import check_fits
from beats_ray.stage import is_complete, run_stage
from beats_ray.telemetry import RUN_UNDER_WAY, run_name
from beats_ray.train.checks import (
    RunConfig,
    find_mistakes,
    keep_batch,
    read_inputs,
    resolve_settings,
    training_part,
)
from beats_ray.train.codebook_health import describe_collapse
from beats_ray.train.flops import RunKind
from beats_ray.train.held_out import find_parts

WATCH_SECONDS = 1.0
NOTICE_SECONDS = 25.0  # spot machines and pods end 30 s after their notice
RESERVATION_SECONDS = 600
"""How long Ray Train waits for room for a run's workers before it looks at the cluster again."""
ELASTIC_RESERVATION_SECONDS = 30
"""The same of an elastic run, whose number of workers may be that of nodes that are gone."""
STARTER_CPUS = 0.01
"""Of a trial's process that starts its run and waits for it. Ray takes no empty reservation."""

Written = list[tuple[str, str]]
"""What a job wrote: (label, place)."""


@dataclass(frozen=True)
class Run:
    """One training run, small enough to send to every worker."""

    kind: RunKind
    config: Any
    """PretrainConfig, DistillConfig or FinetuneConfig."""
    manifest: DatasetManifest
    output: Place
    identity: dict[str, Any]
    """Settings and keys of the inputs: what the stage's result is that of."""
    cache: Any = None
    """ClipCache with the decoded clips; None where they are streamed."""
    side_by_side: int = 1
    """Runs that share the cluster's CPUs at one time: a sweep's trials, all of as many workers."""

    @property
    def train(self) -> TrainSettings:
        settings: TrainSettings = self.config.train
        return settings

    @property
    def data(self) -> StreamSettings:
        settings: StreamSettings = self.config.data
        return settings

    @property
    def choose_by(self) -> str:
        """The metric of the validation part by which weights and settings are compared."""
        return f"validation/{self.manifest.main_metric}"

    def held_out(self, part: Literal["validation", "test"]) -> ClipPart | None:
        """The clips of a held-out part; None where the run has none."""
        return getattr(find_parts(self.config, self.manifest), part) if self.kind == "finetune" else None

    def streamed_parts(self) -> dict[str, ClipPart]:
        """The clips of each stream that the run reads, by its name."""
        parts = {"validation": self.held_out("validation"), "test": self.held_out("test")}
        return {"train": training_part(self.config, self.manifest)} | {
            name: part for name, part in parts.items() if part is not None
        }


def run_pretrain(config: PretrainConfig, console: Console, keys: Mapping[str, str] | None = None) -> Written:
    """Pre-trains an encoder on tokenizer labels; writes `output/model`, and `output/tokenizer` where none was given.

    keys: of the inputs, as part of the run's identity; by their content where not given. So for all jobs here.
    """
    written = _train(_checked("pretrain", config, keys), console)
    if config.tokenizer:
        return written
    from beats_ray.inference import publish
    from beats_ray.train.pretrain import build_random_projection

    tokenizer = open_place(config.output) / "tokenizer"
    if not (tokenizer / "config.json").exists():
        publish(build_random_projection(config.random_projection), tokenizer)
    return [*written, ("tokenizer", tokenizer.uri)]


def run_distill(config: DistillConfig, console: Console, keys: Mapping[str, str] | None = None) -> Written:
    """Distils a teacher into a tokenizer; writes `output/model`."""
    return _train(_checked("distill", config, keys), console)


def run_finetune(config: FinetuneConfig, console: Console, keys: Mapping[str, str] | None = None) -> Written:
    """Fine-tunes an encoder on the clips that are neither tested nor chosen by; writes `output/model`.

    Small data sets are decoded once and stay in the object store (`data.cache`), others are streamed.
    """
    from beats_ray.data.cache import is_cached

    run = _checked("finetune", config, keys)
    if not is_complete(run.output) and is_cached(run.manifest, config.data):
        run = replace(run, cache=load_cache(config.data, run.manifest))
    return _train(run, console)


def fit_run(run: Run, console: Console) -> Written:
    """A run that has been checked, on Ray Train, its clips cached already or streamed; at once where it is complete."""
    return _train(run, console)


def fit_with(kind: RunKind, config: RunConfig, worker: Callable[[dict[str, Any]], None]) -> None:
    """Checks a run and has `worker` run it on each Ray Train worker, instead of `train_worker`, with the same payload.

    For whoever measures a run: nothing is remembered of it as a stage.
    """
    run = _checked(kind, config, None)
    check_fits(run.train, run.data, streams=_open_streams(run))
    _fit(run, worker=worker)


def fit_in_trial(run: Run, callbacks: Sequence[Any], meanwhile: Callable[[], None]) -> None:
    """A checked run on Ray Train, inside a trial of Ray Tune: `callbacks` hear of its reports, in Ray Train's process.

    meanwhile: called again and again in this one until the run has ended; what it raises goes through.
    """
    from beats_ray.train.leftovers import wait_until_released

    wait_until_released(run.output)
    _fit(run, callbacks, meanwhile=meanwhile)


def _checked(kind: RunKind, config: RunConfig, keys: Mapping[str, str] | None) -> Run:
    """The run that the config means; its first mistake is raised."""
    config = keep_batch(config)
    inputs = read_inputs(kind, config)
    for mistake in inputs.mistakes:
        raise mistake
    assert inputs.manifest is not None, config.data.path
    keys = content_keys(config) if keys is None else keys
    for mistake in find_mistakes(kind, config, inputs, keys):
        raise mistake
    config = resolve_settings(config, inputs)
    return Run(kind, config, inputs.manifest, open_place(config.output), stage_identity(config, keys))


def load_cache(data: StreamSettings, manifest: DatasetManifest) -> Any:
    """The decoded clips of a small labelled set, read once through Ray Data into the object store."""
    from beats_ray.data.cache import materialize_clips

    return materialize_clips(open_place(data.path), manifest, data)


def _train(run: Run, console: Console) -> Written:
    """Runs to the end, or returns at once when it has been run already with the same config."""
    if not is_complete(run.output):
        check_fits(run.train, run.data, streams=_open_streams(run))

    def work() -> None:
        with watch(run, console):
            _fit(run)

    run_stage(run.output, run.identity, work)
    return _written(run)


def _open_streams(run: Run) -> int:
    """Streams whose tasks may hold CPUs at one time: held-out clips are read while those of the training clips wait."""
    return run.data.streams + (len(run.streamed_parts()) > 1) if run.cache is None else 1


def _written(run: Run) -> Written:
    return [("model", (run.output / "model").uri), ("metrics", (run.output / "metrics.jsonl").uri)]


def _fit(
    run: Run,
    callbacks: Sequence[Any] = (),
    worker: Callable[[dict[str, Any]], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from beats_ray.train.failures import ended_in_its_own_words, failure_rules
    from beats_ray.train.faults import STOP_REQUEST

    settings = run.train
    is_elastic = settings.min_workers < settings.max_workers
    seconds = ELASTIC_RESERVATION_SECONDS if is_elastic else RESERVATION_SECONDS
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)  # Ray takes it along to the controller
    datasets: dict[str, Any] = {}
    data_config = None
    if run.cache is None:
        from beats_ray.data.stream import training_streams
        from beats_ray.train.streaming import StreamedRun, TrainStream

        labels = getattr(run.config, "labels", "")
        parts = run.streamed_parts()
        streamed = StreamedRun(
            run.data, run.train, run.manifest, labels, run.output / "checkpoints", parts, run.side_by_side
        )
        names = [*training_streams(run.data.streams), *(name for name in parts if name != "train")]
        datasets, data_config = {name: lambda: None for name in names}, TrainStream(streamed)
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1.0} if settings.use_gpu else {})
    scratch = run.output / "ray-train"
    rules = failure_rules(run.output / "checkpoints", settings)
    trainer = TorchTrainer(
        worker or train_worker,
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,  # type: ignore[arg-type]  # a pair makes it elastic
            use_gpu=settings.use_gpu,
            resources_per_worker=resources,
        ),
        datasets=datasets,
        dataset_config=data_config,
        torch_config=TorchConfig(
            backend="nccl" if settings.use_gpu else "gloo", timeout_s=round(settings.collective_timeout_seconds)
        ),
        run_config=ray.train.RunConfig(
            name=f"{run.kind}-{fingerprint(run.identity)}",
            storage_path=scratch.path,
            storage_filesystem=scratch.keyless_filesystem,
            failure_config=rules["failure_config"],
            callbacks=[*rules["callbacks"], *callbacks],
        ),
    )
    with_retries((run.output / STOP_REQUEST).delete, settings.storage_retry_seconds)
    name = run_name(run.output.uri)
    RUN_UNDER_WAY.set(1, run=name)
    try:
        with ended_in_its_own_words():
            if meanwhile is not None:  # in a trial, which Tune asks for a checkpoint by itself
                _in_thread(trainer.fit, meanwhile)
            else:
                _in_thread(trainer.fit, when_terminated=lambda: _checkpoint_before_the_end(run.output))
    finally:
        RUN_UNDER_WAY.set(0, run=name)


def _in_thread(
    work: Callable[[], object],
    meanwhile: Callable[[], None] = lambda: None,
    when_terminated: Callable[[], None] = lambda: None,
) -> None:
    """Runs `work` beside this thread, which waits and can be interrupted; SIGTERM calls `when_terminated` first.

    meanwhile: called while `work` goes on, and once afterwards.

    In the main thread Ray Train takes Ctrl-C over, for good: it ends the process with a status of its own, leaves out
    what the command has to stop, and goes on doing so after the run.
    """
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # it is raised again, below
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            meanwhile()
    except SystemExit:  # what the command line makes of SIGTERM
        when_terminated()
        raise
    if failures:
        raise failures[0]


def _checkpoint_before_the_end(output: Place) -> None:
    """Asks the run for a checkpoint and waits for it, within the notice that spot machines and `ray job stop` give."""
    from beats_ray.train.committed import sound_steps
    from beats_ray.train.faults import STOP_REQUEST

    deadline = time.monotonic() + NOTICE_SECONDS
    before: list[int] | None = None
    while time.monotonic() < deadline:
        with suppress(StorageError):  # it is asked again, and the end comes all the same
            found = sound_steps(output / "checkpoints")
            if before is None:
                (output / STOP_REQUEST).write_json({})
                before = found
            elif found != before:
                return
        time.sleep(0.5)


def train_worker(payload: dict[str, Any]) -> None:
    """What every Ray Train worker runs; what it raises is judged by `FailureBudget`."""
    from beats_ray.train.worker import train

    run: Run = payload["run"]
    try:
        train(run)
    except Exception as error:
        error.add_note(traceback.format_exc())  # an error that travels to another process leaves its trace behind
        raise


class watch:
    """Shows a run's progress while the block runs, read from the `progress.json` that its first worker writes."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run = run
        self._console = console
        self._stopped = threading.Event()
        self._shown_step = -1
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._show()

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            self._show()

    def _show(self) -> None:
        try:
            record = (self._run.output / "progress.json").read_json()
        except (
            FileNotFoundError,
            StorageError,
            ValueError,
        ):  # absent, or replaced while it was read: the next will tell
            return
        if record["step"] == self._shown_step:
            return
        first, self._shown_step = self._shown_step < 0, record["step"]
        self._warn(record, first)
        shown = {name: value for name, value in record.items() if name in _SHOWN and (value or name not in _IF_ANY)}
        total = self._run.train.steps * self._run.train.global_batch_size
        self._console.progress(record["clips"], total, **{_SHOWN[name]: value for name, value in shown.items()})

    def _warn(self, record: dict[str, float], first: bool) -> None:
        """Says once what holds the run back, and once that its codebook has collapsed."""
        self._warn_once("codebook", lambda: describe_collapse(record))
        if not first:  # which has the start of the stream's processes in it
            self._warn_once("data", lambda: self._bottleneck(record))

    def _warn_once(self, subject: str, look: Callable[[], str | None]) -> None:
        line = None if subject in self._warned else look()
        if line is not None:
            self._warned.add(subject)
            self._console.note(f"warning: {line}")

    def _bottleneck(self, record: dict[str, float]) -> str | None:
        import ray

        from beats_ray.data.bottleneck import name_bottleneck

        cpus = ray.cluster_resources().get("CPU", 0.0)
        return name_bottleneck(record, self._run.data, self._run.train, cpus)


_SHOWN = {
    "train/loss": "loss",
    "train/masked_accuracy": "accuracy",
    "train/clip_band_loss": "clip-band loss",
    "tokenizer/perplexity": "perplexity",
    "validation/accuracy": "validation accuracy",
    "validation/mean_average_precision": "validation mAP",
    "data/wait_fraction": "data wait",
    "train/skipped_steps": "skipped steps",
    "train/recoveries": "recoveries",
}
_IF_ANY = {"train/skipped_steps", "train/recoveries"}  # no news while they are zero
