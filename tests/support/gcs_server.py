"""A server that speaks Google Cloud Storage's protocol: PyPI's gcp-storage-emulator, as one child process."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Self

import pytest

BUCKET = "beats"
START_SECONDS = 20.0


class GcsServer:
    """Serves an empty bucket from memory, from `with` to its end; skips the test where the package is missing."""

    def __enter__(self) -> Self:
        if importlib.util.find_spec("gcp_storage_emulator") is None:
            pytest.skip("gcp-storage-emulator is not installed: nothing to test gs:// against")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)),
                *("--in-memory", "--quiet", "--default-bucket", BUCKET),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError("gcp-storage-emulator did not start")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # this process only: it holds nothing but memory
        self._process.wait()

    def environment(self) -> dict[str, str]:
        """The variable that makes Google's clients talk to this server."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=2.0) as answer:  # noqa: S310  our own address
                return bool(answer.status == 200)
        except OSError:
            return False
