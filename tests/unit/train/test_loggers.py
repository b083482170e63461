"""Loggers: what arrives, that a resumed run goes on in place, and that a dead server costs the run nothing."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from support.hparams import hparam_rows
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS, STATUS_UNKNOWN

from beats_ray.config import ConfigError, PretrainConfig, TrainSettings, UserError, load_config
from beats_ray.data.storage import open_place
from beats_ray.train import loggers as loggers_module
from beats_ray.train.loggers import (
    BackgroundLogger,
    MlflowLogger,
    PrometheusLogger,
    TensorBoardLogger,
    WandbLogger,
    build_loggers,
    check_loggers,
    flat_settings,
    prometheus_name,
)
from beats_ray.train.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.unit

RUN_ID = "0123456789abcdef"


def report(step: int) -> dict[str, Any]:
    return {"step": step, "seconds": step / 2, "clips": 8 * step, "train/loss": 1.0 / step}


class Recorder:
    """A logger in memory; `fails` makes it raise, `waits` makes it hang."""

    def __init__(self, fails: bool = False, waits: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.flushes = self.closes = 0
        self.busy = threading.Event()
        self._fails, self._waits = fails, waits

    def write(self, record: dict[str, Any]) -> None:
        self.busy.set()
        if self._waits is not None:
            self._waits.wait(60)
        if self._fails:
            raise ConnectionError("no server")
        self.steps.append(record["step"])

    def flush(self) -> None:
        self.flushes += 1

    def close(self, complete: bool = True) -> None:
        self.closes += 1


# --- the background thread --------------------------------------------------------------------------------------------


def test_the_background_logger_delivers_every_report_in_order_and_closes() -> None:
    recorder = Recorder()
    logger = BackgroundLogger("test", recorder)
    for step in range(1, 101):
        logger.write(report(step))
    logger.flush()
    logger.close()
    assert recorder.steps == list(range(1, 101))
    assert (recorder.flushes, recorder.closes, logger.dropped) == (1, 1, 0)


def test_a_logger_that_raises_is_warned_of_once_and_its_reports_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    logger = BackgroundLogger("test", Recorder(fails=True))
    for step in range(1, 11):
        logger.write(report(step))
    logger.close()
    assert logger.dropped == 10
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "test: ConnectionError: no server; the run goes on, its reports are in metrics.jsonl",
        "test: 10 of 10 reports did not arrive",
    ]


def test_a_logger_that_hangs_neither_stalls_the_writer_nor_the_end_and_drops_beyond_its_bound() -> None:
    hangs = threading.Event()
    recorder = Recorder(waits=hangs)
    logger = BackgroundLogger("test", recorder, max_waiting=5, close_seconds=0.5)
    started = time.monotonic()
    logger.write(report(1))
    assert recorder.busy.wait(10)
    for step in range(2, 101):
        logger.write(report(step))
    logger.flush()
    logger.close()
    assert time.monotonic() - started < 5
    assert logger.dropped == 100
    hangs.set()
    deadline = time.monotonic() + 10
    while logger.dropped > 94 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert recorder.steps == [1, 2, 3, 4, 5, 6], "the one in hand and as many as may wait"


# --- the log of a run -------------------------------------------------------------------------------------------------


def test_the_log_gives_every_report_to_every_logger_and_closes_each_once(tmp_path: Path) -> None:
    recorders = [Recorder(), Recorder()]
    log = MetricsLog(open_place(str(tmp_path)), 0, loggers=recorders)
    log.write(report(1))
    log.flush()
    log.write(report(2))
    log.close()
    assert [recorder.steps for recorder in recorders] == [[1, 2], [1, 2]]
    assert [(recorder.flushes, recorder.closes) for recorder in recorders] == [(1, 1), (1, 1)]
    assert not (tmp_path / "tensorboard").exists()
    assert json.loads((tmp_path / "progress.json").read_text())["step"] in (1, 2)


def test_cost_goes_on_over_a_resumption(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    for resumed in (0, 1, 2):
        log = MetricsLog(place, resumed, loggers=[])
        log.write(report(resumed + 1) | {"cost/cpu_seconds": 3.0, "cost/gpu_seconds": 2.0})
        log.close()
    assert [(record["cost/cpu_seconds"], record["cost/gpu_seconds"]) for record in read_metrics(place)] == [
        (3.0, 2.0), (6.0, 4.0), (9.0, 6.0),
    ]  # fmt: skip


def test_seconds_go_on_over_a_resumption_and_later_reports_are_replaced(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    first = MetricsLog(place, 0, loggers=[])
    for step in (1, 2, 3, 4):
        first.write(report(step))
    first.flush()
    second = MetricsLog(place, 2, loggers=[])  # the checkpoint of step 2 is the newest; the clock starts again
    second.write(report(3) | {"seconds": 0.25})
    second.close()
    third = MetricsLog(place, 3, loggers=[])
    third.write(report(4) | {"seconds": 0.5})
    third.close()
    assert [(record["step"], record["seconds"]) for record in read_metrics(place)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.25),
        (4, 1.75),
    ]


def scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    assert read.Tags()["scalars"] == ["train/loss"]
    return [(event.step, event.value) for event in read.Scalars("train/loss")]


def test_a_flush_uploads_tensorboard_files_with_every_report_so_far(tmp_path: Path) -> None:
    logger = TensorBoardLogger(open_place(str(tmp_path / "tensorboard")), 0)
    for step in (1, 2, 3, 4):
        logger.write(report(step))
        logger.flush()
        assert scalars(tmp_path / "tensorboard") == [(done, pytest.approx(1 / done)) for done in range(1, step + 1)]
    logger.close()


def test_tensorboard_shows_every_step_once_where_a_run_went_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    for first, resumed in ((1, 0), (3, 2)):
        logger = TensorBoardLogger(open_place(str(tmp_path / "tensorboard")), resumed)
        for step in range(first, 5):
            logger.write(report(step) | {"train/loss": 10.0 * resumed + step})
        logger.close()
    assert scalars(tmp_path / "tensorboard") == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert sorted(path.suffix for path in (tmp_path / "tensorboard").iterdir()) == [".step0", ".step2"]


def test_the_hparams_tab_lists_every_trial_with_its_settings_and_newest_metrics(tmp_path: Path) -> None:
    settings = {"train.use_gpu": False, "train.schedule": "cosine", "train.max_steps": None}
    for trial, rate, complete in (("a", 1e-3, True), ("b", 1e-4, False)):
        given = settings | {"train.learning_rate": rate}
        logger = TensorBoardLogger(open_place(str(tmp_path / trial / "tensorboard")), 0, f"trials/{trial}", given)
        for step in (1, 2):
            logger.write(report(step))
        logger.close(complete)
    rows = hparam_rows(tmp_path)
    assert rows.keys() == {"a", "b"}  # the tab has little room
    for name, rate, status in (("a", 1e-3, STATUS_SUCCESS), ("b", 1e-4, STATUS_UNKNOWN)):
        hyperparameters, metrics, session = rows[name]
        assert hyperparameters["train.learning_rate"].number_value == rate
        assert hyperparameters["train.schedule"].string_value == "cosine"
        assert hyperparameters["train.use_gpu"].WhichOneof("kind") == "bool_value"
        assert "train.max_steps" not in hyperparameters, "an empty cell"
        assert metrics == {"train/loss": (2, 0.5)}
        assert session.start_time_secs > 0
        assert session.status == status, "a run that failed may yet go on"


def test_a_run_that_failed_before_its_first_checkpoint_shows_every_step_once(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        logger = TensorBoardLogger(open_place(str(tmp_path / "tensorboard")), 0)
        for step in (1, 2):
            logger.write(report(step) | {"train/loss": loss})
        logger.close(complete=loss == 2.0)
    assert scalars(tmp_path / "tensorboard") == [(1, 2.0), (2, 2.0)]


def test_a_resumed_run_is_one_row_of_the_hparams_tab_and_ends_well(tmp_path: Path) -> None:
    for resumed, complete in ((0, False), (2, True)):
        time.sleep(1.1)  # files are read in the order of their names, which have the second in them
        logger = TensorBoardLogger(open_place(str(tmp_path / "tensorboard")), resumed, "pretrain", {"train.steps": 4})
        logger.write(report(resumed + 2))
        logger.flush()
        logger.close(complete)
    ((hyperparameters, metrics, session),) = hparam_rows(tmp_path).values()
    assert hyperparameters["train.steps"].number_value == 4
    assert metrics == {"train/loss": (4, 0.25)}
    assert session.status == STATUS_SUCCESS


def test_all_settings_of_a_run_reach_the_hparams_tab(tmp_path: Path) -> None:
    settings = flat_settings(PretrainConfig(output="runs/a", train=TrainSettings(steps=50_000)))
    (logger,) = build_loggers(("tensorboard",), open_place(str(tmp_path)), "first/pretrain", RUN_ID, settings, 0)
    logger.write(report(1))
    logger.close()
    hyperparameters, _, _ = hparam_rows(tmp_path)["first/pretrain"]
    assert hyperparameters.keys() == {name for name, value in settings.items() if value is not None}
    assert hyperparameters["train.steps"].number_value == 50_000
    assert hyperparameters["encoder.preset"].string_value == "base"


# --- choosing them ----------------------------------------------------------------------------------------------------


def test_the_config_takes_known_loggers_in_any_number_and_no_others() -> None:
    fields = {"output": "x"}
    chosen = load_config(PretrainConfig, None, ["train.loggers=[mlflow, wandb]"], **fields)
    assert chosen.train.loggers == ("mlflow", "wandb")
    assert load_config(PretrainConfig, None, ["train.loggers=[]"], **fields).train.loggers == ()
    with pytest.raises(ConfigError, match=r"train\.loggers\.0='comet'.*'prometheus'"):
        load_config(PretrainConfig, None, ["train.loggers=[comet]"], **fields)


def test_the_default_loggers_need_nothing_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers_module, "_is_installed", lambda _module: False)
    names = TrainSettings().loggers
    check_loggers(names)
    built = build_loggers(names, open_place(str(tmp_path)), "run", RUN_ID, {}, 0)
    assert [type(logger) for logger in built] == [TensorBoardLogger, PrometheusLogger]
    assert [type(logger) for logger in build_loggers(("prometheus",) * 2, open_place("x"), "run", RUN_ID, {}, 0)] == [
        PrometheusLogger
    ]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_logger_without_its_package_is_refused_with_the_remedy(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers_module, "_is_installed", lambda module: module != name)
    with pytest.raises(UserError, match=rf"train\.loggers=\['{name}'\].*pip install 'beats-ray\[{name}\]'"):
        check_loggers([name])


def test_a_folder_named_like_the_package_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offline_folder_of_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not loggers_module._is_installed("offline_folder_of_no_package")
    assert loggers_module._is_installed("tensorboard")


def test_a_logger_without_address_or_key_is_refused_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers_module, "_is_installed", lambda _module: True)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        check_loggers(["mlflow"])
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        check_loggers(["wandb"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["mlflow", "wandb"])


def test_hyperparameters_are_every_setting_by_its_dotted_name() -> None:
    flat = flat_settings(PretrainConfig(output="runs/a", train=TrainSettings(steps=50_000)))
    assert flat["train.steps"] == 50_000
    assert flat["train.loggers"] == '["tensorboard", "prometheus"]'
    assert flat["encoder.preset"] == "base"
    assert not any(isinstance(value, (dict, list, BaseModel)) for value in flat.values())


# --- Prometheus -------------------------------------------------------------------------------------------------------


def test_metric_names_become_valid_prometheus_names() -> None:
    from ray.util.metrics import _VALID_METRIC_NAME_RE

    assert prometheus_name("train/loss") == "beats_ray_train_loss"
    assert prometheus_name("train/recoveries") == "beats_ray_train_recoveries"
    for name in ("perf/clips_per_s", "data/wait-fraction", "step", "7/µs per clip"):
        assert _VALID_METRIC_NAME_RE.match(prometheus_name(name))


def test_every_metric_is_one_gauge_with_the_newest_value_and_the_run_as_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    made: list[str] = []
    values: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert tag_keys == ("run",)
            made.append(name)
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._name] = (value, tags)

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    logger = PrometheusLogger("pretrain-a", resumed_step=7)
    assert values["beats_ray_step"] == (7, {"run": "pretrain-a"}), "a run that never reports is seen too"
    logger.write(report(1))
    logger.write(report(2) | {"train/recoveries": 1})
    assert sorted(made) == sorted(values)
    assert values["beats_ray_train_loss"] == (0.5, {"run": "pretrain-a"})
    assert values["beats_ray_train_recoveries"] == (1, {"run": "pretrain-a"})


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a new database file, where the loggers write too."""
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow.MlflowClient()


def mlflow_runs(client: Any) -> list[Any]:
    return client.search_runs([client.get_experiment_by_name("beats_ray").experiment_id])


def mlflow_steps(client: Any, run: Any) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def test_mlflow_gets_parameters_once_and_a_resumed_run_goes_on_in_the_same_run(mlflow_client: Any) -> None:
    settings = {f"section.field_{index}": index for index in range(150)}  # more than one call takes
    first = MlflowLogger("pretrain", RUN_ID, settings, 0)
    for step in (1, 2, 3):
        first.write(report(step))  # and the process dies; the newest checkpoint is that of step 2
    resumed = MlflowLogger("pretrain", RUN_ID, settings | {"section.field_0": "moved"}, 2)
    for step in (3, 4):
        resumed.write(report(step))
    resumed.close()
    (run,) = mlflow_runs(mlflow_client)
    assert mlflow_steps(mlflow_client, run) == [1, 2, 3, 4]
    assert run.data.params == {name: str(value) for name, value in settings.items()}
    assert run.data.metrics["train/loss"] == 0.25
    assert run.data.metrics["seconds"] == 2.0
    assert (run.info.run_name, run.info.status) == ("pretrain", "FINISHED")


def test_a_run_that_begins_anew_or_has_another_id_is_another_mlflow_run(mlflow_client: Any) -> None:
    for run_id in (RUN_ID, RUN_ID, "another"):
        logger = MlflowLogger("pretrain", run_id, {"a": 1}, 0)
        logger.write(report(1))
    runs = mlflow_runs(mlflow_client)
    assert sorted(run.info.status for run in runs) == ["KILLED", "RUNNING", "RUNNING"]
    assert all(mlflow_steps(mlflow_client, run) == [1] for run in runs)


def test_an_mlflow_run_whose_parameters_failed_is_found_again_and_not_made_twice(
    mlflow_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch = type(mlflow_client).log_batch
    failures = iter([True])

    def fail_once(self: Any, *arguments: Any, **named: Any) -> Any:
        if next(failures, False):
            raise ConnectionError("cut")
        return log_batch(self, *arguments, **named)

    monkeypatch.setattr(type(mlflow_client), "log_batch", fail_once)
    logger = MlflowLogger("pretrain", RUN_ID, {"a": 1}, 0)
    with pytest.raises(ConnectionError):
        logger.write(report(1))
    logger.write(report(2))
    (run,) = mlflow_runs(mlflow_client)
    assert run.data.params == {"a": "1"}
    assert mlflow_steps(mlflow_client, run) == [2]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def wandb_records(file: Path) -> Iterator[Any]:
    """What a `.wandb` file holds: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(message)
            message = b""


def wandb_history(file: Path) -> list[tuple[int, float]]:
    found = []
    for record in wandb_records(file):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.append((record.history.step.num, items["train/loss"]))
    return found


def test_wandb_offline_files_of_all_attempts_hold_one_run_and_lie_in_the_output(
    tmp_path: Path, wandb_offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = open_place(str(tmp_path / "output" / "wandb"))
    first = WandbLogger(place, "pretrain", RUN_ID, {"train.steps": 4}, 0)
    for step in (1, 2):
        first.write(report(step))
    first.flush()
    assert list((tmp_path / "output" / "wandb").glob(f"offline-run-*-{RUN_ID}/*.wandb")), "a flush stores what there is"
    first.close()
    time.sleep(1.1)  # W&B names folders by the second
    resumed = WandbLogger(place, "pretrain", RUN_ID, {"train.steps": 4}, 2)
    for step in (3, 4):
        resumed.write(report(step))
    resumed.close()
    files = sorted((tmp_path / "output" / "wandb").glob(f"offline-run-*-{RUN_ID}/*.wandb"))
    assert [wandb_history(file) for file in files] == [[(1, 1.0), (2, 0.5)], [(3, pytest.approx(1 / 3)), (4, 0.25)]]
    for file in files:
        (run,) = [record.run for record in wandb_records(file) if record.HasField("run")][:1]
        assert (run.run_id, run.display_name, run.project) == (RUN_ID, "pretrain", "beats_ray")
        config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
        assert config["train.steps"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"], "nothing in the working folder"


def test_a_continued_wandb_run_skips_the_steps_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        step, offline = 4, False  # W&B has steps up to 3

        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, data: dict[str, Any], step: int, commit: bool) -> None:
            assert "step" not in data
            self.steps.append(step)

    run = Run()
    logger = WandbLogger(open_place(str(tmp_path)), "pretrain", RUN_ID, {}, 2)
    monkeypatch.setattr(logger, "_open", lambda: run)
    for step in (3, 4, 5):
        logger.write(report(step))
    assert run.steps == [4, 5]


# --- a server that is away --------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


RUN_WITH_DEAD_SERVER = """
import sys, time
from beats_ray.data.storage import open_place
from beats_ray.train import loggers
from beats_ray.train.metrics import MetricsLog

loggers.CLOSE_SECONDS = 2.0
name, output = sys.argv[1:]
place = open_place(output)
built = loggers.build_loggers((name,), place, "run", "0123456789abcdef", {}, 0)
built[0]._close_seconds = 2.0
log = MetricsLog(place, 0, built)
started = time.monotonic()
for step in range(1, 51):
    log.write({"step": step, "train/loss": 1.0})
    if step % 10 == 0:
        log.flush()
print("loop", time.monotonic() - started)
log.close()
print("end", time.monotonic() - started)
"""


@pytest.mark.parametrize("address", ["refuses", "silent"])
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_dead_server_neither_ends_nor_stalls_the_run_nor_keeps_its_process(
    name: str, address: str, silent_server: str, tmp_path: Path
) -> None:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    url = silent_server if address == "silent" else "http://127.0.0.1:1"
    servers = {"MLFLOW_TRACKING_URI": url, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITH_DEAD_SERVER, name, str(tmp_path)],
        env={**os.environ, **servers, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if " " in line}
    assert seconds["loop"] < 10
    assert seconds["end"] < seconds["loop"] + 10
    assert f"{name}: 50 of 50 reports did not arrive" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 100
    assert [record["step"] for record in read_metrics(open_place(str(tmp_path)))] == list(range(1, 51))
