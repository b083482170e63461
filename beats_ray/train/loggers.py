"""Where a run's reports go, beside `metrics.jsonl`: TensorBoard files, Prometheus, MLflow, Weights & Biases.

    loggers = build_loggers(("tensorboard", "mlflow"), output, "pretrain", run_id, flat_settings(config), resumed_step)

`train.loggers` chooses them. Addresses and keys come from the environment alone (`MLFLOW_TRACKING_URI`, `WANDB_*`). The
two that talk to a server do so from a thread: one that is slow or away costs reports there, never time or the run.
"""

import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from beats_ray.config import LoggerName, UserError
from beats_ray.data.storage import Place
from beats_ray.telemetry import RUN_ACTIVE, prometheus_name
from beats_ray.train.tensorboard import TensorBoardLogger

MAX_WAITING = 1000
"""Reports that wait for a server before further ones are dropped."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a server to take what is left."""
FAILED_CLOSE_SECONDS = 5.0
"""The same of a run that failed, and whose restart waits."""
PROJECT = "beats_ray"
"""MLflow experiment and W&B project where the environment names none."""
IDENTITY_TAG = "beats_ray.run_id"
"""MLflow tag by which a resumed run finds itself: MLflow chooses its run ids itself."""
MLFLOW_PARAMS_AT_ONCE, MLFLOW_PARAM_LENGTH = 100, 6000  # limits of MLflow's log_batch


class Logger(Protocol):
    """Takes the reports of one run, oldest first."""

    def write(self, record: dict[str, Any]) -> None:
        """Adds one report; `record["step"]` is its place on the x axis."""
        ...

    def flush(self) -> None:
        """Called at checkpoints: what was written so far should outlive this process."""
        ...

    def close(self, complete: bool = True) -> None:
        """Flushes and ends; called once, when the run is complete or has failed."""
        ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """UserError, on the driver and before a run, where a logger lacks its package or its address."""
    for name in ("mlflow", "wandb"):
        if name in names and not _is_installed(name):
            raise UserError(
                f"train.loggers={list(names)}: the package for {name} is not installed; "
                f"pip install 'beats-ray[{name}]', or take {name} out of train.loggers"
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"train.loggers={list(names)}: MLFLOW_TRACKING_URI is not set; set it to the server's address, "
            "or take mlflow out of train.loggers"
        )
    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if "wandb" in names and not offline and not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            f"train.loggers={list(names)}: WANDB_API_KEY is not set; set it, or WANDB_MODE=offline, "
            "or take wandb out of train.loggers"
        )


def build_loggers(
    names: Sequence[LoggerName],
    output: Place,
    run_name: str,
    run_id: str,
    hyperparameters: dict[str, Any],
    resumed_step: int,
) -> list[Logger]:
    """The loggers of one run, on the worker that reports.

    `run_id` is the same for every attempt at a run and for no other run: letters, digits, `-` and `_`. After
    `resumed_step` > 0 MLflow and W&B continue the run of that id; at 0 it begins anew there.
    """
    build: dict[LoggerName, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(output / "tensorboard", resumed_step, run_name, hyperparameters),
        "prometheus": lambda: PrometheusLogger(run_name, resumed_step),
        "mlflow": lambda: BackgroundLogger("mlflow", MlflowLogger(run_name, run_id, hyperparameters, resumed_step)),
        "wandb": lambda: BackgroundLogger(
            "wandb", WandbLogger(output / "wandb", run_name, run_id, hyperparameters, resumed_step)
        ),
    }
    return [build[name]() for name in dict.fromkeys(names)]


def flat_settings(config: BaseModel) -> dict[str, Any]:
    """Every setting below its dotted name, as plain values; lists as JSON text."""
    return dict(_flat(config.model_dump(mode="json"), ""))


class PrometheusLogger:
    """The newest value of every metric as a gauge with the label `run`, which Ray exports on each node's metrics port.

    Ray puts `ray_` before the name: `train/loss` is scraped as `ray_beats_ray_train_loss`. `run/active` and `step` are
    there before the first report, so that a run that never makes one is seen too. In a process outside Ray the gauges
    can be set all the same and lead nowhere.
    """

    def __init__(self, run_name: str, resumed_step: int = 0) -> None:
        self._run_name = run_name
        self._gauges: dict[str, Any] = {}
        RUN_ACTIVE.set(1, run=run_name)
        self.write({"step": resumed_step})

    def write(self, record: dict[str, Any]) -> None:
        from ray.util.metrics import Gauge

        for name, value in record.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(prometheus_name(name), f"{name} of a beats_ray run", tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run_name})

    def flush(self) -> None:
        """Ray exports by itself."""

    def close(self, complete: bool = True) -> None:
        """The last values stay until the process ends."""
        RUN_ACTIVE.set(0, run=self._run_name)


class BackgroundLogger:
    """Feeds `logger` from a thread: `write` and `flush` never wait and never fail, `close` waits a bounded time.

    The first failure is a warning. Reports that `logger` fails on, that find `max_waiting` others in the queue, or that
    are left after `close_seconds` are dropped and counted; `metrics.jsonl` has them in any case.
    """

    def __init__(
        self, name: str, logger: Logger, max_waiting: int = MAX_WAITING, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        self._name = name
        self._logger = logger
        self._close_seconds = close_seconds
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue(max_waiting)
        self._warned = threading.Event()
        self._closed = threading.Event()
        self._written = self._delivered = 0
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"logger-{name}")
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Reports that `logger` has not got; until `close` those that wait count too."""
        return self._written - self._delivered

    def write(self, record: dict[str, Any]) -> None:
        self._written += 1
        self._enqueue(lambda: self._deliver(dict(record)))

    def flush(self) -> None:
        self._enqueue(self._logger.flush)

    def close(self, complete: bool = True) -> None:
        seconds = self._close_seconds if complete else min(self._close_seconds, FAILED_CLOSE_SECONDS)
        deadline = time.monotonic() + seconds
        try:
            self._calls.put(partial(self._end, complete), timeout=seconds)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self.dropped or not self._closed.is_set():
            _log().warning("%s: %d of %d reports did not arrive", self._name, self.dropped, self._written)

    def _enqueue(self, call: Callable[[], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn(f"more than {self._calls.maxsize} reports wait")

    def _deliver(self, record: dict[str, Any]) -> None:
        self._logger.write(record)
        self._delivered += 1

    def _end(self, complete: bool) -> None:
        try:
            self._logger.close(complete)
        finally:
            self._closed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            call = self._calls.get()
            try:
                call()
            except Exception as error:  # noqa: BLE001  # whatever a server's client raises: the run goes on without it
                self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _warn(self, reason: str) -> None:
        if not self._warned.is_set():
            self._warned.set()
            _log().warning("%s: %s; the run goes on, its reports are in metrics.jsonl", self._name, reason)


class MlflowLogger:
    """A run on the MLflow server of `MLFLOW_TRACKING_URI`; experiment `MLFLOW_EXPERIMENT_NAME`, else `beats_ray`.

    The server is asked for nothing before the first report. A resumed run goes on behind the last step that is there.
    """

    def __init__(self, run_name: str, run_id: str, hyperparameters: dict[str, Any], resumed_step: int) -> None:
        self._run_name = run_name
        self._run_id = run_id
        self._hyperparameters = hyperparameters
        self._continues = resumed_step > 0
        self._client: Any = None
        self._found: str | None = None
        self._last_step = 0

    def write(self, record: dict[str, Any]) -> None:
        if self._found is None:
            self._found = self._open()
        if record["step"] <= self._last_step:
            return
        from mlflow.entities import Metric

        now_ms = round(time.time() * 1000)
        metrics = [Metric(name, float(value), now_ms, record["step"]) for name, value in record.items()]
        self._client.log_batch(self._found, metrics=metrics, synchronous=True)
        self._last_step = record["step"]

    def flush(self) -> None:
        """The server has all that was written."""

    def close(self, complete: bool = True) -> None:
        if self._found is not None:
            self._client.set_terminated(self._found, "FINISHED" if complete else "FAILED")

    def _open(self) -> str:
        """MLflow's id of the run, found or made on the server, with the hyperparameters that it lacked added."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UserError("MLFLOW_TRACKING_URI is not set on the worker that reports")
        self._client = MlflowClient()
        experiment = _mlflow_experiment(self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        runs = self._client.search_runs(
            [experiment], f"tags.`{IDENTITY_TAG}` = '{self._run_id}'", order_by=["attributes.start_time DESC"]
        )
        if runs and self._continues:
            run = runs[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            for old in runs:  # an attempt that ended before its first checkpoint
                if old.info.status == "RUNNING":
                    self._client.set_terminated(old.info.run_id, "KILLED")
            run = self._client.create_run(experiment, run_name=self._run_name, tags={IDENTITY_TAG: self._run_id})
            self._continues = True  # where what follows fails, the next report finds this run
        missing = [
            Param(name, str(value)[:MLFLOW_PARAM_LENGTH])
            for name, value in self._hyperparameters.items()
            if name not in run.data.params
        ]
        for start in range(0, len(missing), MLFLOW_PARAMS_AT_ONCE):
            part = missing[start : start + MLFLOW_PARAMS_AT_ONCE]
            self._client.log_batch(run.info.run_id, params=part, synchronous=True)
        self._last_step = int(run.data.metrics.get("step", 0))
        found: str = run.info.run_id
        return found


class WandbLogger:
    """A run on Weights & Biases, as `WANDB_API_KEY`, `WANDB_MODE`, `WANDB_PROJECT` and their kind say.

    Nothing is started before the first report. Of the machine, W&B gets neither the code nor the git remote. With
    `WANDB_MODE=offline` its files go to `place` at every flush, for `wandb sync`.
    """

    def __init__(
        self, place: Place, run_name: str, run_id: str, hyperparameters: dict[str, Any], resumed_step: int
    ) -> None:
        self._place = place
        self._run_name = run_name
        self._run_id = run_id
        self._hyperparameters = hyperparameters
        self._resumed_step = resumed_step
        self._folder = tempfile.TemporaryDirectory(prefix="beats-ray-wandb-", ignore_cleanup_errors=True)
        self._run: Any = None
        self._next_step = 0

    def write(self, record: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._open()
            self._next_step = self._run.step  # of a continued run: the one after its last
        if record["step"] >= self._next_step:
            self._run.log(
                {name: value for name, value in record.items() if name != "step"}, record["step"], commit=True
            )

    def flush(self) -> None:
        if self._run is not None and self._run.offline:
            folder = Path(self._run.dir).parent
            (self._place / folder.name).upload(folder)

    def close(self, complete: bool = True) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if complete else 1)
            self.flush()
        self._folder.cleanup()

    def _open(self) -> Any:
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{CLOSE_SECONDS:g}")  # a process ends, whatever the server does
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._run_id,
            name=self._run_name,
            config=self._hyperparameters,
            dir=self._folder.name,
            resume="allow" if self._resumed_step else None,  # None replaces what an earlier attempt left there
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )


def _mlflow_experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made: str = client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run made it just now
        else:
            return made
    experiment: str = found.experiment_id
    return experiment


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name, such as W&B's own, is no package


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
