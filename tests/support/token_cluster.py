"""A Ray head as `ray start` makes it, with tokens, on loopback; every process of it ends with the block."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
RIGHT = "right"


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def node_address() -> str:
    """What Ray calls this machine: loopback is no name for a node, even where it is asked for."""
    from ray.util import get_node_ip_address

    address: str = get_node_ip_address()
    return address


class TokenCluster:
    """Addresses of a running head and the environment that its users need."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        """certificates: a folder of `cluster/tls.sh` with one for `node_address`, where the head speaks TLS."""
        self.token_file = folder / "auth_token"
        self.token_file.write_text(secrets.token_hex(32))
        self.token_file.chmod(0o600)
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.client = f"ray://127.0.0.1:{free_port()}"
        self.gcs = f"127.0.0.1:{free_port()}"
        self.log = folder / "head.log"
        self.logs = Path()
        """Ray's own logs, while the head runs."""
        self.ray = Path(sys.executable).with_name("ray")
        self._certificates = certificates
        self.storage_key = secrets.token_hex(20)
        """In the environment of the head and of all jobs, as AWS_SECRET_ACCESS_KEY."""
        self._mark = uuid.uuid4().hex

    def environment(self, token: str | None = RIGHT) -> dict[str, str]:
        """For a process that uses the cluster: with the right token, a wrong one, or None."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": self.dashboard, "HOME": str(self.home)}
        kept["PATH"] = os.pathsep.join([str(self.ray.parent), kept.get("PATH", "")])
        kept |= self._tls() | {"AWS_SECRET_ACCESS_KEY": self.storage_key}
        if token is None:
            return kept | {"RAY_AUTH_MODE": "disabled"}
        if token == RIGHT:
            return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def _tls(self) -> dict[str, str]:
        if self._certificates is None:
            return {}
        node = self._certificates / node_address()
        return {
            "RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": str(self._certificates / "ca.crt"),
            "RAY_TLS_SERVER_CERT": f"{node}.crt", "RAY_TLS_SERVER_KEY": f"{node}.key",
        }  # fmt: skip

    @property
    def home(self) -> Path:
        """A home of its own: nobody's token file is read or written."""
        return self.token_file.parent

    def run(self, *command: str, token: str | None = RIGHT, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        """Runs a program against the cluster, in the repository."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(token), capture_output=True, text=True, timeout=timeout, check=False
        )

    @contextlib.contextmanager
    def running(self, temp_dir: Path) -> Iterator["TokenCluster"]:
        """temp_dir: short, for the sockets below it."""
        ports = {name: str(free_port()) for name in ("dashboard-agent-listen", "metrics-export", "object-manager")}
        command = [
            str(self.ray), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            f"--port={self.gcs.rpartition(':')[2]}", f"--ray-client-server-port={self.client.rpartition(':')[2]}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
            "--num-cpus=6", f"--object-store-memory={300 * 2**20}", f"--temp-dir={temp_dir}",
            *(f"--{name}-port={port}" for name, port in ports.items()),
        ]  # fmt: skip
        environment = {name: value for name, value in self.environment().items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_num_workers_soft_limit": "8", "BEATS_RAY_TEST_MARK": self._mark}
        with self.log.open("wb") as log:
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.logs = temp_dir / "session_latest" / "logs"
        try:
            self._wait()
            yield self
        finally:
            self._end()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.run(str(self.ray), "job", "list", timeout=120).returncode:
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-4000:]
            time.sleep(1)

    def processes(self) -> list[psutil.Process]:
        """All processes that the head started, by the mark in their environment."""
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("BEATS_RAY_TEST_MARK") == self._mark:
                    found.append(process)
        return found

    def open_ports(self) -> set[tuple[str, int]]:
        """Name and port of every process of the head that listens on another address than loopback."""
        names = {process.pid: process.name() for process in self.processes()}
        return {
            (names[connection.pid], connection.laddr.port)
            for connection in psutil.net_connections("inet")
            if connection.pid in names
            and connection.status == psutil.CONN_LISTEN
            and connection.laddr.ip not in ("127.0.0.1", "::1")
        }

    def _end(self) -> None:
        for _ in range(20):
            left = self.processes()
            if not left:
                return
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
