"""A Ray head whose autoscaler starts and stops nodes on this machine; every process of it ends with the block."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from support.loopback_provider import EVENTS, HEAD, HEAD_IP, NODE_ID, NODE_TYPE, node_processes
from support.marked import MARK, kill_marked
from support.token_cluster import ROOT, free_port

START_SECONDS = 300
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
"""What `ray up` would do on machines over SSH: all of these must be there."""


class ScalingCluster:
    """A head without CPUs, from which `node_types` are started as they are asked for."""

    def __init__(self, folder: Path, node_types: dict[str, dict[str, Any]], idle_seconds: float) -> None:
        """node_types: as `available_node_types` of a `ray up` file has them."""
        self.folder = folder
        self.address = f"{HEAD_IP}:{free_port()}"
        self._mark = uuid.uuid4().hex
        types = {name: {"min_workers": 0, "node_config": {}, **node_type} for name, node_type in node_types.items()}
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        self._config = {
            "cluster_name": "loopback",
            "max_workers": sum(node_type["max_workers"] for node_type in types.values()),
            "idle_timeout_minutes": idle_seconds / 60,
            "provider": {
                "type": "external", "module": "support.loopback_provider.LoopbackNodeProvider",
                "address": self.address, "folder": str(folder), "disable_node_updaters": True,
            },
            "auth": {}, "file_mounts": {}, "cluster_synced_files": [], **{name: [] for name in COMMANDS},
            "head_node_type": HEAD,
            "available_node_types": {HEAD: head, **types},
        }  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of a command that uses the cluster; its processes end with the cluster, too."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", MARK: self._mark,
        }  # fmt: skip

    @contextlib.contextmanager
    def running(self, temp_dir: Path) -> Iterator["ScalingCluster"]:
        """temp_dir: short, for the sockets below it."""
        config = self.folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self._config))
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
            f"--node-ip-address={HEAD_IP}", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", "--num-gpus=0",
            f"--object-store-memory={200 * 2**20}", f"--temp-dir={temp_dir}", f"--autoscaling-config={config}",
            "--include-dashboard=false", f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0",
            "--metrics-export-port=0", "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        environment = {name: value for name, value in self.environment().items() if name != "RAY_ADDRESS"}
        environment |= {
            "RAY_enable_autoscaler_v2": "1",  # as `ray up` and KubeRay have it: version 1 knows nothing of labels
            NODE_ID: HEAD, NODE_TYPE: HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "3", "AUTOSCALER_METRIC_PORT": str(free_port()),
            "RAY_num_workers_soft_limit": "4", "RAY_raylet_start_wait_time_s": str(START_SECONDS),
        }  # fmt: skip
        self.logs = temp_dir / "session_latest" / "logs"
        try:
            with (self.folder / "head.log").open("wb") as log:
                head = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            self.wait_for(lambda: self.log("monitor.log") != "", START_SECONDS, head)
            yield self
        finally:
            kill_marked(self._mark)

    def wait_for(
        self, has_come: Callable[[], bool], seconds: float, process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        """Waits, and no longer than `process` runs."""
        deadline = time.monotonic() + seconds
        while not has_come():
            assert process is None or process.poll() is None, f"it ended too early:\n{self.tail()}"
            assert time.monotonic() < deadline, f"it did not come so far:\n{self.tail()}"
            time.sleep(0.1)

    def events(self) -> list[dict[str, Any]]:
        """What became of the nodes so far: started, given back (by the autoscaler) or gone (by themselves)."""
        try:
            lines = (self.folder / EVENTS).read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def nodes(self, node_type: str) -> list[str]:
        """The nodes of a type that are there, in the order of their start."""
        events = [event for event in self.events() if event["type"] == node_type]
        ended = {event["node"] for event in events if event["event"] != "started"}
        return [event["node"] for event in events if event["event"] == "started" and event["node"] not in ended]

    def take_away(self, node_id: str) -> None:
        """Kills all that runs on a node, at once, as a spot machine ends whose notice nobody hears."""
        while found := node_processes(node_id):
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def log(self, name: str) -> str:
        """One of Ray's own logs; empty where there is none yet."""
        path = self.logs / name
        return path.read_text(errors="replace") if path.exists() else ""

    def tail(self) -> str:
        """The ends of all logs that may say what went wrong."""
        logs = {path.name: path.read_text(errors="replace") for path in self.folder.glob("*.log")}
        logs["monitor.log"] = self.log("monitor.log")
        return "\n".join(f"--- {name}\n{text[-1500:]}" for name, text in logs.items())
