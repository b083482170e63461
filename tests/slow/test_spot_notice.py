"""A real Ray node is drained when its machine's metadata service announces the end of a spot machine."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.metadata_service import Metadata, metadata_service
from support.token_cluster import TokenCluster

from beats_ray.clusters.spot_notice import LOCK_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_notice_drains_the_node_of_a_head_with_tokens(tmp_path: Path) -> None:
    cluster = TokenCluster(tmp_path)
    with (
        metadata_service() as metadata,
        tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as sockets,
        cluster.running(Path(sockets)),
    ):
        environment = cluster.environment() | {"RAY_ADDRESS": cluster.gcs, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-m", "beats_ray.clusters.spot_notice", "aws", metadata]
        watcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not (tmp_path / LOCK_FILE).exists():
            time.sleep(0.1)
        time.sleep(1)  # opened, and locked at once
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (second.returncode, watcher.poll()) == (0, None), "one watcher a machine, and it waits"
        Metadata.taken = True
        said, _ = watcher.communicate(timeout=120)
        assert watcher.returncode == 0, said
        assert "Ray drains the node" in said
        logs = "".join(path.read_text(errors="replace") for path in cluster.logs.glob("gcs_server*"))
        assert "takes this spot machine" in logs or "DRAIN_NODE_REASON_PREEMPTION" in logs
