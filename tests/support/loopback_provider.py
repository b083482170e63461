"""Machines for Ray's autoscaler that are processes: each node is a `ray start` on this machine.

    provider: {type: external, module: support.loopback_provider.LoopbackNodeProvider, ...}

`ScalingCluster` starts a head with such a file. The provider lives in the head's autoscaler, which sees what it would
of a cloud: nodes that are asked for, come, join, are given back, or are gone one day. What became of each is in
`FOLDER/nodes.jsonl`. It ends processes by their ids alone, those that it started.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from support.marked import marked_processes

HEAD = "head"
"""The head's id and node type; it is started by somebody else."""
HEAD_IP = "127.0.0.1"
"""All nodes share the address: version 2 of the autoscaler tells them apart by `NODE_ID`."""
NODE_ID = "RAY_CLOUD_INSTANCE_ID"
"""By this variable Ray knows which machine a node is; every process of the node inherits it."""
NODE_TYPE = "RAY_NODE_TYPE_NAME"
EVENTS = "nodes.jsonl"
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Machine:
    """A started node."""

    process: "subprocess.Popen[bytes]"
    """`ray start --block`, which ends with the node."""
    tags: dict[str, str]


def node_processes(node_id: str) -> list[psutil.Process]:
    """Every process of a node, its workers included."""
    return marked_processes(node_id, NODE_ID)


class LoopbackNodeProvider(NodeProvider):
    """provider_config: `address` of the head, `folder` for logs and events."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._address = str(provider_config["address"])
        self._lock = threading.RLock()
        self._machines: dict[str, Machine] = {}
        self._started = 0
        self._head_tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: HEAD, TAG_RAY_NODE_NAME: HEAD,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }  # fmt: skip

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """The head and the machines that are still there; one whose process has ended is gone for good."""
        with self._lock:
            for node_id, machine in list(self._machines.items()):
                if machine.process.poll() is not None:
                    self._forget(node_id, "gone")
            return [
                node_id for node_id in (HEAD, *self._machines) if tag_filters.items() <= self.node_tags(node_id).items()
            ]

    def is_running(self, node_id: str) -> bool:
        with self._lock:
            return node_id == HEAD or node_id in self._machines

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._lock:
            return dict(self._head_tags if node_id == HEAD else self._machines[node_id].tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._lock:
            (self._head_tags if node_id == HEAD else self._machines[node_id].tags).update(tags)

    def internal_ip(self, node_id: str) -> str:
        return HEAD_IP

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Starts `count` nodes and does not wait until they have joined."""
        for _ in range(count):
            with self._lock:
                self._start(tags, resources, labels)

    def terminate_node(self, node_id: str) -> None:
        """Ends a machine's processes: by their own choice, and those that are left after a while by force."""
        with self._lock:
            machine = self._machines[node_id]
            self._forget(node_id, "given back")
        machine.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            machine.process.wait(STOP_SECONDS)
        self._sweep(node_id)

    def _start(self, tags: dict[str, str], resources: dict[str, float], labels: dict[str, str]) -> None:
        self._started += 1
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        node_id = f"{node_type}-{self._started}"
        own = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "object_store_memory")}
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={self._address}",
            f"--num-cpus={resources.get('CPU', 0):g}", "--num-gpus=0",
            f"--object-store-memory={resources['object_store_memory']:.0f}", f"--resources={json.dumps(own)}",
            f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--metrics-export-port=0",
        ]  # fmt: skip
        with (self._folder / f"{node_id}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=os.environ | {NODE_ID: node_id, NODE_TYPE: node_type}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._machines[node_id] = Machine(process, {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})
        self._record(node_id, "started", node_type)

    def _forget(self, node_id: str, event: str) -> None:
        machine = self._machines.pop(node_id)
        self._record(node_id, event, machine.tags[TAG_RAY_USER_NODE_TYPE])
        if event == "gone":
            self._sweep(node_id)

    def _sweep(self, node_id: str) -> None:
        """Kills what is left of a machine that is no more, as no machine leaves processes behind."""
        for process in node_processes(node_id):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _record(self, node_id: str, event: str, node_type: str) -> None:
        line = {"node": node_id, "type": node_type, "event": event, "at": round(time.time(), 1)}
        with (self._folder / EVENTS).open("a") as events:
            events.write(json.dumps(line) + "\n")
