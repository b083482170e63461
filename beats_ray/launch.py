"""Opens the Ray cluster a command runs on, and closes what it opened.

    with ray_cluster(config.ray):
        ...

A private cluster gets its own temp folder and free ports, so that two on one machine never meet; leaving the block, for
whatever reason, ends every process of it.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from beats_ray.config import ConfigError, RaySettings, StreamSettings, TrainSettings, UserError

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
CONNECT_SECONDS = 10.0
_RAY_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_usage_stats_enabled": "0",
    "RAY_num_workers_soft_limit": "16",  # idle processes stay for the next stage; above it Ray prints warnings
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; the trials' own checkpoints are what resumes
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Processes that read, decode and train take and free tens of MiB at a time. Given back to the system each time,
    # that memory comes again page by page, set to zero: a quarter of the processor time of the data plane. jemalloc,
    # which Ray brings for its own processes, takes less of it than glibc, whose holes do not fit again.
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    "MIMALLOC_PURGE_DELAY": "-1",  # pyarrow's
}

ALLOCATOR_VARIABLES = ("MALLOC_CONF", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MIMALLOC_PURGE_DELAY")


def allocator_environment() -> dict[str, str]:
    """The variables by which a worker allocates memory, for a process that stands for one outside a cluster."""
    from ray._private.services import JEMALLOC_SO

    found = {name: _RAY_ENVIRONMENT[name] for name in ALLOCATOR_VARIABLES}
    return found | ({"LD_PRELOAD": JEMALLOC_SO} if JEMALLOC_SO else {})  # there is none for some platforms


def check_answers(address: str, setting: str = "ray.address") -> None:
    """ConfigError where nobody listens at HOST:PORT within some seconds; Ray itself would wait for minutes.

    setting: what the address was given as, for the message.
    """
    host, separator, port = address.rpartition(":")
    if not separator or "/" in host or not port.isdigit():  # auto, or ray://
        return
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{setting}={address}: no cluster answers there ({error}); check the address, or leave it out"
                ) from None
        time.sleep(0.5)  # a head that has just been started, or starts again


@contextlib.contextmanager
def ray_cluster(settings: RaySettings) -> Iterator[None]:
    """Connects to a cluster or starts a private one for the time of the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    joins = settings.address not in ("auto", "local") or (settings.address == "auto" and "RAY_ADDRESS" in os.environ)
    if joins:
        address = os.environ.get("RAY_ADDRESS", "auto") if settings.address == "auto" else settings.address
        check_answers(address)
        try:
            with _keeping_sigterm():
                ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"ray.address={address}: no cluster answers there; check RAY_ADDRESS, or set ray.address=local"
            ) from error
        try:
            _quiet_libraries()
            yield
        finally:
            ray.shutdown()
        return
    with _private_cluster(settings):
        yield


def check_fits(settings: TrainSettings, data: StreamSettings, streams: int | None = None) -> None:
    """ConfigError when the cluster has fewer CPUs (or GPUs) than the workers and their data streams at once need.

    streams: by default those of the training clips.

    A cluster that scales counts with every node that its autoscaler may start; where it has not said which, the run
    waits for them, and a warning says for what. So does a stream that needs data nodes.
    """
    from beats_ray.data.stream import required_cpus, warn_without_data_nodes

    warn_without_data_nodes(data)
    streams = data.streams if streams is None else streams
    total = most_resources()
    reading = required_cpus(data, streams)
    workers = settings.min_workers
    what = "the data stream" if streams == 1 else f"{streams} data streams"
    needed = workers * settings.cpus_per_worker + reading
    if needed > total.get("CPU", 0.0):
        refuse_or_wait(
            f"train.num_workers={workers} x cpus_per_worker={settings.cpus_per_worker:g} and {reading:g} "
            f"for {what} make {needed:g} CPUs; the cluster has {total.get('CPU', 0.0):g} (a private one "
            "counts every core twice); lower num_workers or cpus_per_worker, or raise ray.num_cpus"
        )
    if settings.use_gpu and workers > total.get("GPU", 0.0):
        refuse_or_wait(
            f"train.num_workers={workers} with use_gpu needs as many GPUs; the cluster has "
            f"{total.get('GPU', 0.0):g}; lower num_workers or set train.use_gpu=false"
        )


def refuse_or_wait(shortage: str) -> None:
    """ConfigError with what the cluster lacks, or a warning where its autoscaler may bring it."""
    if not has_silent_autoscaler():
        raise ConfigError(shortage)
    logger.warning("%s. Waiting: the cluster's autoscaler does not say which nodes it may start", shortage)


def has_silent_autoscaler() -> bool:
    """Whether nodes may come of which nothing can be known: the autoscaler has not said which it may start.

    That of `ray up` and KubeRay does not say it (Ray 2.60). Its nodes have a type, which those that join a cluster by
    hand have not.
    """
    from ray._private.state import state
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    if state.get_cluster_config() is not None:
        return False
    driver: Any = global_worker  # whose client Ray sets when it connects
    return any(node.ray_node_type_name for node in get_cluster_resource_state(driver.gcs_client).node_states)


def most_resources() -> dict[str, float]:
    """What the cluster has, or would have with all the nodes that its autoscaler may start: CPU, GPU, and others."""
    import ray
    from ray._private.state import state  # where Ray Train looks before it asks for workers

    present = ray.cluster_resources()
    possible = state.get_max_resources_from_cluster_config() or {}
    return {name: max(present.get(name, 0.0), possible.get(name, 0)) for name in {*present, *possible}}


@contextlib.contextmanager
def _private_cluster(settings: RaySettings) -> Iterator[None]:
    import ray

    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cores = psutil.cpu_count(logical=True) or 1
    # Short: the paths of Ray's sockets, which lie below it, may have 107 characters at most.
    scratch = Path(tempfile.mkdtemp(prefix="br-", dir="/tmp"))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    started: list[psutil.Process] = []
    try:
        with _without_announcements(), _keeping_sigterm(), _one_line_for_a_slow_start():
            ray.init(
                address="local",
                num_cpus=settings.num_cpus or 2 * cores,
                object_store_memory=settings.object_store_mib * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(scratch),
            )
        _quiet_libraries()
        yield
    finally:
        started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        ray.shutdown()
        _end(started)
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _one_line_for_a_slow_start() -> Iterator[None]:
    """UserError where a machine is too busy to start a cluster within the 30 s that Ray gives it."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type for it
            raise
        raise UserError(
            "Ray did not start within 30 s: the machine is too busy or short of memory; try again, or set ray.address "
            "to a cluster that runs"
        ) from error


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Leaves SIGTERM to whom it belonged before the block.

    `ray.init` takes it: its C++ part aborts a process that has not ended 3 s later, and a run needs longer for its last
    checkpoint.
    """
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and ours is not None:
            signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def _without_announcements() -> Iterator[None]:
    """Holds back what the block writes to stderr and passes on all but Ray's line about its log level.

    Ray's C++ part writes that line to the file descriptor itself, whatever the level.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if b"Set ray log level" not in line:
                    os.write(2, line)


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end, then asks those left over by signal, by their pids alone."""
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS / 2)
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(process)
        _, alive = psutil.wait_procs(alive, timeout=STOP_SECONDS / 2)


def _quiet_libraries() -> None:
    import ray.data  # noqa: F401 - it sets its loggers up when it is imported, so what was set before does not last

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it announces that there is no bar
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"ray\b")  # advice to Ray's own developers
